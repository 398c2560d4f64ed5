"""Reads the tensors of a checkpoint from a file, the official release or the Hub. Nothing is ever unpickled."""

import argparse
import collections
import difflib
import hashlib
import http.client
import json
import logging
import pathlib
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError

from ..variants import VARIANTS
from .rename import ConversionError, StateDict, add_base_prefix, quote

logger = logging.getLogger(__name__)

_FILE_ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_JSON_FILES = ("config.json", "preprocessor_config.json")
_WRAPPERS = ("state_dict", "model")  # mmcv and timm; the official training code
_PREFIXES = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel; torch.compile; Lightning


class _StandIn:
    """In the place of everything of NumPy and mmengine that a checkpoint may hold beside its tensors.

    Nobody needs these values here. NumPy's own types must not be read: `dtype.__setstate__` believes the flags that it
    is given, and a scalar of a dtype that claims to hold objects takes bytes of the file for an address in memory.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _no_method(*_: Any) -> None:
    """In the place of `getattr`, by which mmengine's history names its own methods: nothing is looked up."""


# NumPy's dtypes, scalars and arrays by their names in version 2 and before, and mmengine's history of a logged value.
_INERT = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.dtypes.{name}" for name in np.dtypes.__all__),
)
# What training programs put beside the weights, and what runs nothing when it is read.
_HARMLESS = [
    argparse.Namespace,  # the arguments of the released code
    collections.defaultdict,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    *((_StandIn, name) for name in _INERT),
    (_no_method, "builtins.getattr"),
    (_no_method, "__builtin__.getattr"),
]


@dataclass(frozen=True)
class Checkpoint:
    """
    Attributes:
        source: Where it came from, as a model card says it.
        path: The file.
        weights: Its tensors, by the names that they have in the file, without wrappers and common prefixes; those of a
            bare model or backbone of transformers by the names that a classifier gives them.
        config: `config.json` beside the weights, empty if there is none.
        preprocessor: `preprocessor_config.json` beside the weights, empty if there is none.
        set_aside: What else the file holds: optimiser, epoch, EMA weights.
        class_names: Those that mmdetection and mmsegmentation put beside the weights, without blanks around them.
    """

    source: str
    path: Path
    weights: StateDict
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    set_aside: tuple[str, ...]
    class_names: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint(name: str) -> Checkpoint:
    """Finds and reads a checkpoint.

    Args:
        name: A file, the name of a variant (its official release is downloaded), or a repo id of the Hub.

    Raises:
        ConversionError: If there is no such checkpoint, or it is not one that can be read safely.
    """
    path = Path(name).expanduser()
    if name in VARIANTS and not path.is_file():
        return _read_release(name)
    if path.is_dir():
        files = quote(file.name for file in path.iterdir() if file.suffix in _FILE_ENDINGS) or "none"
        raise ConversionError(f"`CHECKPOINT` must be a file, got the directory {name}. Checkpoints in it: {files}.")
    if path.exists():
        # The files of a folder saved by `save_pretrained` belong together; those around a lone `.pth` do not.
        beside = path.parent if path.name in _HUB_FILES else None
        return _read(path.name, path, *(read_json(beside and beside / file) for file in _JSON_FILES))
    if path.suffix in _FILE_ENDINGS:
        raise ConversionError(f"`CHECKPOINT` is {name}, and there is no such file.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _read_from_hub(name)
    nearest = difflib.get_close_matches(name, VARIANTS) or list(VARIANTS)
    raise ConversionError(
        f"`CHECKPOINT` must be a file, a variant or a repo id of the Hub (`owner/name`), got {name!r}. "
        f"Nearest variants: {', '.join(nearest)}."
    )


def read_json(path: Path | None) -> dict[str, Any]:
    if path is None or not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold an object, got {content!r:.40}.")
    return content


def _read_release(name: str) -> Checkpoint:
    url = VARIANTS[name].checkpoint_url
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}.pth"
    downloaded = not path.exists()
    if downloaded:
        path.parent.mkdir(parents=True, exist_ok=True)
        logger.info("Downloading %s to %s", url, path)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except (OSError, http.client.HTTPException) as error:
            raise ConversionError(f"{url} could not be downloaded: {error}") from error
    try:
        return _read(url, path, {}, {})
    except ConversionError as error:
        if downloaded:
            path.unlink()
            raise ConversionError(
                f"The download of {url} is damaged and was deleted; run this again. {error}"
            ) from error
        raise ConversionError(f"{error} It was downloaded earlier: delete it and run this again.") from error


def _read_from_hub(repo: str) -> Checkpoint:
    def fetch(file: str) -> Path | None:
        try:
            return Path(HfApi().hf_hub_download(repo, file))
        except RemoteEntryNotFoundError:
            return None
        except Exception as error:  # a repository that is missing, private or out of reach; the message says which
            raise ConversionError(f"{file} of {repo} could not be downloaded from the Hub: {error}") from error

    path = next((path for path in map(fetch, _HUB_FILES) if path), None)
    if path is None:
        raise ConversionError(f"{repo} on the Hub has none of {', '.join(_HUB_FILES)}.")
    return _read(f"{HfApi().endpoint}/{repo}", path, *(read_json(fetch(file)) for file in _JSON_FILES))


def _read(source: str, path: Path, config: dict[str, Any], preprocessor: dict[str, Any]) -> Checkpoint:
    loaded, set_aside = load_file(path), []
    class_names, unwrapped = _class_names(loaded.get("meta")), set()
    while wrapper := next((key for key in _WRAPPERS if isinstance(loaded.get(key), dict) and loaded[key]), None):
        if id(loaded) in unwrapped:
            raise ConversionError(f"{path} is refused: its {wrapper!r} holds itself.")
        unwrapped.add(id(loaded))
        set_aside += [str(key) for key in loaded if key != wrapper]
        loaded = loaded[wrapper]
    if "n_averaged" in loaded:  # the counter of torch.optim.swa_utils.AveragedModel
        loaded = {key: value for key, value in loaded.items() if key != "n_averaged"}
        set_aside.append("n_averaged")
    if other := [str(key) for key, value in loaded.items() if not (isinstance(key, str) and _is_plain(value))]:
        raise ConversionError(
            f"{path} holds other things than plain tensors with names, and no {' or '.join(map(repr, _WRAPPERS))} "
            f"around them: {quote(other)}."
        )
    while loaded and (prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in loaded)), None)):
        loaded = {key.removeprefix(prefix): value for key, value in loaded.items()}
    return Checkpoint(source, path, add_base_prefix(loaded), config, preprocessor, tuple(set_aside), class_names)


def _check_checksums(path: Path) -> None:
    """Raises a `ConversionError` if a zip file claims more content than it has, or other checksums."""
    with zipfile.ZipFile(path) as archive:
        # `torch.save` compresses nothing. What unpacks to more than the file holds could be read for hours.
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise ConversionError(f"{path} is refused: it claims more content than the file has.")
        if damaged := archive.testzip():
            raise ConversionError(f"{path} is damaged: {damaged!r} in it does not have the checksum that it states.")


def _class_names(meta: Any) -> tuple[str, ...]:
    """`CLASSES` of mmdetection 2 and mmsegmentation 0, or `dataset_meta` of the versions after them."""
    meta = meta if isinstance(meta, dict) else {}
    later = meta.get("dataset_meta")
    later = later if isinstance(later, dict) else {}
    names = meta.get("CLASSES") or later.get("classes") or later.get("CLASSES")
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(name.strip() for name in names)


def _is_plain(value: Any) -> bool:
    """Whether this is a tensor with ordinary numbers: not sparse, not quantised to 8 bits, not without content."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return not value.is_complex() and not (value.is_floating_point() and value.dtype.itemsize < 2)


def load_file(path: Path) -> dict[str, Any]:
    """What is in a `.safetensors` file or, without running its code, in a file of `torch.save`.

    The kind is told from the first bytes, not from the name, and the tensors stay on the disk until they are used.

    Raises:
        ConversionError: If the file is neither, is damaged, or wants to run code.
    """
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not start:
        raise ConversionError(f"{path} is empty.")
    if text.startswith((b"<!", b"<html", b"<?xml")):
        raise ConversionError(f"{path} is an HTML page, not a checkpoint: the page of a download was saved instead.")
    if text.startswith(b"version https://git-lfs"):
        raise ConversionError(f"{path} is a Git LFS pointer, not the checkpoint: run `git lfs pull`.")
    try:
        if start[8:9] == b"{":
            return safetensors.torch.load_file(path)
        is_zip = start.startswith(b"PK")
        if not is_zip and not start.startswith(b"\x80"):
            raise ConversionError(f"{path} is neither a file of `torch.save` nor a `.safetensors` file.")
        if path.suffix == ".safetensors":
            raise ConversionError(f"{path} is a pickle of `torch.save` under the name of a `.safetensors` file.")
        if is_zip:  # torch does not look at the checksums of what it maps into memory
            _check_checksums(path)
        with torch.serialization.safe_globals(_HARMLESS):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise ConversionError(
                f"{path} is refused: it is a pickle that asks for `{wanted[1]}`, and reading that could run code "
                "here. Only tensors and a few harmless types are read. Save its `state_dict()` where you trust it."
            ) from error
        # torch's own sentence advises to read the file in a way that runs its code.
        reason = re.search(r"WeightsUnpickler error: (.+)", str(error))
        raise ConversionError(f"{path} is refused or damaged: {reason[1] if reason else 'no valid pickle'}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, SafetensorError, zipfile.BadZipFile) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{path} is truncated or damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, dict):
        raise ConversionError(f"{path} must hold a dictionary of tensors, got {type(loaded).__name__}.")
    return loaded
