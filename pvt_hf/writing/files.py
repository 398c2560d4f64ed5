"""Files and folders that appear when they are complete. What a killed program leaves, the next one clears."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock

_FORMER = "former"  # in a hidden folder: somebody's, on its way out; it is not cleared
_HIDDEN, _LOCK = ".pvt_hf-", "lock"
# It is another's; or the file system has none, where nothing is cleared.
_NO_LOCK = (OSError, NotImplementedError)
_LONGEST_NAME = 255  # bytes, of most file systems


@contextmanager
def hidden_folder(parent: Path) -> Iterator[Path]:
    """A folder on the same disk as what is to be written. It disappears in the end, whatever happens.

    Those of killed programs are deleted first. Which they are, their locks tell, which end with a process.

    Args:
        parent: Where it is; made if it is not there, and in case of an error unmade.
    """
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{_HIDDEN}*"):
        with suppress(*_NO_LOCK), FileLock(left / _LOCK, timeout=0):
            if not (left / "new" / _FORMER).exists():
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_HIDDEN, dir=parent))
    try:
        try:
            with ExitStack() as held:
                with suppress(*_NO_LOCK):
                    held.enter_context(FileLock(folder / _LOCK))
                (folder / "new").mkdir()
                yield folder / "new"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        with suppress(OSError):  # others may have written there meanwhile
            for empty in made:
                empty.rmdir()
        raise


@contextmanager
def atomic_file(file: str | Path) -> Iterator[Path]:
    """A path to write to. If all goes well, what is there replaces `file`, else `file` stays as it was.

    Args:
        file: To be written; its name, and so its ending, is also that of the path.
    """
    target = Path(file).resolve()  # through links
    with hidden_folder(target.parent) as folder:
        yield folder / target.name
        (folder / target.name).replace(target)


@contextmanager
def atomic_folder(folder: str | Path, check: Callable[[], None]) -> Iterator[Path]:
    """A folder to write to. If all goes well, it takes the place of `folder`, else it disappears.

    Args:
        folder: To be written.
        check: Raises an error if what is there in the end must not be replaced: the writing took a while.
    """
    target = Path(folder).resolve()  # through links
    with hidden_folder(target.parent) as hidden:
        new, former = hidden / "new", hidden / _FORMER
        new.mkdir()
        yield new
        check()
        try:
            if target.exists():
                target.rename(former)
            new.rename(target)
        except BaseException:
            if former.exists():
                former.rename(target)
            raise


@contextmanager
def name_what_fails(
    path: Path, error_class: type[Exception], failures: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Makes of what a writer raises an error that names what was to be written, and says that nothing is left.

    Args:
        path: To be written.
        error_class: Of the error.
        failures: What a writer raises beside an `OSError`.
    """
    try:
        yield
    except (OSError, *failures) as error:
        reason = explain_write_error(error, path.parent)
        raise error_class(f"{path} could not be written: {reason}. Nothing is left there.") from error


def why_unwritable(path: str | Path) -> str | None:
    """Why no file or folder can be made at a path, in words; `None` if one can, or is there.

    Args:
        path: Of a file or folder that need not exist, nor need its parents.
    """
    if "\0" in str(path):
        return "a name cannot have a NUL byte"
    longest = max((len(os.fsencode(name)) for name in Path(path).parts), default=0)
    if longest > _LONGEST_NAME:
        return f"a name of {longest} bytes is longer than the {_LONGEST_NAME} of most file systems"
    try:
        os.stat(path)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            return str(error.strerror)
    resolved = Path(path).resolve()
    folder = next(parent for parent in (*resolved.parents, resolved) if parent.exists())  # of / itself
    if not folder.is_dir():
        return f"{folder} is no folder"
    effective = os.access in os.supports_effective_ids
    if os.access(folder, os.W_OK | os.X_OK, effective_ids=effective):
        return None
    return f"{folder} is read-only, or not yours to write to"


def explain_write_error(error: Exception, folder: str | Path) -> str:
    """What went wrong when a file was written, in a line, with the space that is left: not every writer says that.

    Args:
        error: Of any of them.
        folder: Where it was, or would have been.
    """
    there = next(path for path in (Path(folder).resolve(), *Path(folder).resolve().parents) if path.exists())
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, RuntimeError):
        reason = f"torch's writer failed, {reason}"
    free = shutil.disk_usage(there).free / 2**20
    return f"{'the disk is full: ' if free < 1 else ''}{reason} ({free:.0f} MiB are free there)"
