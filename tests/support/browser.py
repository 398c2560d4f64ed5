"""A real browser without a window, for the tests of pages; the network beyond this machine is cut off."""

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def open_browser() -> Iterator:
    """playwright's browser. The test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"there is no browser: {', '.join(PROGRAMS)}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser, url: str, **options):
    """A page, and the list of addresses beyond this machine that it asked for, which fail."""
    context, outside = browser.new_context(**options), []

    def cut(route) -> None:
        outside.append(route.request.url)
        route.abort()

    context.route(lambda address: not address.startswith(("http://127.0.0.1:", "blob:", "data:")), cut)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(url)
    return page, outside


@contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    """The address at which the files of a folder are served, as `python -m http.server` serves them."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
