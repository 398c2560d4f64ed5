"""The site as mkdocs builds it: complete, and nothing in it comes from another server."""

import os
import re
import subprocess
import sys

import pytest

from tests.support.pages import PAGES, find_missing
from tests.support.small_models import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.process]


def test_site(tmp_path):
    if missing := find_missing("docs"):
        pytest.skip(f"not installed: {', '.join(missing)}")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    pages = {page: page.read_text() for page in tmp_path.rglob("*.html") if page.parts[-2] != "try"}
    assert len(pages) == len(PAGES)  # without the README, and with 404.html
    for page, text in pages.items():
        assert not re.search(r"^(?:<p>)?```", text, flags=re.MULTILINE), page  # every block was understood
        loaded = re.findall(
            r'<(?:script|img)[^>]*src="([^"]+)"|<link[^>]*rel="(?:icon|stylesheet)"[^>]*href="([^"]+)"', text
        )
        foreign = [name for pair in loaded for name in pair if name.startswith(("http:", "https:", "//"))]
        assert loaded and not foreign, (page, foreign)
    reference = (tmp_path / "reference" / "detection" / "index.html").read_text()
    assert 'id="pvt_hf.ATSSForObjectDetection.forward"' in reference and "*optional*" not in reference
