"""Python processes of their own, for what is global to a process."""

import os
import subprocess
import sys

from tests.support.small_models import ROOT


def run_python(code: str, *args: str) -> str:
    """The output of a fresh Python process in which this repository can be imported."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout
