"""The README and the pages of the site, for tests of what they say."""

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from tests.support.small_models import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        info: Behind the fence: `bash`, `python`, `python no-run`.
        text: What it holds.
        line: Of the page, where the text begins, counted from 1.
    """

    info: str
    text: str
    line: int


def name_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


def read_blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a page in a language, whatever else their info says."""
    text = page.read_text()
    found = re.finditer(r"^```(\S[^\n]*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    blocks = [Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1) for match in found]
    return [block for block in blocks if block.info.split()[0] == language]


def find_missing(name: str) -> list[str]:
    """What is not installed of a package, or of an extra of this one."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    missing = []
    for package in extras.get(name, [name]):
        try:
            metadata.distribution(Requirement(package).name)
        except metadata.PackageNotFoundError:
            missing.append(package)
    return missing
