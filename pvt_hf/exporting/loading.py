"""Models of any class, also those that predict nothing: encoders and backbones."""

from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    MODEL_MAPPING,
    AutoImageProcessor,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..prediction.loading import ModelError, load_predictor, read_config
from ..prediction.predictor import find_task


def load_model(name: str) -> tuple[PreTrainedModel, BaseImageProcessor | None]:
    """Loads a model on the CPU, in float32, with its image processor.

    Args:
        name: A folder, a repository of the Hub, or the name of a released variant: see
            [`~pvt_hf.prediction.loading.find_checkpoint`].

    Returns:
        The model in evaluation mode, and its image processor; encoders and backbones may have none.

    Raises:
        ModelError: If there is no such model, or tensors of it would be at random.
    """
    config = read_config(name)
    try:
        find_task(config)
    except ValueError:
        return _load_features(name, config)
    predictor = load_predictor(name, device="cpu")
    return predictor.model, predictor.image_processor


def _load_features(name: str, config: PreTrainedConfig) -> tuple[PreTrainedModel, BaseImageProcessor | None]:
    classes = [mapping.get(type(config), None) for mapping in (MODEL_MAPPING, MODEL_FOR_BACKBONE_MAPPING)]
    saved_as = (config.architectures or [""])[0]
    model_class = next((known for known in classes if known is not None and known.__name__ == saved_as), None)
    if model_class is None:
        raise ModelError(f"{name} is a {saved_as or config.model_type}, which is no model on PVT that can be exported.")
    try:
        model = model_class.from_pretrained(name, dtype=torch.float32)
        has_processor = not Path(name).is_dir() or (Path(name) / "preprocessor_config.json").exists()
        return model.eval(), AutoImageProcessor.from_pretrained(name) if has_processor else None
    except (OSError, ValueError) as error:
        raise ModelError(f"{name} cannot be loaded: {error}") from error
