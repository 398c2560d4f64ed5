"""Compares the number of mypy's errors with `.ci/type_errors`: it may only fall, and the file then says the new one."""

import re
import subprocess
import sys
from pathlib import Path

ALLOWED = Path(__file__).with_name("type_errors")

result = subprocess.run([sys.executable, "-m", "mypy"], capture_output=True, text=True, cwd=ALLOWED.parents[1])
match = re.search(r"^Found (\d+) error|^Success", result.stdout, re.MULTILINE)
if match is None:
    raise SystemExit(result.stdout + result.stderr)
found, allowed = int(match[1] or 0), int(ALLOWED.read_text())
print(f"{found} type errors, {allowed} are allowed")
if found > allowed:
    raise SystemExit(f"{result.stdout}More type errors than before: mend the new ones.")
if found < allowed:
    raise SystemExit(f"Fewer type errors than before: write {found} into {ALLOWED.name}.")
