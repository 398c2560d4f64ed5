"""The image processor that belongs to a checkpoint."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.image_utils import PILImageResampling

from ..models.image_processing_pvt import PvtImageProcessor
from .checkpoint import Checkpoint
from .rename import ConversionError

# transformers' own processor squashes to this, and the PVTs on the Hub have it, released weights and tuned ones.
_SQUASHED = {"height": 224, "width": 224}


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
            and stated.get("size") == _SQUASHED
            and not stated.get("do_center_crop")
            and config.num_labels == 1000
        ):
            return PvtImageProcessor(), "the papers' evaluation, in place of the squashing default of transformers"
        if stated:
            return PvtImageProcessor.from_dict(stated), "the checkpoint's own"
        if isinstance(timm, dict) and "input_size" in timm:
            return PvtImageProcessor(**_from_timm(timm)), "the checkpoint's own, from timm's settings"
        if config.model_type == "pvt" and config.image_shape != (224, 224):
            height, width = config.image_shape
            processor = PvtImageProcessor(crop_size={"height": height, "width": width})
            return processor, "the papers' evaluation at the size of the position embeddings"
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConversionError(f"The checkpoint's image settings make no image processor: {error}") from error
    return PvtImageProcessor(), "the papers' evaluation"


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
