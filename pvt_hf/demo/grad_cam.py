"""Where in an image the evidence for a class is: Grad-CAM of the classifiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from ..prediction.predictor import Predictor

_STRIDE = 32  # of the last stage
# By model type: the layer whose tokens are looked at, and how many of them there are along a side in pixels. PVT v1
# classifies by its CLS token, which reads the others behind the first norm of the last block.
_LAYERS: dict[str, tuple[Callable[[Any], nn.Module], Callable[[int], int]]] = {
    "pvt": (lambda encoder: encoder.block[-1][-1].layer_norm_1, lambda side: side // _STRIDE),
    "pvt_v2": (lambda encoder: encoder.layers[-1].layer_norm, lambda side: -(-side // _STRIDE)),
}


class _Logits(nn.Module):
    """A classifier that returns a tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def can_explain(model: nn.Module) -> bool:
    """Whether a model is a classifier whose layers are known."""
    return model.config.model_type in _LAYERS


def explain(model: nn.Module, pixel_values: torch.Tensor, label: int) -> np.ndarray:
    """How much each place speaks for a class.

    Args:
        model: A classifier, see [`can_explain`].
        pixel_values: `(1, 3, height, width)`.
        label: Of the class.

    Returns:
        float32 `(height, width)`, 0 to 1.
    """
    find_layer, count_tokens = _LAYERS[model.config.model_type]
    height, width = map(count_tokens, pixel_values.shape[2:])

    def to_map(tokens: torch.Tensor) -> torch.Tensor:
        # (batch, tokens, channels) -> (batch, channels, height, width), without the CLS token
        return tokens[:, -height * width :].mT.unflatten(2, (height, width))

    layer = find_layer(model.base_model.encoder)
    with GradCAM(_Logits(model), target_layers=[layer], reshape_transform=to_map) as cam:
        return cam(pixel_values, targets=[ClassifierOutputTarget(label)])[0]


def draw_evidence(predictor: Predictor, image: Image.Image, label: int) -> Image.Image:
    """Draws what a classifier sees of an image, red where it speaks for a class.

    Args:
        predictor: Of a classifier, see [`can_explain`].
        image: RGB.
        label: Of the class.

    Returns:
        A PIL image, RGB, of the size that the model is given.
    """
    processor = predictor.image_processor
    pixel_values = processor(image, return_tensors="pt").pixel_values
    evidence = explain(predictor.model, pixel_values.to(predictor.model.device), label)
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    seen = (pixel_values[0] * std + mean).clamp(0, 1).permute(1, 2, 0)  # (height, width, 3)
    return Image.fromarray(show_cam_on_image(seen.numpy().astype(np.float32), evidence, use_rgb=True))
