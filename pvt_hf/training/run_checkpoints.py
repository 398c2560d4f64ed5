"""Checkpoints of a training run that are complete or not there."""

import fnmatch
import functools
import hashlib
import json
import os
import re
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import logging

from ..untrusted import (
    STORAGES,
    Call,
    Storage,
    UntrustedFileError,
    check_archive,
    check_regular_file,
    parse_storage,
    read_json_object,
    read_pickle,
)
from ..writing.text import escape_control

logger = logging.get_logger(__name__)

_LIST, _PARTIAL = "complete.json", "complete.json.partial"
_CHECKSUM = "xxh3_128"
_RUN = "run.json"
# Patterns of the files that an exact resume reads, at least one of each.
_NEEDED = {
    _RUN: f"{_RUN}",
    TRAINER_STATE_NAME: "state of the trainer",
    "*model*": "weights",
    "optimizer*": "state of the optimiser",
    SCHEDULER_NAME: "state of the schedule",
    "rng_state*.pth": "state of the random generators",
}
_NEVER_READ = "training_args.bin"
# What Trainer's states have, those of NumPy's random generator below.
_GLOBALS = (
    "collections.OrderedDict",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "_codecs.encode",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
)
# What zipfile, torch and safetensors raise for files that are not what they say.
_DAMAGE = (EOFError, LookupError, OSError, RuntimeError, SafetensorError, ValueError, struct.error, zipfile.BadZipFile)
# Nanoseconds within which two writes may have one time: a file that was just written may have changed since.
_TICK = 2 * 10**9
_WORDS = 624  # of 32 bits, in the state of NumPy's random generator


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or cannot be resumed from. The message says what there is instead."""

    def __init__(self, message: object):
        super().__init__(escape_control(" ".join(str(message).splitlines())))


def incompleteness(checkpoint: str | Path) -> str | None:
    """Why a checkpoint is not complete, in words; `None` if it is: all is there that an exact resume reads, and nothing
    else that `Trainer` would read, and every file has the size and the checksum that it had in the end."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / _LIST).exists():
        return "it was interrupted while it was written, or another program wrote it"
    try:
        return _find_damage(folder)
    except UntrustedFileError as error:
        return f"{_LIST} {str(error).removesuffix('.')}"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"


def recall_incompleteness(checkpoint: str | Path) -> str | None:
    """As [`incompleteness`], which is not asked again in this process about files that have not changed since: a run
    that resumes asks several times, and checkpoints are large."""
    folder = Path(checkpoint)
    try:
        files = tuple(sorted((str(path), *_identify(path)) for path in folder.rglob("*") if path.is_file()))
    except OSError:
        return incompleteness(folder)
    changed = max((modified for *_, modified in files), default=0)
    if time.time_ns() - changed < _TICK:
        return incompleteness(folder)
    return _judge(folder.absolute(), files)


def _identify(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=16)
def _judge(folder: Path, files: tuple[Any, ...]) -> str | None:
    return incompleteness(folder)


def _find_damage(folder: Path) -> str | None:
    files, replaced = _read_list(folder)
    found = _list_files(folder)
    if lacking := [what for pattern, what in _NEEDED.items() if not fnmatch.filter(files, pattern)]:
        return f"{_LIST} lists no {' and no '.join(lacking)}"
    if others := [name for name in found if name not in files and Path(name).suffix in _READ_ENDINGS]:
        return f"{others[0]} is not in the list of its files"
    for name, expected in files.items():
        if name not in found:
            return f"{name} is missing"
        actual = _describe_file(folder / name)
        if actual not in (expected, replaced.get(name)):
            what = "checksum" if actual["size"] == expected["size"] else "size"
            return f"{name} is damaged: it has another {what} than when it was written"
    return None


def _read_list(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Size and checksum of every file in the end, and those that a file had before it was replaced."""
    content = read_json_object(folder / _LIST)
    files, replaced = content.get("files"), content.get("replaced", {})
    if not isinstance(files, dict) or not isinstance(replaced, dict):
        raise UntrustedFileError(f"must say `files`, an object, got {list(content)!r:.200}.")
    for name, entry in (files | replaced).items():
        is_entry = isinstance(entry, dict) and entry.keys() == {"size", _CHECKSUM}
        if not is_entry or type(entry["size"]) is not int or not isinstance(entry[_CHECKSUM], str):
            raise UntrustedFileError(f"must say `size`, an integer, and `{_CHECKSUM}`, of {name!r:.200}.")
    return files, replaced


def _list_files(folder: Path) -> list[str]:
    """The names of all files that a list is of."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in found if name not in (_LIST, _PARTIAL)]


def _describe_file(path: Path) -> dict[str, Any]:
    import xxhash  # what `datasets` needs too: as fast as memory, where a disk's errors are to be seen

    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
        return {"size": os.fstat(file.fileno()).st_size, _CHECKSUM: checksum}


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run, if there is one. Those that are passed over are logged."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if (reason := recall_incompleteness(folder)) is None:
            return str(folder)
        logger.warning(f"{folder} is not used: {reason}.")
    return None


def mark_incomplete(checkpoint: str | Path) -> None:
    """Before a folder is written again."""
    (Path(checkpoint) / _LIST).unlink(missing_ok=True)


def mark_complete(checkpoint: str | Path, run: dict[str, Any]) -> None:
    """Everything reaches the disk, and then, by an atomic write, the list of files with their sizes and checksums.

    Args:
        checkpoint: The folder.
        run: What [`read_run`] shall return.
    """
    folder = Path(checkpoint)
    (folder / _RUN).write_text(json.dumps(run))
    files = _list_files(folder)
    for name in files:
        _sync(folder / name)
    _write_list(folder, {"files": {name: _describe_file(folder / name) for name in files}})


def replace_file(checkpoint: str | Path, name: str, content: str) -> None:
    """Replaces a file of a complete checkpoint, which is complete at every moment.

    Args:
        checkpoint: The folder.
        name: Of the file.
        content: Its text.
    """
    folder = Path(checkpoint)
    files, _ = _read_list(folder)
    partial = folder / f"{name}.partial"
    partial.write_text(content)
    _sync(partial)
    replaced, files[name] = {name: files[name]}, _describe_file(partial)
    _write_list(folder, {"files": files, "replaced": replaced})
    partial.replace(folder / name)
    _write_list(folder, {"files": files})


def _write_list(folder: Path, content: dict[str, Any]) -> None:
    (folder / _PARTIAL).write_text(json.dumps(content, indent=1))
    _sync(folder / _PARTIAL)
    (folder / _PARTIAL).replace(folder / _LIST)


def _sync(path: Path) -> None:
    """What a file has reaches the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_run(checkpoint: str | Path) -> dict[str, Any]:
    """What the run that wrote a checkpoint was like.

    Raises:
        CheckpointError: If the checkpoint is not complete.
    """
    if reason := recall_incompleteness(checkpoint):
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint: {reason}.")
    file = Path(checkpoint) / _RUN
    try:
        run = read_json_object(file)
    except UntrustedFileError as error:
        raise CheckpointError(f"{file} {error}") from error
    kinds: dict[str, tuple[type, str]] = dict.fromkeys(("layout", "run"), (dict, "an object"))
    kinds |= dict.fromkeys(("skipped", "step offset", "last logged step"), (int, "an integer"))
    kinds |= {"unlogged loss": (float, "a number")}
    for name, (kind, wanted) in kinds.items():
        if type(run.get(name)) is not kind:
            raise CheckpointError(f"{file} must say `{name}`, {wanted}, got {run!r:.200}.")
    return run


def check_states(checkpoint: str | Path) -> None:
    """Looks at weights and at the states of optimiser, schedule and random generators before `Trainer` reads them.

    torch makes NumPy's types of what a file says about them, and does not look at the sizes that one states: a forged
    file writes to memory, reads beyond its end, or takes all of it.

    Raises:
        CheckpointError: For a file that is damaged, or has what `Trainer` does not write.
    """
    for path in sorted(Path(checkpoint).rglob("*")):
        if path.name == _NEVER_READ or path.is_dir():
            continue
        try:
            check_regular_file(path)
            _CHECKS.get(path.suffix, lambda _: None)(path)
        except UntrustedFileError as error:
            raise CheckpointError(f"{path} {error}") from error
        except _DAMAGE as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{path} is truncated or damaged: {reason}") from error


def _check_weights(path: Path) -> None:
    with safe_open(path, framework="pt"):  # which looks at the header, and whether all that it lists is there
        pass


def _list_sizes(archive: torch._C.PyTorchFileReader, path: Path) -> dict[str, int]:
    """The bytes of each record of a file, as torch sees them."""
    if hasattr(archive, "get_record_size"):
        return {name: archive.get_record_size(name) for name in archive.get_all_records()}
    with zipfile.ZipFile(path) as checked:  # before torch 2.12 a record has to be read, which must not fill the memory
        check_archive(checked, path.stat().st_size)
    return {name: len(archive.get_record(name)) for name in archive.get_all_records()}


def _check_state(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # as torch tells what it reads
            raise UntrustedFileError("is refused: Trainer writes files of torch 1.6 and later.")
    # By the reader that torch uses, so that both see the same.
    archive = torch._C.PyTorchFileReader(str(path))
    sizes = _list_sizes(archive, path)
    if sum(sizes.values()) > path.stat().st_size or len(sizes) < len(archive.get_all_records()):
        raise UntrustedFileError("is refused: it claims more content than the file has.")
    with zipfile.ZipFile(path) as checked:  # torch does not compare checksums
        check_archive(checked, path.stat().st_size)
    calls: list[Call] = []

    def note_call(name: str, arguments: tuple[Any, ...]) -> Call:
        calls.append(Call(name, arguments))
        return calls[-1]

    def load(identity: Any) -> Storage | None:
        storage = parse_storage(identity)
        if storage is None or sizes.get(f"data/{storage.key}") != storage.nbytes:
            raise UntrustedFileError("is refused: a tensor in it has another size than the file has of it.")
        return storage

    content = archive.get_record("data.pkl")
    state = read_pickle(content, _check_global, note_call, load)
    if wrong := next((call.name for call in calls if not _is_of_trainer(call)), None):
        raise UntrustedFileError(f"is refused: it calls `{wrong}` as Trainer's states do not.")
    # An array is four of them.
    if sum(not call.name.startswith("torch.") for call in calls) > 4:
        raise UntrustedFileError("is refused: it holds more of NumPy than the state of a random generator.")
    if _count_entries(state, limit := 10 * len(content)) > limit:
        raise UntrustedFileError("is refused: what it holds is nested without end.")
    if isinstance(state, dict) and "numpy" in state and not _is_numpy_state(state["numpy"]):
        raise UntrustedFileError("is refused: it holds another state of NumPy's random generator than Trainer's.")


def _check_global(name: str) -> None:
    known = name in _GLOBALS or name in STORAGES
    if not known and not isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype):
        raise UntrustedFileError(f"is refused: it asks for `{name:.200}`, which Trainer's states do not.")


def _is_of_trainer(call: Call) -> bool:
    """Whether a call has the arguments that Trainer's states have."""
    name, arguments = call.name, call.arguments
    if name == "_codecs.encode":  # how bytes are written: other codecs multiply what they are given
        return len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1"
    if name == "numpy.dtype":
        known = call.state in (None, (3, "<", None, None, None, -1, -1, 0))
        return known and arguments == ("u4", False, True)
    if name.endswith("multiarray._reconstruct"):
        return len(arguments) == 3 and arguments[1] == (0,) and _is_numpy_array(call.state)
    if name == "torch._utils._rebuild_tensor_v2":
        if len(arguments) != 6 or not isinstance(arguments[0], Storage):
            return False
        storage, offset, size, stride, *_, hooks = arguments
        return storage.start == 0 and storage.holds(offset, size, stride) and hooks == {}
    return name == "torch._utils._rebuild_parameter" and len(arguments) == 3 and isinstance(arguments[0], Call)


def _is_numpy_array(state: Any) -> bool:
    """Whether this is the state of an array of as many words as NumPy's generator has."""
    if not isinstance(state, tuple) or len(state) != 5:
        return False
    version, shape, dtype, is_fortran, content = state
    text = content.arguments[0] if isinstance(content, Call) and content.name == "_codecs.encode" else None
    is_whole = isinstance(text, str) and len(text) == 4 * _WORDS and max(text) <= "\xff"
    is_plain = isinstance(dtype, Call) and dtype.name == "numpy.dtype" and dtype.state is not None
    return is_whole and is_plain and (version, shape, is_fortran) == (1, (_WORDS,), False)


def _is_numpy_state(state: Any) -> bool:
    """Whether NumPy's generator can be given this: it does not check the position, by which it then reads."""
    if not isinstance(state, tuple) or len(state) != 5:
        return False
    name, words, position, *_ = state
    is_array = isinstance(words, Call) and words.name.endswith("multiarray._reconstruct")
    return name == "MT19937" and is_array and type(position) is int and 0 <= position <= _WORDS


def _count_entries(state: Any, limit: int) -> int:
    """How many entries a nested state has, with those that are in several places counted as often; up to `limit`."""
    waiting, count = [state], 1
    while waiting and count <= limit:
        entry = waiting.pop()
        entries = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list | tuple) else ()
        count += len(entries)
        waiting += entries if count <= limit else ()
    return count


# By the ending: what Trainer and accelerate read as weights, and what they read with torch.
_CHECKS = {".safetensors": _check_weights, ".pt": _check_state, ".pth": _check_state, ".bin": _check_state}
# Of a file that nobody listed, they might be read in place of one that is there.
_READ_ENDINGS = (*_CHECKS, ".json")
