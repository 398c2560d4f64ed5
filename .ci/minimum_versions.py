"""Prints pip constraints that pin every requirement of the package and of some extras to its lower bound.

python .ci/minimum_versions.py test > minimum.txt && pip install -c minimum.txt ".[test]"
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

# Tools of the checks themselves: their versions change nothing about the package.
TOOLS = {"build", "deptry", "mypy", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "twine"}
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def list_bounds(requirements: list[str]) -> Iterator[tuple[str, str]]:
    """Names and lower bounds, those of the extras of the package itself that are named among them too."""
    for requirement in requirements:
        name, extras, bound = re.match(r"([\w-]+)(?:\[(.*)\])?(?:[>=]=([\w.]+))?$", requirement).groups()
        if name == PROJECT["name"]:
            for extra in extras.split(","):
                yield from list_bounds(PROJECT["optional-dependencies"][extra])
        elif name not in TOOLS:
            if bound is None:
                raise SystemExit(f"{requirement!r} must have a lower bound, as in 'torch>=2.9'.")
            yield name, bound


def find_minimum(extras: list[str]) -> dict[str, str]:
    """The lowest version of each requirement that the package and the extras allow together."""
    bounds = {}
    for name, bound in list_bounds([*PROJECT["dependencies"], *(f"{PROJECT['name']}[{extra}]" for extra in extras)]):
        bounds[name] = max(bounds.get(name, bound), bound, key=lambda version: [*map(int, version.split("."))])
    return bounds


if __name__ == "__main__":
    print("\n".join(f"{name}=={bound}" for name, bound in sorted(find_minimum(sys.argv[1:]).items())))
