"""How files of others are looked at before anything is made of them: pickles inertly, JSON strictly.

This needs the standard library only, because the converter, the data and the training programs read such files alike.
"""

import json
import math
import mmap
import pickletools
import stat
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

# By the name of its class: the dtype of a storage, and the bytes of an element.
STORAGES = {
    f"torch.{name}Storage": (dtype, size)
    for name, dtype, size in (
        ("Double", "float64", 8),
        ("Float", "float32", 4),
        ("Half", "float16", 2),
        ("BFloat16", "bfloat16", 2),
        ("Long", "int64", 8),
        ("Int", "int32", 4),
        ("Short", "int16", 2),
        ("Char", "int8", 1),
        ("Byte", "uint8", 1),
        ("Bool", "bool", 1),
    )
} | {"torch.storage.UntypedStorage": ("uint8", 1)}
_MAX_DIMENSIONS = 64
_MAX_KEY = 16


class UntrustedFileError(ValueError):
    """What is wrong with a file, as the rest of a sentence that begins with its name."""


def check_regular_file(path: Path) -> None:
    """Raises an [`UntrustedFileError`] unless a file can be read to its end: a pipe or a device might have none."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # a loop of links; a NUL in the name
        raise UntrustedFileError(f"cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        raise UntrustedFileError("is a directory." if stat.S_ISDIR(mode) else "is no regular file.")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Raises:
        UntrustedFileError: If there is none that can be read.
    """
    check_regular_file(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UntrustedFileError(f"cannot be read: {error}") from error


def check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Reads a zip file once, to its end.

    Args:
        archive: The file, opened.
        size: Of the file in bytes.

    Raises:
        UntrustedFileError: If it unpacks to more than it holds, which could be read for hours (`torch.save` compresses
            nothing), or if a member does not have its checksum.
    """
    if sum(member.file_size for member in archive.infolist()) > size:
        raise UntrustedFileError("is refused: it claims more content than the file has.")
    if (damaged := archive.testzip()) is not None:
        raise UntrustedFileError(f"is damaged: {damaged!r} in it does not have the checksum that it states.")


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file: no name twice in it, and no number that JSON does not have.

    Raises:
        UntrustedFileError: If it is something else.
    """
    check_regular_file(path)
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_build_object, parse_constant=_refuse_constant
        )
    except OSError as error:
        raise UntrustedFileError(f"cannot be read: {error}") from error
    except ValueError as error:
        raise UntrustedFileError(f"is not JSON: {error}") from error
    except RecursionError as error:
        raise UntrustedFileError("is not JSON that can be read: it is nested too deeply.") from error
    if not isinstance(content, dict):
        raise UntrustedFileError(f"must hold an object, got {type(content).__name__}.")
    return content


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"it has {key!r:.80} twice")
        content[key] = value
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in it")


@dataclass(eq=False, repr=False)
class Global:
    """
    Attributes:
        name: What a pickle asks for, with its module. Nothing is looked up by it.
    """

    name: str


@dataclass(eq=False, repr=False)
class Call:
    """What a pickle would have made by a call, which nobody makes.

    Attributes:
        name: Of the function or class.
        arguments: Of the call.
        state: What its attributes would be set from; `None` if they are not set.
    """

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(eq=False)
class Key:
    """
    Attributes:
        value: What stands in a pickle where a dictionary's key is a text or a small number as a rule.
    """

    value: Any = field(repr=False)


@dataclass(frozen=True)
class Storage:
    """
    Attributes:
        dtype: Of the elements, by torch's name for it.
        itemsize: Bytes of an element.
        key: Name in the file.
        numel: How many elements.
        start: First element of a part of another storage, which very old files have.
    """

    dtype: str
    itemsize: int
    key: str
    numel: int
    start: int = 0

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    def holds(self, offset: Any, size: Any, stride: Any) -> bool:
        """Whether a view lies in the storage, and shows no more elements than that has."""
        if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= _MAX_DIMENSIONS):
            return False
        if not all(type(number) is int and 0 <= number < 2**63 for number in (offset, *size, *stride)):
            return False
        if not math.prod(size):
            return True
        last = offset + sum((number - 1) * step for number, step in zip(size, stride, strict=True))
        return math.prod(size) <= self.numel and last < self.numel


def parse_storage(identity: Any) -> Storage | None:
    """The storage that a pickle of `torch.save` refers to; `None` for one of quantised or complex numbers.

    Raises:
        UntrustedFileError: If it is no reference to a storage.
    """
    if not (isinstance(identity, tuple) and len(identity) in (5, 6)):
        raise UntrustedFileError("is refused or damaged: its pickle refers to other things than tensors.")
    kind, storage, key, _, numel, *view = identity
    is_storage = kind == "storage" and isinstance(storage, Global) and isinstance(key, str)
    if not is_storage or type(numel) is not int or not 0 <= numel < 2**63:
        raise UntrustedFileError("is refused or damaged: its pickle refers to other things than tensors.")
    if storage.name not in STORAGES:
        return None
    start = 0
    if view and view[0] is not None:
        if not (isinstance(view[0], tuple) and len(view[0]) == 3):
            raise UntrustedFileError("is refused or damaged: it refers to a part of no storage.")
        _, start, size = view[0]
        if not all(type(number) is int and 0 <= number <= numel for number in (start, size)) or start + size > numel:
            raise UntrustedFileError("is refused or damaged: a part of a storage lies outside of it.")
    return Storage(*STORAGES[storage.name], key, numel, start)


def read_pickle(
    stream: bytes | IO[bytes] | mmap.mmap,
    find: Callable[[str], None],
    call: Callable[[str, tuple[Any, ...]], Any] = Call,
    load: Callable[[Any], Any] = parse_storage,
) -> Any:
    """What a pickle holds, with stand-ins for all that is not a dictionary, list, tuple, text or number.

    It knows the instructions that `torch.save` writes. The work is bounded by the number of bytes, whatever refers to
    whatever: nothing is hashed, compared or printed but texts and small numbers.

    Args:
        stream: The pickle; a file is left after its end.
        find: Is told the name of each global that the pickle asks for, and raises an [`UntrustedFileError`] for those
            that it may not have.
        call: Makes what a call of a global is read as.
        load: Makes what a reference to something outside of the pickle is read as.

    Raises:
        UntrustedFileError: If the pickle is damaged, has other instructions, or asks for what it may not have.
    """
    machine = _Machine(find, call, load)
    try:
        for instruction, argument, _ in pickletools.genops(cast(IO[bytes], stream)):
            if instruction.name not in _STEPS:
                raise UntrustedFileError(f"is refused: its pickle has {instruction.name}, which torch does not write.")
            _STEPS[instruction.name](machine, argument)
        return machine.stack.pop()
    except UntrustedFileError:
        raise
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UntrustedFileError("is refused or damaged: its pickle is no valid one.") from error


class _Machine:
    """The stack, the marked stacks below it and the memo of a pickle that is read."""

    def __init__(self, find: Callable, call: Callable, load: Callable):
        self.find, self.call, self.load = find, call, load
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def mark(self, _: None) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop_marked(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError(count)
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def name(self, argument: str) -> None:
        module, name = argument.split(" ")
        self.find(full_name := f"{module}.{name}")
        self.push(Global(full_name))

    def reduce(self, _: None) -> None:
        function, arguments = self.pop(2)
        if not isinstance(function, Global | Call) or not isinstance(arguments, tuple):
            raise TypeError(type(function))
        is_empty = function.name == "collections.OrderedDict" and not arguments
        self.push({} if is_empty else self.call(function.name, arguments))

    def build(self, _: None) -> None:
        target, state = self.pop(2)
        if isinstance(target, Call):
            if target.state is not None:
                raise UntrustedFileError(f"is refused: it sets the state of a {target.name} twice.")
            target.state = state
        self.push(target)

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Call):
            raise TypeError(type(target))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Call):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError(type(target))
        for key, value in zip(map(_as_key, items[::2]), items[1::2], strict=True):
            if key in target:
                raise UntrustedFileError(f"is refused: it has the name {key!r:.80} twice.")
            target[key] = value


def _as_key(value: Any) -> Any:
    """What a dictionary can have as a key without surprises of hash values, which nested tuples make very dear."""
    if isinstance(value, str) or (isinstance(value, int) and abs(value) < 2**31):
        return value
    items = value if isinstance(value, tuple) else ()
    if len(items) > _MAX_KEY or any(isinstance(item, tuple) for item in items):
        raise UntrustedFileError("is refused: a dictionary in it has nested keys.")
    return Key(value)


def _as_text(argument: str) -> str:
    """A text of Python 2, of which pickletools makes a letter from each byte."""
    return argument.encode("latin1").decode("utf-8", "replace")


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "STOP"), lambda machine, _: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), _Machine.push),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, index: machine.push(machine.memo[index])),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.memoize),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.reduce),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "SHORT_BINSTRING": lambda machine, argument: machine.push(_as_text(argument)),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_SET": lambda machine, _: machine.push([]),
    "MARK": _Machine.mark,
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_marked())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop(3))),
    "APPEND": lambda machine, _: machine.extend(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_marked()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_marked()),
    "GLOBAL": _Machine.name,
    "BUILD": _Machine.build,
    "BINPERSID": lambda machine, _: machine.push(machine.load(machine.pop(1)[0])),
}
