"""Reads the tensors of a checkpoint from a file, the official release or the Hub. Nothing is ever unpickled."""

import difflib
import hashlib
import http.client
import logging
import os
import re
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError

from ..untrusted import UntrustedFileError, check_regular_file, read_json_object
from ..variants import VARIANTS
from ..writing.hub import hide_secrets
from .rename import ConversionError, StateDict, add_base_prefix, quote
from .torch_file import read_torch_file

logger = logging.getLogger(__name__)

_FILE_ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_JSON_FILES = ("config.json", "preprocessor_config.json")
_WRAPPERS = ("state_dict", "model")  # mmcv, timm and Lightning; the official training code
_PREFIXES = r"\A(module\.|_orig_mod\.|model\.|net\.)*"  # DistributedDataParallel; torch.compile; Lightning
_MAX_LISTED = 20
# The start of a file's own sha256 at the end of its name: what torch.hub, timm and the mm* libraries publish.
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+")
# How files begin that were taken for checkpoints, in small letters, and what to do.
_OTHER_FILES = (
    ((b"<!", b"<html", b"<?xml"), "is an HTML page, not a checkpoint: the page of a download was saved instead."),
    (b"version https://git-lfs", "is a Git LFS pointer, not the checkpoint: run `git lfs pull`."),
    (
        b"{",
        "is JSON, not weights. If it is the index of several files, save them as one: "
        "`model.save_pretrained(folder, max_shard_size='10GB')`.",
    ),
)
# What zipfile, torch and safetensors raise for files that are not what they say.
_DAMAGE = (
    *(EOFError, KeyError, NotImplementedError, OSError, OverflowError, RuntimeError, ValueError),
    *(SafetensorError, struct.error, zipfile.BadZipFile),
)


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
        sha256: Of the file.
        hash_check: What that was compared with, in words.
        class_names: Those that mmdetection and mmsegmentation put beside the weights, without blanks around them.
    """

    source: str
    path: Path
    weights: StateDict
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    set_aside: tuple[str, ...]
    sha256: str
    hash_check: str
    class_names: tuple[str, ...] = ()


def read_checkpoint(name: str) -> Checkpoint:
    """Finds and reads a checkpoint.

    Args:
        name: A file, the name of a variant (its official release is downloaded), or a repo id of the Hub.

    Raises:
        ConversionError: If there is no such checkpoint, or it is not one that can be read safely.
    """
    try:
        path = Path(name).expanduser()
        is_there, is_folder = path.exists(), path.is_dir()
        entries = [entry.name for entry in path.iterdir() if entry.suffix in _FILE_ENDINGS] if is_folder else []
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long; no such home; a closed folder
        raise ConversionError(f"`CHECKPOINT` {name:.200} cannot be read: {error}") from error
    if name in VARIANTS and not path.is_file():
        return _read_release(name)
    if is_folder:
        raise ConversionError(
            f"`CHECKPOINT` must be a file, got the directory {name}. Checkpoints in it: {quote(entries) or 'none'}."
        )
    if is_there:
        # The files of a folder saved by `save_pretrained` belong together; those around a lone `.pth` do not.
        beside = path.parent if path.name in _HUB_FILES else None
        return _read(path.name, path, [beside and beside / file for file in _JSON_FILES])
    if path.suffix in _FILE_ENDINGS:
        raise ConversionError(f"`CHECKPOINT` is {name}, and there is no such file.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name, flags=re.ASCII):
        return _read_from_hub(name)
    nearest = difflib.get_close_matches(name, VARIANTS) or list(VARIANTS)
    raise ConversionError(
        f"`CHECKPOINT` must be a file, a variant or a repo id of the Hub (`owner/name`), got {name!r:.200}. "
        f"Nearest variants: {', '.join(nearest)}."
    )


def read_json(path: Path | None) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file. Raises a `ConversionError` if it is something else."""
    if path is None or not (path.exists() or path.is_symlink()):
        return {}
    try:
        return read_json_object(path)
    except UntrustedFileError as error:
        raise ConversionError(f"{path} {error}") from error


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
        return _read(url, path)
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
            reason = hide_secrets(str(error))
            raise ConversionError(f"{file} of {repo} could not be downloaded from the Hub: {reason}") from error

    path = next((path for path in map(fetch, _HUB_FILES) if path), None)
    if path is None:
        raise ConversionError(f"{repo} on the Hub has none of {', '.join(_HUB_FILES)}.")
    beside = [fetch(file) for file in _JSON_FILES]
    for file in filter(None, beside):
        check_hash(file, _find_hub_hash(repo, file))
    source = f"{HfApi().endpoint}/{repo}"
    return _read(source, path, beside, _find_hub_hash(repo, path))


def _find_hub_hash(repo: str, path: Path) -> str:
    """The hash that the Hub states for a file that was downloaded from it; empty if it states none."""
    stored = path.resolve()
    if stored.parent.name == "blobs":  # huggingface_hub stores files by it, wherever there are links
        return stored.name
    try:
        url = hf_hub_url(repo, path.name, revision=path.parent.name, endpoint=HfApi().endpoint)
        return HfApi().get_hf_file_metadata(url=url).etag or ""
    except Exception:  # offline, or any answer of a server
        return ""


def check_hash(path: Path, hub_hash: str | None) -> tuple[str, str]:
    """Holds a file against the hash that is known of it.

    Args:
        path: The file.
        hub_hash: What the Hub states, if it is from there: sha256 of large files, git's own hash of small ones.

    Returns:
        Its sha256, and what that, or git's hash, was compared with, in words.

    Raises:
        ConversionError: If the file has another one.
    """
    stated = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", hub_hash or "")
    named = _HASH_IN_NAME.search(path.name)
    try:
        with path.open("rb") as file:
            sha256 = actual = hashlib.file_digest(file, "sha256").hexdigest()
            if stated and len(stated[0]) == 40:
                file.seek(0)
                actual = hashlib.sha1(b"blob %d\0" % path.stat().st_size + file.read()).hexdigest()
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if stated and actual != stated[0]:
        raise ConversionError(
            f"{path} is damaged: the Hub states the hash {stated[0]}, and it has {actual}. Delete {path.resolve()} and "
            "run this again."
        )
    if stated:
        return sha256, "as the Hub states"
    if named and sha256.startswith(named[1]):
        return sha256, "as its name says"
    if named and not named[1].isdigit():  # digits may be a date
        raise ConversionError(
            f"{path} is damaged: by its name, its sha256 begins with {named[1]}, and it is {sha256}. Download it "
            "again, or rename it if that is no hash."
        )
    return sha256, "compared with none: " + ("no other is known" if hub_hash is None else "the Hub states no hash")


def _read(
    source: str, path: Path, beside: Sequence[Path | None] = (None, None), hub_hash: str | None = None
) -> Checkpoint:
    """The checkpoint in a file, with the JSON files beside it: `config.json` and `preprocessor_config.json`."""
    config, preprocessor = map(read_json, beside)
    set_aside: list[Any] = []
    loaded = load_file(path)
    class_names, unwrapped = _class_names(loaded.get("meta")), set()
    while wrapper := next((key for key in _WRAPPERS if isinstance(loaded.get(key), dict) and loaded[key]), None):
        if id(loaded) in unwrapped:
            raise ConversionError(f"{path} is refused: its {wrapper!r} holds itself.")
        unwrapped.add(id(loaded))
        set_aside += [key for key in loaded if key != wrapper]
        loaded = loaded[wrapper]
    if "n_averaged" in loaded:  # the counter of torch.optim.swa_utils.AveragedModel
        loaded = {key: value for key, value in loaded.items() if key != "n_averaged"}
        set_aside.append("n_averaged")
    if other := [str(key) for key, value in loaded.items() if not (isinstance(key, str) and _is_plain(value))]:
        raise ConversionError(
            f"{path} holds other things than plain tensors with names, and no {' or '.join(map(repr, _WRAPPERS))} "
            f"around them: {quote(other)}."
        )
    # Tensors may share memory, but not so that a small file becomes a large model.
    if sum(tensor.nbytes for tensor in loaded.values()) > 2 * path.stat().st_size:
        raise ConversionError(f"{path} is refused: its tensors claim more content than the file has.")
    common = os.path.commonprefix(list(loaded))
    start = len(common) - len(re.sub(_PREFIXES, "", common))
    weights = add_base_prefix({key[start:]: tensor for key, tensor in loaded.items()})
    sha256, hash_check = check_hash(path, hub_hash)
    more = [f"{len(set_aside) - _MAX_LISTED} more"] if len(set_aside) > _MAX_LISTED else []
    listed = (f"{key!s:.80}" for key in set_aside[:_MAX_LISTED])
    return Checkpoint(source, path, weights, config, preprocessor, (*listed, *more), sha256, hash_check, class_names)


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
        check_regular_file(path)
        with path.open("rb") as file:
            start = file.read(256)
    except UntrustedFileError as error:
        raise ConversionError(f"{path} {error}") from error
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not start:
        raise ConversionError(f"{path} is empty.")
    is_safetensors, is_zip = start[8:9] == b"{", start.startswith(b"PK")
    if not (is_safetensors or is_zip or start.startswith(b"\x80")):
        text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        unknown = "is neither a file of `torch.save` nor a `.safetensors` file."
        known = (what for opening, what in _OTHER_FILES if text.startswith(opening))
        raise ConversionError(f"{path} {next(known, unknown)}")
    if not is_safetensors and path.suffix == ".safetensors":
        raise ConversionError(f"{path} is a pickle of `torch.save` under the name of a `.safetensors` file.")
    try:
        loaded = safetensors.torch.load_file(path) if is_safetensors else read_torch_file(path, is_zip)
    except UntrustedFileError as error:
        raise ConversionError(f"{path} {error}") from error
    except UnicodeEncodeError as error:  # neither library takes such a path
        raise ConversionError(f"{path} has a name that is not UTF-8: give it another.") from error
    except _DAMAGE as error:
        reason = str(error).partition("\n")[0]  # torch shows where in its source
        raise ConversionError(f"{path} is truncated or damaged: {reason}") from error
    if not isinstance(loaded, dict):
        raise ConversionError(f"{path} must hold a dictionary of tensors, got {type(loaded).__name__}.")
    return loaded
