"""Whether this tree can be released: one version everywhere, its part of the changelog, and the project's addresses.

python .ci/check_release.py v0.1.0
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What a release shows on PyPI, in citations and on the site. RELEASE.md says where they stand.
URLS = ("Homepage", "Documentation", "Source", "Issues", "Changelog")
ADDRESSES = (("CITATION.cff", "repository-code"), ("mkdocs.yml", "site_url"), ("mkdocs.yml", "repo_url"))


def find_problems(root: Path, tag: str) -> list[str]:
    """What has to be done before a release, a line each.

    Args:
        root: Of the sources.
        tag: Of the release, `v` and its version.
    """
    version = _find(root / "pvt_hf" / "__init__.py", r'^__version__ = "(.+)"$')
    problems = [] if tag == f"v{version}" else [f"the tag is {tag}, and pvt_hf/__init__.py says {version}"]
    if (cited := _find(root / "CITATION.cff", r"^version: (.+)$")) != version:
        problems.append(f"CITATION.cff has the version {cited}, not {version}")
    if not _find(root / "CHANGELOG.md", rf"^(## {re.escape(version)} - \d{{4}}-\d\d-\d\d)$"):
        problems.append(f"CHANGELOG.md has no part `## {version} - YYYY-MM-DD`")
    urls = tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"]
    problems += [f"pyproject.toml has no address {name!r}" for name in URLS if not _is_address(urls.get(name, ""))]
    if re.search(r"\]\((?!https://|#)|<img[^>]*src=\"(?!https://)", (root / "README.md").read_text()):
        problems.append("README.md has a picture or a link without an address, which PyPI would not find")
    return problems + [
        f"{file} has no address `{key}`"
        for file, key in ADDRESSES
        if not _is_address(_find(root / file, rf"^{key}: (\S+)$"))
    ]


def _find(file: Path, pattern: str) -> str:
    match = re.search(pattern, file.read_text(), flags=re.MULTILINE) if file.is_file() else None
    return match[1] if match else ""


def _is_address(text: str) -> bool:
    return text.startswith("https://") and "example" not in text


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    if found := find_problems(ROOT, sys.argv[1]):
        raise SystemExit("\n".join(["This cannot be released:", *found]))
    print(f"{sys.argv[1]} can be released")
