"""The page in a real browser, as a visitor uses it. `pytest -m slow`; pictures of it are in the test's folder."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the extra demo is not installed")

from tests.support.browser import open_browser, open_page  # noqa: E402 (where there is no gradio, there is no page)
from tests.support.small_models import ROOT  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(models):
    """`pvt-hf demo` with three models, as it is started."""
    names = [str(models / name) for name in ("v2", "retinanet", "semantic_fpn")]
    command = [sys.executable, "-m", "pvt_hf.commands.main", "demo", *names, "--max_file_size", "100kb"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        line = process.stdout.readline()
        yield re.search(r"the page is at (http://127\.0\.0\.1:\d+/)", line)[1]
        process.terminate()


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((70, 50)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def choose(page, label: str, place: int, option: int) -> None:
    page.get_by_label(label).nth(place).click()
    page.get_by_role("option").nth(option).click()


def test_a_visitor_sees_what_two_models_find(browser, address, photo, tmp_path):
    page, outside = open_page(browser, address, viewport={"width": 1400, "height": 900})
    page.set_input_files("input[type=file]", photo)
    # The classifier on the left, the detector on the right.
    page.get_by_test_id("cat (0)-confidence-set").wait_for()
    page.get_by_text(re.compile("nothing above 0.3|cat|<i>")).first.wait_for()
    page.get_by_role("button", name="Fullscreen").nth(1).wait_for()
    page.screenshot(path=tmp_path / "two-models.png", full_page=True)

    choose(page, "Where is the evidence for a class?", 0, 1)
    page.get_by_text("Evidence", exact=True).wait_for()

    page.locator("input[type=number]").fill("0.99")
    page.get_by_text("nothing above 0.99").wait_for()
    assert page.get_by_text("Evidence", exact=True).is_visible()  # the threshold is not the classifier's
    page.screenshot(path=tmp_path / "threshold.png", full_page=True)

    choose(page, "Model", 0, 2)
    page.locator(".class").first.wait_for()  # the legend of the label map
    assert not page.get_by_text("Evidence", exact=True).is_visible()
    page.screenshot(path=tmp_path / "segmenter.png", full_page=True)
    assert not outside


def test_a_bad_file_is_a_message_on_the_page(browser, address, photo, tmp_path):
    page, _ = open_page(browser, address)
    page.set_input_files("input[type=file]", {"name": "bad.png", "mimeType": "image/png", "buffer": b"no image"})
    page.get_by_text("This image cannot be used.").wait_for()
    page.screenshot(path=tmp_path / "bad-file.png", full_page=True)
    page.get_by_role("button", name="Remove Image").first.click()
    page.get_by_text("This image cannot be used.").wait_for(state="hidden")
    page.set_input_files("input[type=file]", photo)  # the next one works
    page.get_by_test_id("cat (0)-confidence-set").wait_for()


def test_a_large_file_is_a_message_on_the_page(browser, address, tmp_path):
    page, _ = open_page(browser, address)
    large = {"name": "large.png", "mimeType": "image/png", "buffer": bytes(200_000)}
    page.set_input_files("input[type=file]", large)
    page.get_by_text(re.compile("size|large", re.IGNORECASE)).first.wait_for()
    page.screenshot(path=tmp_path / "large-file.png", full_page=True)


def test_an_example_is_predicted_on_a_phone(browser, address, tmp_path):
    page, outside = open_page(browser, address, viewport={"width": 360, "height": 740}, color_scheme="dark")
    page.locator(".gallery-item").first.click()
    page.get_by_test_id("cat (0)-confidence-set").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360 and not outside
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
