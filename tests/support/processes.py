"""Python processes of their own, for what is global to a process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

from tests.support.forks import Fork, run_fork
from tests.support.small_models import ROOT


def run_python(code: str, *args: str, is_fresh: bool = False) -> str:
    """The output of a Python process in which this repository can be imported.

    Args:
        code: What it does.
        args: Of the command line.
        is_fresh: Whether nothing may be imported before, at the cost of seconds (see `forks`).
    """
    return _run(["-c", code, *args], is_fresh)


def run_module(name: str, *args: object) -> str:
    """The output of a module that is run as a program."""
    return _run(["-m", name, *map(str, args)])


def call_in_two_processes(function: Callable[..., None], *args: str | int) -> None:
    """Calls a function of a module with 0 in one process, and with 1 in another one, and with the rest of arguments."""
    code = f"import json, sys; from {function.__module__} import {function.__name__} as f; f(*json.loads(sys.argv[1]))"
    forks = [Fork(["-c", code, json.dumps([rank, *args])], list_variables()) for rank in (0, 1)]
    try:
        for fork in forks:
            assert fork.wait() == 0, fork.read()[1][-3000:]
    finally:
        for fork in forks:
            fork.kill()


def list_variables() -> dict[str, str]:
    """The environment of such a process."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _run(args: list[str], is_fresh: bool = False) -> str:
    if is_fresh:
        result = subprocess.run([sys.executable, *args], capture_output=True, text=True, env=list_variables())
    else:
        result = run_fork(args, list_variables())
    assert result.returncode == 0, result.stderr
    return result.stdout
