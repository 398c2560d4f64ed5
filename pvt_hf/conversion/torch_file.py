"""Reads the tensors of a file of `torch.save`. Nothing that the file asks for is called, or even looked up."""

import mmap
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..untrusted import Call, Global, Storage, UntrustedFileError, check_archive, parse_storage, read_pickle

_MAGIC_NUMBER, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the files before torch 1.6
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a member of a zip file: the lengths of its name and of its extra fields
# What training programs put beside the weights. A stand-in takes its place.
_STAND_INS = re.compile(
    r"""
    _codecs\.encode | argparse\.Namespace | collections\.\w+ | datetime\.\w+ | pathlib\.\w+ | typing\.\w+
    | (builtins|__builtin__)\.(getattr|set|frozenset|bytearray|complex|slice|range|object
        |bool|int|float|str|bytes|list|tuple|dict)
    | numpy\.(dtype|ndarray|dtypes\.\w+|_?core\.multiarray\.(scalar|_reconstruct))
    | mmengine\.(logging\.history_buffer\.HistoryBuffer|config\.[\w.]*ConfigDict) | addict\.[\w.]+
    | (pytorch_lightning|lightning|lightning_fabric|torchmetrics|omegaconf)\.[\w.]+
    """,
    re.VERBOSE,
)
_TENSOR_PARTS = re.compile(
    r"""
    torch\.(_utils\._rebuild_\w+ | _tensor\._rebuild_from_type_v2 | serialization\._get_layout | Size | device
    | ((cuda|sparse|storage)\.)?\w*(Storage|Tensor) | nn\.parameter\.(Parameter|Buffer) | nested\.[\w.]+)
    """,
    re.VERBOSE,
)
_REBUILD_TENSOR = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_REBUILD_PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")


def read_torch_file(path: Path, is_zip: bool) -> Any:
    """What is in a file of `torch.save`. Plain tensors stay on the disk until they are used; of everything else that is
    no dictionary, list, tuple, text or number there are stand-ins.

    Args:
        path: The file.
        is_zip: Whether it is one of torch 1.6 or later.

    Raises:
        UntrustedFileError: If it is damaged, or asks for what has no place beside weights.
    """
    return _read_zip(path) if is_zip else _read_legacy(path)


def _check_global(name: str) -> None:
    is_dtype = isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype | torch.qscheme)
    if not (is_dtype or _STAND_INS.fullmatch(name) or _TENSOR_PARTS.fullmatch(name)):
        raise UntrustedFileError(
            f"is refused: it is a pickle that asks for `{name:.200}`, and reading that could run code elsewhere. Only "
            "tensors and a few harmless types are read. Where you trust the file, save its weights alone: "
            "`torch.save(checkpoint['state_dict'], 'weights.pth')`, or the `state_dict()` of a whole model."
        )


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        check_archive(archive, path.stat().st_size)
        _check_members(archive.infolist())
        pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1 or f"{(root := pickles[0].removesuffix('data.pkl'))}constants.pkl" in members:
            raise UntrustedFileError("is a zip file, but none of `torch.save`: a program of TorchScript, perhaps.")
        content = archive.read(pickles[0])
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in members else b"little"

    whole = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)

    def open_storage(storage: Storage) -> torch.UntypedStorage:
        member = members.get(f"{root}data/{storage.key}")
        if member is None or member.file_size != storage.nbytes:
            raise UntrustedFileError(
                f"is damaged: it has {member.file_size if member else 'none'} of the {storage.nbytes} bytes of a "
                f"tensor, {storage.key!r:.80}."
            )
        header = bytes(whole[member.header_offset : member.header_offset + _LOCAL_HEADER.size])
        start = member.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header))
        return _part(whole, start, storage)

    return read_pickle(content, _check_global, _tensor_builder(open_storage, order.strip() == b"big"))


def _check_members(members: list[zipfile.ZipInfo]) -> None:
    if len({member.filename for member in members}) < len(members):
        raise UntrustedFileError("is refused: a name in its archive is there twice.")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UntrustedFileError("is refused: its archive is compressed, which those of `torch.save` are not.")


def _read_legacy(path: Path) -> Any:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        if read_pickle(stream, _check_global) != _MAGIC_NUMBER:
            raise UntrustedFileError("is a pickle, but none of `torch.save`.")
        protocol, system = (read_pickle(stream, _check_global) for _ in range(2))
        if protocol != _PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
            raise UntrustedFileError("is damaged, or of a version of `torch.save` or a machine that is not known.")
        position = stream.tell()
        storages: dict[str, Storage] = {}

        def note_storage(identity: Any) -> Storage:
            if (storage := parse_storage(identity)) is None:
                raise UntrustedFileError("holds other things than plain tensors: quantised or complex numbers.")
            return storages.setdefault(storage.key, storage)

        read_pickle(stream, _check_global, load=note_storage)  # the tensors come after it
        starts = _find_storages(stream, storages)
        whole = torch.UntypedStorage.from_file(str(path), False, len(stream))

        def open_storage(storage: Storage) -> torch.UntypedStorage:
            if storage.key not in starts or storages[storage.key].nbytes != storage.nbytes:
                raise UntrustedFileError(f"is damaged: it lacks a tensor, {storage.key!r:.80}.")
            return _part(whole, starts[storage.key], storage)

        stream.seek(position)
        return read_pickle(stream, _check_global, _tensor_builder(open_storage))


def _find_storages(stream: mmap.mmap, storages: dict[str, Storage]) -> dict[str, int]:
    """Where each storage of a legacy file begins: after its number of elements."""
    keys, starts = read_pickle(stream, _check_global), {}
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise UntrustedFileError("is damaged: it holds other tensors than it says.")
    for key in keys:
        storage, numel = storages[key], int.from_bytes(stream.read(8), "little")
        starts[key] = stream.tell()
        if numel != storage.numel or starts[key] + storage.nbytes > len(stream):
            raise UntrustedFileError(f"is truncated or damaged: a tensor in it, {key!r:.80}, is not complete.")
        stream.seek(storage.nbytes, 1)
    return starts


def _part(whole: torch.UntypedStorage, start: int, storage: Storage) -> torch.UntypedStorage:
    """The bytes of a storage, which are copied only if they do not lie where numbers of that size may."""
    if start + storage.nbytes > whole.nbytes():
        raise UntrustedFileError(f"is truncated or damaged: a tensor in it, {storage.key!r:.80}, is not complete.")
    part = whole[start : start + storage.nbytes]
    return part.clone() if start % storage.itemsize else part


def _tensor_builder(
    open_storage: Callable[[Storage], torch.UntypedStorage], is_big_endian: bool = False
) -> Callable[[str, tuple[Any, ...]], Any]:
    """What makes the plain tensors of a pickle, and stand-ins of all that it calls beside."""
    opened: dict[str, torch.UntypedStorage] = {}

    def open_once(storage: Storage) -> torch.UntypedStorage:
        if storage.key not in opened:
            opened[storage.key] = open_storage(storage)
            if is_big_endian:
                opened[storage.key].byteswap(getattr(torch, storage.dtype))
        return opened[storage.key]

    def build(name: str, arguments: tuple[Any, ...]) -> Any:
        if name == "torch._tensor._rebuild_from_type_v2" and len(arguments) == 4:  # of a tensor with attributes
            function, kind, inner, _ = arguments
            is_plain = getattr(kind, "name", None) in ("torch.Tensor", "torch.nn.parameter.Parameter")
            if is_plain and isinstance(function, Global) and isinstance(inner, tuple):
                name, arguments = function.name, inner
        if name in _REBUILD_PARAMETER and arguments:
            return arguments[0]
        if name not in _REBUILD_TENSOR or len(arguments) < 4 or not isinstance(arguments[0], Storage):
            return Call(name, arguments)
        storage, offset, size, stride = arguments[:4]
        if type(offset) is not int or not storage.holds(storage.start + offset, size, stride):
            raise UntrustedFileError("is refused or damaged: a tensor in it claims more numbers than the file has.")
        empty = torch.empty(0, dtype=getattr(torch, storage.dtype))
        return empty.set_(open_once(storage), storage.start + offset, size, stride)

    return build
