"""The image processor that belongs to a checkpoint."""

import math
from typing import Any

import numpy as np
from transformers import PreTrainedConfig
from transformers.image_utils import PILImageResampling

from ..models.image_processing_pvt import PvtImageProcessor
from .checkpoint import Checkpoint
from .rename import ConversionError

# transformers' own processor squashes to this, and the PVTs on the Hub have it, released weights and tuned ones.
_SQUASHED = ({"height": 224, "width": 224}, [224, 224], 224)
_MAX_EDGE = 4096  # pixels


def read_image_processor(checkpoint: Checkpoint, config: PreTrainedConfig) -> tuple[PvtImageProcessor | None, str]:
    """The checkpoint's own settings (`preprocessor_config.json`, timm's `pretrained_cfg`) or the papers' evaluation.

    Released ImageNet weights that transformers' default came with were not trained for it: they get the papers'
    evaluation too.

    Returns:
        The processor, or `None` for a model that takes other than three channels, and where it is from, in words.

    Raises:
        ConversionError: If the settings make no image processor.
    """
    if config.num_channels != 3:
        return None, f"none, for a model that takes {config.num_channels} channels"
    stated = {key: value for key, value in checkpoint.preprocessor.items() if key != "auto_map"}
    timm = checkpoint.config.get("pretrained_cfg")
    try:
        if (
            stated
            and stated.get("size") in _SQUASHED
            and not stated.get("do_center_crop")
            and config.num_labels == 1000
        ):
            return PvtImageProcessor(), "the papers' evaluation, in place of the squashing default of transformers"
        if stated:
            return _check_usable(PvtImageProcessor.from_dict(stated)), "the checkpoint's own"
        if isinstance(timm, dict) and "input_size" in timm:
            processor = _check_usable(PvtImageProcessor(**_from_timm(timm)))
            return processor, "the checkpoint's own, from timm's settings"
        if config.model_type == "pvt" and config.image_shape != (224, 224):
            height, width = config.image_shape
            processor = PvtImageProcessor(crop_size={"height": height, "width": width})
            return processor, "the papers' evaluation at the size of the position embeddings"
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise ConversionError(
            f"The checkpoint's image settings (`preprocessor_config.json`, or timm's in `config.json`) make no image "
            f"processor: {str(error) or type(error).__name__}. Mend them, or take them away for the papers' evaluation."
        ) from error
    return PvtImageProcessor(), "the papers' evaluation"


def _check_usable(processor: PvtImageProcessor) -> PvtImageProcessor:
    """The processor, if it prepares an image. Raises a `ValueError` that names the setting otherwise."""
    for name in ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad"):
        if not isinstance(value := getattr(processor, name, None), bool | None):
            raise ValueError(f"`{name}` must be true or false, got {value!r:.80}")
    for name in ("size", "crop_size", "pad_size"):
        for side, pixels in dict(getattr(processor, name, None) or {}).items():
            if pixels is not None and (type(pixels) is not int or not 1 <= pixels <= _MAX_EDGE):
                raise ValueError(f"`{name}` must be 1 to {_MAX_EDGE} pixels, got {pixels!r:.80} as {side}")
    for name, lowest in (("image_mean", -math.inf), ("image_std", 0), ("rescale_factor", 0)):
        value = getattr(processor, name)
        values = value if isinstance(value, list | tuple) and name != "rescale_factor" else [value] * 3
        if len(values) != 3 or not all(type(v) in (int, float) and lowest < v < math.inf for v in values):
            kind = "finite numbers above 0" if lowest == 0 else "finite numbers"
            raise ValueError(f"`{name}` must be {kind}, three for the channels, got {value!r:.80}")
    if isinstance(processor.resample, bool) or processor.resample not in list(PILImageResampling):
        raise ValueError(f"`resample` must be one of PIL's numbers, got {processor.resample!r:.80}")
    pixels = processor(np.zeros((32, 48, 3), dtype=np.uint8), return_tensors="pt")["pixel_values"]
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.isfinite().all():
        raise ValueError(f"they make numbers of shape {tuple(pixels.shape)} of an image, or such that are not finite")
    return processor


def _from_timm(settings: dict[str, Any]) -> dict[str, Any]:
    """timm resizes the shorter edge to the input's size over `crop_pct`, rounded down, and crops."""
    _, height, width = settings["input_size"]
    return {
        "size": {"shortest_edge": int(min(height, width) / settings.get("crop_pct", 0.875))},
        "crop_size": {"height": height, "width": width},
        "image_mean": settings["mean"],
        "image_std": settings["std"],
        "resample": PILImageResampling[settings.get("interpolation", "bicubic").upper()],
    }
