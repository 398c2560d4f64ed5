"""Small models and random weights for the tests."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoBackbone, AutoModelForImageClassification

import pvt_hf

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["stage1", "stage2", "stage3", "stage4"]

# A few thousand parameters, with the papers' strides, reductions and heads > 1.
SMALL_V1 = {
    "depths": [1, 2, 1, 1],
    "hidden_sizes": [8, 16, 24, 32],
    "num_attention_heads": [1, 2, 3, 4],
    "mlp_ratios": [2, 2, 2, 2],
    "image_size": 64,
    "num_labels": 5,
}
SMALL_V2 = {key: value for key, value in SMALL_V1.items() if key != "image_size"}


def small_config(version: str, **overrides):
    """`version` is `v1`, `v2` or `v2_linear`."""
    if version == "v1":
        return pvt_hf.PvtConfig(**(SMALL_V1 | overrides))
    return pvt_hf.PvtV2Config(**(SMALL_V2 | {"linear_attention": version == "v2_linear"} | overrides))


def build_classifier(version: str, **fields: object) -> nn.Module:
    return AutoModelForImageClassification.from_config(small_config(version, **fields))


def build_backbone(version: str, **fields: object) -> nn.Module:
    return AutoBackbone.from_config(small_config(version, out_features=STAGES, **fields))


def build_segmenter(version: str, backbone: dict[str, object] | None = None, **fields: object) -> nn.Module:
    """Semantic FPN; `fields` are its own."""
    config = small_config(version, out_features=STAGES, **(backbone or {}))
    sizes = {"num_labels": 5, "neck_channels": 16, "head_channels": 16}
    return pvt_hf.SemanticFPNForSemanticSegmentation(
        pvt_hf.SemanticFPNConfig(backbone_config=config, **(sizes | fields))
    )


def draw_inputs(build: Callable[..., nn.Module], batch: int = 2, height: int = 64, width: int = 96) -> dict:
    """What a model of one of these three functions is trained with: random images, and labels where it takes them."""
    inputs = {"pixel_values": torch.randn(batch, 3, height, width)}
    shapes = {build_classifier: (batch,), build_segmenter: (batch, height, width)}
    return inputs | ({"labels": torch.randint(5, shapes[build])} if build in shapes else {})


def find_loss(outputs) -> torch.Tensor:
    """The loss of the outputs, or something like one of a backbone's."""
    return outputs.loss if "loss" in outputs else sum(values.square().mean() for values in outputs.feature_maps)


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 2e-5) -> None:
    """Two sets of weights are the same but for rounding."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


def randomize(model: nn.Module, std: float = 0.05) -> nn.Module:
    """Random values for every parameter, so that no zero bias and no unit norm hides a mistake."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=std)
            if name.endswith("weight") and parameter.ndim == 1:
                parameter.add_(1)
    return model
