"""Python programs in processes of their own that have imported torch already, which takes longer than most programs.

They are forked from a process that has imported `IMPORTS` and nothing else. Nothing of Hugging Face is among that: it
reads variables of the environment while it is imported.
"""

import atexit
import functools
import gc
import importlib
import json
import math
import os
import runpy
import sys
import tempfile
import threading
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen

IMPORTS = ("torch", "torch._dynamo", "torchvision", "matplotlib.figure", "sklearn.datasets", "safetensors.torch")


class Fork:
    """A process that was forked, much like `subprocess.Popen`.

    Args:
        arguments: What `python` would be called with: `-c` and code, `-m` and a module, or a file; and more.
        environment: All of its variables, which hold for what it imports itself.
        folder: Where it works.
    """

    def __init__(self, arguments: list[str], environment: dict[str, str], folder: str | Path = "."):
        self.outputs = tempfile.TemporaryDirectory(prefix="fork-")
        files = [f"{self.outputs.name}/{name}" for name in ("output", "errors")]
        self.pid = ask(arguments=arguments, environment=environment, folder=os.path.abspath(folder), outputs=files)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = ask(poll=self.pid)
        return self.returncode

    def wait(self, seconds: float = math.inf) -> int:
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError(f"The process takes more than {seconds} s: {self.read()[1][-3000:]}")
            time.sleep(0.01)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, 9)
            self.wait()

    def read(self) -> tuple[str, str]:
        """What it has written to its output, and as errors, so far."""
        return tuple(Path(self.outputs.name, name).read_text() for name in ("output", "errors"))


def run_fork(arguments: list[str], environment: dict[str, str], folder: str | Path = ".") -> CompletedProcess:
    """What `subprocess.run` would return."""
    fork = Fork(arguments, environment, folder)
    try:
        fork.wait()
    finally:
        fork.kill()
    return CompletedProcess(arguments, fork.returncode, *fork.read())


@functools.cache
def start_server() -> Popen:
    """It ends with this process."""
    pipes = {"stdin": PIPE, "stdout": PIPE, "text": True}
    # (No folder of the repository is on its path but this one, which it takes away itself.)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return Popen([sys.executable, __file__], env=environment, cwd="/", **pipes)


def ask(**request: object) -> int | None:
    """The answer of the process that forks."""
    server = start_server()
    print(json.dumps(request), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


def serve() -> dict:
    """Answers requests, and returns that of each process that it forks in there."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            found, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if found else None
        else:
            with warnings.catch_warnings():  # of a thread of pyarrow, which is made for that
                warnings.simplefilter("ignore", DeprecationWarning)
                answer = os.fork()
            if not answer:
                return request
        print(json.dumps(answer), flush=True)
    os._exit(0)


def become(arguments: list[str], environment: dict[str, str], folder: str, outputs: list[str]) -> None:
    """Does in this process what a fresh one with these arguments would do, and ends it, as `multiprocessing` does:
    taking down all that was imported would take seconds.
    """
    for target, file in enumerate((os.devnull, *outputs)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT if target else os.O_RDONLY), target)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    status = 1
    try:
        start(arguments, folder)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start(arguments: list[str], folder: str) -> None:
    """Runs a program as `__main__`."""
    kind, name = arguments[0], arguments[1] if arguments[0] in ("-c", "-m") else arguments[0]
    beside = {"-c": "", "-m": folder}.get(kind, os.path.dirname(name))
    sys.path[:0] = [beside, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if kind == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(name, "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = [name, *arguments[2:]]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(name, run_name="__main__")


if __name__ == "__main__":
    del sys.path[0]  # this folder
    for imported in IMPORTS:
        with suppress(ModuleNotFoundError):  # where the package is tested without its extras
            importlib.import_module(imported)
    assert "huggingface_hub" not in sys.modules, "imported with an environment that is not that of the programs"
    gc.freeze()  # or the collector of each fork would look through it, and make copies of its memory
    become(**serve())
