"""Disks that are full, and folders of others."""

import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def full_disk(room: int = 20_000) -> Iterator[None]:
    """While it lasts, every writer of this process, whatever it is written in, fails after so many bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def read_only_folder() -> Iterator[Path]:
    """A folder in which nobody may write: not even root, who is somebody else while it lasts."""
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        try:
            if is_root:
                os.seteuid(65534)
            yield Path(folder)
        finally:
            if is_root:
                os.seteuid(0)
            os.chmod(folder, 0o755)
