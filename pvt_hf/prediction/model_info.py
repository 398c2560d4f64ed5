"""What a model is, from its configuration, its card and the headers of its files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, get_local_safetensors_metadata, get_safetensors_metadata, try_to_load_from_cache
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    MODEL_MAPPING,
    AutoImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_utils import PILImageResampling

from ..data.class_names import list_class_names
from ..models.backbone import get_backbone_config
from ..models.image_processing_pvt import PvtImageProcessor
from ..models.pretrained import list_tensors
from ..variants import VARIANTS, find_variant
from ..writing.text import escape_control
from .loading import ModelError, find_converted, read_config
from .predictor import find_task

logger = logging.getLogger(__name__)

# (height, width) in pixels at which models are looked at, by what they are called; of others 224 x 224.
_SIZES = {"detector": (800, 1216), "segmenter": (512, 512), "universal segmenter": (512, 512)}
# Of image processors, what says how an image is prepared.
_SETTINGS = ("size", "crop_size", "do_center_crop", "resample", "image_mean", "image_std", "do_reduce_labels")
# Of cards, what says where weights are from.
_ORIGINS = ("conversion", "base_model", "datasets", "license")


@dataclass(frozen=True)
class Stage:
    """A stage of a PVT.

    Attributes:
        stride: Pixels of the image from one token to the next, per side.
        channels: Of the feature map.
        blocks: How many.
        heads: Of the attention.
        reduction: Spatial-reduction ratio of keys and values, per side; `None` for linear attention, which pools them
            to 7 x 7.
        mlp_ratio: Width of the MLP relative to the channels.
        map_size: (height, width) of the feature map.
    """

    stride: int
    channels: int
    blocks: int
    heads: int
    reduction: int | None
    mlp_ratio: float
    map_size: tuple[int, int]


@dataclass(frozen=True)
class ModelInfo:
    """What [`inspect_model`] finds.

    Attributes:
        name: Of the model, as it was asked for.
        model_class: Which class it is.
        models: What such models are called: classifier, detector, segmenter, universal segmenter, encoder, backbone.
        variant: The released variant that its PVT is; `None` for another architecture.
        num_labels: Number of classes; `None` for a model without.
        label_names: Of the first five classes.
        parameters: How many.
        backbone_parameters: Those of the PVT, without heads.
        size: (height, width) in pixels for what follows.
        multiply_adds: For an image of that size; `None` where they cannot be counted without weights and an image.
        backbone_multiply_adds: Those of the PVT; `None` as before.
        stages: Of the PVT; none of another backbone.
        image_processor: Its class and its settings; `None` where the model comes without.
        origin: What the card says of where the weights are from: `conversion`, `base_model`, `datasets`, `license`; of
            a variant the address of its release.
        files: The names of the files of weights.
        bytes: Of the tensors in them; `None` if the files cannot be looked into.
        dtypes: How many numbers they have of each dtype, such as `{"F32": 25363560}`; `None` as before.
        missing: Tensors of the model that no file has in this shape, and that would be at random; `None` as before.
        unused: Tensors of the files that the model has no place for; `None` as before.
    """

    name: str
    model_class: str
    models: str
    variant: str | None
    num_labels: int | None
    label_names: list[str]
    parameters: int
    backbone_parameters: int
    size: tuple[int, int]
    multiply_adds: int | None
    backbone_multiply_adds: int | None
    stages: list[Stage]
    image_processor: dict[str, Any] | None
    origin: dict[str, Any]
    files: list[str]
    bytes: int | None
    dtypes: dict[str, int] | None
    missing: list[str] | None
    unused: list[str] | None

    def to_dict(self) -> dict[str, Any]:
        """For json."""
        return asdict(self)

    def describe(self) -> str:
        """For a terminal."""
        lines = [self.name, *(f"{name:15}{text}" for name, text in _list_lines(self))]
        return "\n".join(map(escape_control, [*lines, *(_draw_table(self.stages) if self.stages else [])]))


def inspect_model(name: str, size: int | Sequence[int] | None = None) -> ModelInfo:
    """Finds out what a model is. Weights are only loaded where the tensors of its files have other names or shapes than
    those of the model; those of a variant are not even downloaded.

    Args:
        name: A folder, a repository of the Hub, or the name of a variant.
        size: Height and width in pixels at which multiply-adds and feature maps are counted, or one number for both
            (default: the crop of a classifier's image processor, 800 x 1216 for detectors, 512 x 512 for segmenters).

    Raises:
        ModelError: If there is no such model.
        ValueError: If the size is wrong.
    """
    checkpoint = find_converted(name) or name
    config = read_config(checkpoint)
    model_class, models = _find_class(checkpoint, config)
    processor = _read_image_processor(checkpoint)
    height, width = _read_size(size, models, processor, config)
    with torch.device("meta"):
        model = model_class(config).eval()
    backbone = _find_backbone(model)
    has_labels = models not in ("encoder", "backbone")
    return ModelInfo(
        name=name,
        model_class=model_class.__name__,
        models=models,
        variant=getattr(find_variant(get_backbone_config(config)), "name", None),
        num_labels=config.num_labels if has_labels else None,
        label_names=list_class_names(config)[:5] if has_labels else [],
        parameters=model.num_parameters(),
        backbone_parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        size=(height, width),
        multiply_adds=_count_multiply_adds(model, height, width),
        backbone_multiply_adds=_count_multiply_adds(backbone, height, width),
        stages=_list_stages(get_backbone_config(config), height, width),
        image_processor=processor,
        origin=_read_origin(checkpoint),
        **_read_tensors(checkpoint, model, _read_files(checkpoint)),
    )


def _find_class(name: str, config: PreTrainedConfig) -> tuple[type[PreTrainedModel], str]:
    """The class of a model, and what such models are called."""
    try:
        task = find_task(config)
        return task.mapping[type(config)], task.models
    except ValueError:
        is_backbone = (getattr(config, "architectures", None) or [""])[0].endswith("Backbone")
    mapping = MODEL_FOR_BACKBONE_MAPPING if is_backbone else MODEL_MAPPING
    if (model_class := mapping.get(type(config), None)) is None:
        raise ModelError(f"{name} is a {config.model_type}, of which transformers has no model.")
    return model_class, "backbone" if is_backbone else "encoder"


def _find_backbone(model: PreTrainedModel) -> nn.Module:
    """The PVT in a model, or the model itself."""
    model_type = get_backbone_config(model.config).model_type
    inner = (module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model)
    return next((module for module in inner if module.config.model_type == model_type), model)


def _read_size(
    size: int | Sequence[int] | None, models: str, processor: dict[str, Any] | None, config: PreTrainedConfig
) -> tuple[int, int]:
    if size is None:
        crop = (processor or {}).get("crop_size") or {} if models == "classifier" else {}
        return _SIZES.get(models) or (crop.get("height") or 224, crop.get("width") or 224)
    height, width = (size, size) if isinstance(size, int) else (*size, *size)[:2] if len(size) in (1, 2) else (0, 0)
    if min(height, width) < 32:
        raise ValueError(f"`size` must be a height and a width of at least 32 pixels, or one number, got {size}.")
    return height, width


def _count_multiply_adds(model: PreTrainedModel | nn.Module, height: int, width: int) -> int | None:
    """For one image; `None` if what the model computes depends on the image."""
    channels = get_backbone_config(model.config).num_channels
    try:
        with FlopCounterMode(display=False) as counter:
            model(pixel_values=torch.zeros(1, channels, height, width, device="meta"))
    except (NotImplementedError, RuntimeError):  # tensors on the meta device have no values
        return None
    return counter.get_total_flops() // 2


def _list_stages(config: PreTrainedConfig, height: int, width: int) -> list[Stage]:
    if config.model_type not in ("pvt", "pvt_v2"):
        return []
    is_v1 = config.model_type == "pvt"
    ratios = config.sequence_reduction_ratios if is_v1 else config.sr_ratios
    fields = (config.strides, config.patch_sizes, config.hidden_sizes, config.depths, config.num_attention_heads)
    stages, total = [], 1
    for stride, kernel, channels, blocks, heads, ratio, mlp in zip(*fields, ratios, config.mlp_ratios, strict=True):
        padding = 0 if is_v1 else kernel // 2
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        total *= stride
        reduction = None if getattr(config, "linear_attention", False) else ratio
        stages.append(Stage(total, channels, blocks, heads, reduction, mlp, (height, width)))
    return stages


def _read_image_processor(checkpoint: str) -> dict[str, Any] | None:
    try:
        processor = PvtImageProcessor() if checkpoint in VARIANTS else AutoImageProcessor.from_pretrained(checkpoint)
    except (OSError, ValueError):  # it has none
        return None
    settings = {name: value for name, value in processor.to_dict().items() if name in _SETTINGS and value is not None}
    return {"class": type(processor).__name__} | settings


def _read_origin(checkpoint: str) -> dict[str, Any]:
    if checkpoint in VARIANTS:
        return {"release": VARIANTS[checkpoint].checkpoint_url}
    card = Path(checkpoint) / "README.md" if Path(checkpoint).is_dir() else checkpoint
    try:
        data = ModelCard.load(card).data.to_dict()
    except Exception as error:  # there is none, it is out of reach, or it is not one
        logger.debug("The card of %s cannot be read: %s", checkpoint, error)
        return {}
    return {name: data[name] for name in _ORIGINS if name in data}


def _read_files(checkpoint: str) -> Any:
    """The headers of the files of weights, as huggingface_hub reads them; `None` where there are none to be read."""
    if checkpoint in VARIANTS:
        return None
    try:
        if Path(checkpoint).is_dir():
            return get_local_safetensors_metadata(checkpoint)
        if isinstance(cached := try_to_load_from_cache(checkpoint, "model.safetensors"), str):
            return get_local_safetensors_metadata(cached)
        return get_safetensors_metadata(checkpoint)
    except Exception as error:  # no safetensors, damaged, or out of reach
        logger.debug("The weights of %s cannot be looked into: %s", checkpoint, error)
        return None


def _read_tensors(checkpoint: str, model: PreTrainedModel, files: Any) -> dict[str, Any]:
    """What the files hold, and what is in them or in the model alone."""
    if files is None:
        return {"files": []} | dict.fromkeys(("bytes", "dtypes", "missing", "unused"))
    tensors = {name: info for file in files.files_metadata.values() for name, info in file.tensors.items()}
    missing: set[str] = set()
    unused: set[str] = set()
    if {name: list(info.shape) for name, info in tensors.items()} != {
        name: list(tensor.shape) for name, tensor in model.state_dict().items()
    }:  # which may be a matter of names that transformers has changed: only loading tells
        missing, unused = _load(type(model), checkpoint)
    return {
        "files": sorted(files.files_metadata),
        "bytes": sum(end - start for start, end in (info.data_offsets for info in tensors.values())),
        "dtypes": dict(files.parameter_count),
        "missing": sorted(missing),
        "unused": sorted(unused),
    }


def _load(model_class: type[PreTrainedModel], checkpoint: str) -> tuple[set[str], set[str]]:
    """The tensors of a model that a checkpoint does not fill, and those of the checkpoint without a place."""
    _, loaded = model_class.from_pretrained(checkpoint, output_loading_info=True, ignore_mismatched_sizes=True)
    mismatched = {name for name, *_ in loaded["mismatched_keys"]}
    return set(loaded["missing_keys"]) | mismatched, set(loaded["unexpected_keys"])


def _list_lines(info: ModelInfo) -> Iterator[tuple[str, str]]:
    """What is said of a model, by the names of the lines."""
    variant = f" with the architecture of {info.variant}" if info.variant else ""
    yield "model", f"{info.model_class}, a {info.models}{variant}"
    if info.num_labels is not None:
        more = ", ..." if info.num_labels > len(info.label_names) else ""
        yield "classes", f"{info.num_labels}: {', '.join(info.label_names)}{more}"
    yield "parameters", f"{info.parameters / 1e6:.2f} M, the backbone's {info.backbone_parameters / 1e6:.2f} M"
    yield "multiply-adds", _describe_multiply_adds(info)
    yield "images", _describe_settings(info.image_processor)
    origin = info.origin | info.origin.get("conversion", {})
    texts = (f"{name} {value}" for name, value in origin.items() if name != "conversion")
    yield "weights from", ", ".join(texts) or "the model does not say"
    if info.bytes is None or info.dtypes is None:
        yield "files", "not downloaded" if "release" in info.origin else "none that can be looked into (safetensors)"
        return
    yield "files", f"{', '.join(info.files)}: {info.bytes / 1e6:.1f} MB, {', '.join(info.dtypes)}"
    lost = f"{list_tensors(info.missing or [])} would be at random" if info.missing else "none"
    yield "at random", lost
    if info.unused:
        yield "unused", f"{list_tensors(info.unused)} of the files have no place in the model"


def _describe_settings(settings: dict[str, Any] | None) -> str:
    """The settings of an image processor in a line."""
    if settings is None:
        return "no image processor comes with it"
    words = []
    for name, value in settings.items():
        if name == "resample":
            value = PILImageResampling(value).name.lower()
        elif isinstance(value, dict):
            value = " ".join(f"{side} {pixels}" for side, pixels in value.items())
        elif isinstance(value, list | tuple):
            value = " ".join(f"{number:g}" for number in value)
        words.append(str(value) if name == "class" else f"{name} {value}")
    return ", ".join(words)


def _describe_multiply_adds(info: ModelInfo) -> str:
    size = f"for an image of {info.size[0]} x {info.size[1]} pixels"
    backbone = "not counted" if info.backbone_multiply_adds is None else f"{info.backbone_multiply_adds / 1e9:.2f} G"
    if info.multiply_adds is None:
        return f"backbone {backbone} {size}; those of the heads depend on what is in it, or cannot be counted"
    return f"{info.multiply_adds / 1e9:.2f} G {size}, the backbone's {backbone}"


def _draw_table(stages: Sequence[Stage]) -> list[str]:
    """The lines of a table of the stages."""
    rows: list[tuple[str, ...]] = [("stage", "stride", "channels", "blocks", "heads", "reduction", "MLP ratio", "map")]
    for number, stage in enumerate(stages, start=1):
        reduction = "to 7 x 7" if stage.reduction is None else str(stage.reduction)
        counts = map(str, (number, stage.stride, stage.channels, stage.blocks, stage.heads))
        rows.append((*counts, reduction, f"{stage.mlp_ratio:g}", f"{stage.map_size[0]} x {stage.map_size[1]}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
