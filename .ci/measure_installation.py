"""How large an installation of pvt_hf is, and how long its import takes, as a table in Markdown.

pip install pvt_hf && python .ci/measure_installation.py
"""

import importlib.util
import re
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

LARGEST = 4  # have rows of their own
IMPORTS = ("import torch", "from transformers import AutoModelForImageClassification, Trainer", "import pvt_hf")
CPU_SECONDS = "; import resource; used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime + used.ru_stime)"


def list_requirements(name: str) -> set[str]:
    """The names of all packages that a package needs without extras, and that these need; its own too."""
    needed, waiting = set(), [name]
    while waiting:
        found = waiting.pop()
        if found not in needed:
            needed.add(found)
            requirements = map(Requirement, distribution(found).requires or ())
            used = (entry for entry in requirements if not entry.marker or entry.marker.evaluate({"extra": ""}))
            waiting += [re.sub(r"[-_.]+", "-", entry.name).lower() for entry in used]
    return needed


def measure_size(installed: Distribution) -> int:
    """Bytes of its files, and of the package itself where a clone is installed in place."""
    name = installed.metadata["Name"]
    if name == "pvt_hf":
        folder = Path(importlib.util.find_spec(name).origin).parent
        files = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
    else:
        files = [Path(str(file.locate())) for file in installed.files or ()]
    return sum(file.stat().st_size for file in files if file.is_file())


def time_import(statement: str) -> float:
    """CPU seconds of a process that does nothing else: the best of three."""
    command = [sys.executable, "-c", statement + CPU_SECONDS]
    return min(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3))


def main() -> None:
    sizes = {name: measure_size(distribution(name)) for name in list_requirements("pvt-hf")}
    own = sizes.pop("pvt-hf")
    largest = sorted(sizes, key=sizes.get, reverse=True)[:LARGEST]
    others = len(sizes) - len(largest)
    rows = [("pvt_hf", own), *((f"{name} {distribution(name).version}", sizes[name]) for name in largest)]
    rows += [(f"{others} others", sum(sizes.values()) - sum(sizes[name] for name in largest))]
    rows += [("together", own + sum(sizes.values()))]
    print("| installed | MB |\n|--|--|")
    print("\n".join(f"| {name} | {size / 1e6:.1f} |" for name, size in rows))
    print("\n| program | CPU seconds |\n|--|--|")
    print("\n".join(f"| `{statement}` | {time_import(statement):.1f} |" for statement in IMPORTS))


if __name__ == "__main__":
    main()
