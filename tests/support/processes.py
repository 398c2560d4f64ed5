"""Python processes of their own, for what is global to a process."""

import os
import subprocess
import sys

from tests.support.small_models import ROOT


def run_python(code: str, *args: str) -> str:
    """The output of a fresh Python process in which this repository can be imported."""
    return _run("-c", code, *args)


def run_module(name: str, *args: object) -> str:
    """The output of a module that is run as a program."""
    return _run("-m", name, *map(str, args))


def _run(*args: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *args], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout
