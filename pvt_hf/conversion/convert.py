"""Converts checkpoints to verified Hugging Face folders, and back: the functions behind `pvt-hf convert`."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..models.backbone import get_backbone_config
from ..models.configuration_pvt import PvtConfig
from ..variants import VARIANTS, differences, find_variant, get_variant
from ..writing.files import atomic_file, atomic_folder, name_what_fails
from ..writing.hub import list_code, register_code
from .architectures.base import Architecture, Outputs
from .architectures.registry import find_architecture, find_saved_architecture
from .checkpoint import Checkpoint, load_file, read_checkpoint, read_json
from .formats import FROM_OFFICIAL, Format, detect_format
from .infer_config import imagenet_labels
from .model_card import Conversion, render
from .output_folder import check_output_dir, check_writable
from .rename import ConversionError, StateDict, check_complete, quote
from .verify import largest_difference, reference_outputs

OFFICIAL_EPS = PvtConfig().patch_layer_norm_eps
_WRITE_FAILURES = (safetensors.SafetensorError,)


def convert(
    name: str,
    output_dir: Path,
    *,
    variant: str | None = None,
    backbone_only: bool = False,
    overwrite: bool = False,
    with_code: bool = False,
    card_name: str | None = None,
) -> Conversion:
    """Converts one checkpoint.

    Args:
        name: A file, the name of a variant or a repo id: see [`read_checkpoint`].
        output_dir: Folder to write. It appears only when it is complete and verified.
        variant: The variant that it must be.
        backbone_only: Write the backbone with its four feature maps and leave the heads.
        overwrite: Replace the folder of a former conversion.
        with_code: Write the code of the package too.
        card_name: What the model card calls the checkpoint, `output_dir` by default.

    Raises:
        ConversionError: If the checkpoint is not what it should be, or the result differs from it.
    """
    check_output_dir(output_dir, overwrite)
    source = _read_source(name, variant or (name if name in VARIANTS else None), backbone_only)
    architecture = source.architecture
    if source.checkpoint.path.resolve().is_relative_to(output_dir.resolve()):
        raise ConversionError(f"`OUTPUT_DIR` {output_dir} holds the checkpoint itself; choose another.")
    if with_code and architecture.is_native:
        raise ConversionError(
            f"`--with-code` cannot be used for a {architecture.name}: its class is transformers' own, which finds the "
            "backbone's by the Auto classes of an installed pvt_hf."
        )
    model = build_model(architecture.from_official(source.official), source.config, architecture)
    model_class, facts = type(model), _collect_facts(source, model)
    processor, processor_origin = architecture.image_processor(source.checkpoint, source.config)
    facts |= {"has_image_processor": processor is not None, "has_code": with_code}
    check = functools.partial(check_output_dir, output_dir, overwrite)
    with name_what_fails(output_dir, ConversionError, _WRITE_FAILURES), atomic_folder(output_dir, check) as folder:
        _save(folder, model, processor, architecture.auto_class.__name__ if with_code else None)
        del model  # the comparison needs its memory
        expected = _evaluate(source)
        difference = largest_difference(model_class.from_pretrained(folder), expected, architecture)
        conversion = Conversion(**facts, difference=difference, notes=_take_notes(source, processor_origin))
        render(conversion, card_name or str(output_dir)).save(folder / "README.md")
    return conversion


@dataclass(frozen=True)
class _Source:
    """A checkpoint, and what it is.

    Attributes:
        checkpoint: As it was read.
        format: Of the checkpoint.
        architecture: What it becomes.
        official: The tensors for it, with official names.
        config: Of the model that it becomes.
    """

    checkpoint: Checkpoint
    format: Format
    architecture: Architecture
    official: StateDict
    config: PreTrainedConfig


def _read_source(name: str, variant: str | None, backbone_only: bool) -> _Source:
    """Reads a checkpoint and recognizes it. Raises a `ConversionError` unless it is a PVT, and that of `variant`."""
    checkpoint = read_checkpoint(name)
    source_format = detect_format(checkpoint.weights)
    architecture = find_architecture(checkpoint.weights, source_format, backbone_only)
    official = architecture.select(source_format.to_official(checkpoint.weights))
    config = architecture.read_config(official, checkpoint.config, checkpoint.class_names)
    backbone = get_backbone_config(config)
    if source_format.patch_layer_norm_eps is not None:
        backbone.patch_layer_norm_eps = source_format.patch_layer_norm_eps
    if variant and (wrong := differences(backbone, get_variant(variant))):
        raise ConversionError(f"The checkpoint is not a {variant}: {'; '.join(wrong)}.")
    return _Source(checkpoint, source_format, architecture, official, config)


def build_model(tensors: StateDict, config: PreTrainedConfig, architecture: Architecture) -> PreTrainedModel:
    """The model with these tensors, its floating-point numbers in the widest of their dtypes.

    Raises:
        ConversionError: Unless each tensor has its place and each place its tensor.
    """
    model = architecture.build_empty(config)
    wanted = model.state_dict()
    check_complete(tensors, wanted)
    floating = {key: tensor for key, tensor in tensors.items() if wanted[key].is_floating_point()}
    if integers := [key for key, tensor in floating.items() if not tensor.is_floating_point()]:
        raise ConversionError(f"These tensors are no floating-point numbers: {quote(integers)}.")
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in floating.values()})
    storages, filled = set(), {}
    for key, tensor in tensors.items():
        tensor = tensor.to(dtype if key in floating else wanted[key].dtype)
        storage = tensor.untyped_storage()
        # `save_pretrained` refuses tensors that share memory, as the parts of a fused one do.
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        storages.add(tensor.untyped_storage().data_ptr())
        filled[key] = tensor
    model.load_state_dict(filled, assign=True)
    model.config.dtype = dtype
    return model


def _save(folder: Path, model: PreTrainedModel, processor: BaseImageProcessor | None, code_of: str | None) -> None:
    """Writes a model and its image processor, and their code too if `code_of` names the model's Auto class."""
    with register_code({} if code_of is None else list_code(code_of, model, processor)):
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)


def _evaluate(source: _Source) -> Outputs:
    """What the source's weights give for the images of the comparison. Empties its dictionaries, for their memory."""
    weights, official = source.checkpoint.weights, source.official
    if source.format.evaluate is not None:
        official.clear()
        expected = source.format.evaluate(weights, source.config, source.architecture.is_backbone)
    else:
        expected = reference_outputs(official, source.config, source.architecture)
        official.clear()
    weights.clear()
    return expected


def _collect_facts(source: _Source, model: PreTrainedModel) -> dict[str, Any]:
    """What the model card says of the source and the model."""
    return {
        "source": source.checkpoint.source,
        "sha256": source.checkpoint.sha256,
        "source_format": source.format,
        "architecture": source.architecture,
        "config": source.config,
        "variant": find_variant(get_backbone_config(source.config)),
        "model_class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tensors": len(model.state_dict()),
        "parameters": model.num_parameters(),
    }


def _take_notes(source: _Source, processor_origin: str) -> tuple[str, ...]:
    """What was decided, and is not in the checkpoint."""
    checkpoint, architecture, notes = source.checkpoint, source.architecture, []
    backbone, labels = get_backbone_config(source.config), list(source.config.id2label.values())
    if checkpoint.set_aside:
        notes.append(f"left in the file: {', '.join(checkpoint.set_aside)}")
    if find_variant(backbone) is None and "num_attention_heads" not in checkpoint.config:
        heads = ", ".join(map(str, backbone.num_attention_heads))
        notes.append(f"attention heads: {heads}, the official numbers; the checkpoint does not tell")
    if (eps := backbone.patch_layer_norm_eps) != OFFICIAL_EPS:
        notes.append(f"epsilon of the norms in patch embedding and spatial reduction: {eps:.0e}")
    if not architecture.is_backbone and labels == imagenet_labels():
        notes.append("labels: those of ImageNet-1k, as there are 1000 without other names")
    if architecture.is_dense:
        origin = "the checkpoint's own" if checkpoint.class_names else "by their number, as the checkpoint has no names"
        notes.append(f"labels: {', '.join(labels[:3])}, ... ({len(labels)}; {origin})")
    return (*notes, f"image processor: {processor_origin}", f"sha256: {checkpoint.sha256}, {checkpoint.hash_check}")


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        tensors: How many.
        notes: What the file cannot say.
    """

    tensors: int
    notes: tuple[str, ...]


def export(saved_dir: Path, file: Path, to: str, overwrite: bool = False) -> Export:
    """Writes the tensors of a folder saved by `save_pretrained` with the names of another format.

    Args:
        saved_dir: Folder with `config.json` and `model.safetensors`.
        file: To write: with the ending `.safetensors` that format, else a plain state dict of `torch.save`.
        to: One of `FROM_OFFICIAL`: `"official"` or `"timm"` (v2 only).
        overwrite: Replace `file`.

    Raises:
        ConversionError: If the folder does not hold a complete PVT, or `file` exists and `overwrite` is not set.
    """
    _check_export(saved_dir, file, overwrite)
    known = read_json(saved_dir / "config.json")
    architecture = find_saved_architecture(known, load_file(saved_dir / "model.safetensors"))
    backbone = known.get("backbone_config") or known
    if not isinstance(backbone, dict):
        raise ConversionError(f"{saved_dir / 'config.json'} has `backbone_config` {backbone!r:.80}: no object.")
    tensors = FROM_OFFICIAL[to](architecture.read_saved(saved_dir, known))
    _write_state_dict(tensors, file)
    eps = backbone.get("patch_layer_norm_eps", OFFICIAL_EPS)
    note = f"the weights were trained with patch_layer_norm_eps {eps:.0e}, which no such file can say."
    return Export(len(tensors), (note,) if eps != OFFICIAL_EPS else ())


def _check_export(saved_dir: Path, file: Path, overwrite: bool) -> None:
    check_writable(file, "FILE")
    if missing := [name for name in ("config.json", "model.safetensors") if not (saved_dir / name).is_file()]:
        raise ConversionError(f"`SAVED_DIR` must be a folder of `save_pretrained`, but {saved_dir} has no {missing}.")
    if file.resolve().is_relative_to(saved_dir.resolve()):
        raise ConversionError(f"`FILE` {file} would lie in `SAVED_DIR` {saved_dir}; choose another place.")
    if file.exists() and not file.is_file():  # a directory, a device
        raise ConversionError(f"`FILE` {file} exists, and is no regular file.")
    if file.exists() and not overwrite:
        raise ConversionError(f"`FILE` {file} exists; use --overwrite.")


def _write_state_dict(tensors: StateDict, file: Path) -> None:
    """Atomically, in the format that the ending of `file` says."""
    with name_what_fails(file, ConversionError, _WRITE_FAILURES), atomic_file(file) as path:
        if file.suffix == ".safetensors":
            safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
            return
        try:
            torch.save(tensors, path)
        except RuntimeError as error:  # of a full disk too, without a word of it
            raise OSError(f"torch's writer failed ({error})") from error
