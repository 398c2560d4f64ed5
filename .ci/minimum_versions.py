"""Prints pip constraints that pin every requirement of pyproject.toml to its lower bound.

python .ci/minimum_versions.py > minimum.txt && pip install -c minimum.txt ".[test]"
"""

import re
import tomllib
from pathlib import Path

# Tools of the checks themselves: their versions change nothing about the package.
TOOLS = {"build", "deptry", "mypy", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "twine"}

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
requirements = sum(project["optional-dependencies"].values(), project["dependencies"])
bounds = {}
for requirement in requirements:
    name, _, bound = re.match(r"([\w-]+)(\[.*\])?(?:[>=]=([\w.]+))?$", requirement).groups()
    if name in TOOLS or name == project["name"]:
        continue
    if bound is None or bounds.setdefault(name, bound) != bound:
        raise SystemExit(f"{requirement!r} must have one lower bound wherever it stands, as in 'torch>=2.9'.")
print("\n".join(f"{name}=={bound}" for name, bound in sorted(bounds.items())))
