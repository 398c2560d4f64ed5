"""Two machines in one: network namespaces with a cable between, or loopback addresses where those are not allowed."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.small_models import ROOT


@dataclass
class Machine:
    """
    Attributes:
        number: Of the machine in the job.
        folder: What it has of a disk.
        address: Its own.
        main: The address of the first machine.
        port: Of the first machine, free.
        interface: Of its network.
        namespace: In which its programs run; `None` where there is none.
    """

    number: int
    folder: Path
    address: str
    main: str
    port: int
    interface: str
    namespace: str | None

    def start(self, *command: str) -> subprocess.Popen:
        """A program of this environment; what it prints is in `output`."""
        self.folder.mkdir(exist_ok=True)
        program, *rest = command
        prefix = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.output.open("a") as output:
            return subprocess.Popen(
                [*prefix, str(Path(sys.executable).with_name(program)), *rest],
                cwd=self.folder,
                env=environment | {"GLOO_SOCKET_IFNAME": self.interface},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> Path:
        return self.folder / "output.txt"

    def list_processes(self) -> list[int]:
        """All that run on it."""
        found = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
        return [int(number) for number in found.stdout.split()]

    def cut_cable(self) -> None:
        run("ip", "-n", self.namespace, "link", "set", self.interface, "down")


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def can_isolate() -> bool:
    """Whether this user may make network namespaces."""
    if os.getuid() or not shutil.which("ip"):
        return False
    name = f"pvt-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return made


@contextmanager
def two_machines(folder: Path) -> Iterator[list[Machine]]:
    """Two machines, whose disks are folders of `folder`; whatever still runs on them in the end is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    if not can_isolate():
        addresses, port = ("127.0.0.1", "127.0.0.2"), find_free_port()
        yield [Machine(n, folder / str(n), addresses[n], addresses[0], port, "lo", None) for n in range(2)]
        return
    names = [f"pvt-{os.getpid()}-{number}" for number in range(2)]
    cables, addresses = ("pvt0", "pvt1"), ("10.231.77.1", "10.231.77.2")
    try:
        for name in names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "link", "add", cables[0], "netns", names[0], "type", "veth", "peer", cables[1], "netns", names[1])
        for name, cable, address in zip(names, cables, addresses, strict=True):
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", cable)
            run("ip", "-n", name, "link", "set", cable, "up")
        yield [Machine(n, folder / str(n), addresses[n], addresses[0], 29500, cables[n], names[n]) for n in range(2)]
    finally:
        for name in names:
            kill_namespace(name)


def kill_namespace(name: str) -> None:
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    for number in found.stdout.split():
        subprocess.run(["kill", "-9", number], capture_output=True)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
