"""Compares a converted model with an independent evaluation of the checkpoint it was made from."""

from collections.abc import Iterator, Mapping

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.backbone import get_backbone_config
from .architectures.base import Architecture, Outputs
from .rename import ConversionError, StateDict

TOLERANCE = 1e-8


class _Float64(Mapping):
    """A state dict in float64, one tensor at a time: a copy of all of it would be twice the checkpoint."""

    def __init__(self, weights: StateDict):
        self.weights = weights

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.weights[key].double()

    def __contains__(self, key: object) -> bool:
        return key in self.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def _to_float64(model: torch.nn.Module) -> None:
    """Loaded tensors are parts of one mapped file, which is in memory until the last of them is gone. Copied first,
    they need twice the checkpoint's size at the peak, not three times."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model.double().eval()


def probe_images(config: PreTrainedConfig) -> list[torch.Tensor]:
    """Seeded noise, float64: one image of the size that the model was trained for and an oblong one."""
    config = get_backbone_config(config)
    generator = torch.Generator().manual_seed(0)
    sizes = [config.image_shape if config.model_type == "pvt" else (224, 224), (96, 160)]
    return [torch.randn(1, config.num_channels, *size, generator=generator, dtype=torch.double) for size in sizes]


@torch.no_grad()
def reference_outputs(official: StateDict, config: PreTrainedConfig, architecture: Architecture) -> Outputs:
    """The raw outputs of tensors with official names for each of the test images."""
    weights = _Float64(official)
    return [output for image in probe_images(config) for output in architecture.reference(weights, image, config)]


@torch.no_grad()
def timm_outputs(weights: StateDict, config: PreTrainedConfig, is_backbone: bool) -> Outputs:
    """The same by timm's own model. Consumes `weights`."""
    try:
        from timm.models.pvt_v2 import PyramidVisionTransformerV2
    except ImportError as error:
        raise ConversionError(
            "The checkpoint is timm's, and timm's model is what the result is compared with: pip install timm."
        ) from error
    with torch.device("meta"):
        model = PyramidVisionTransformerV2(
            in_chans=config.num_channels,
            num_classes=len(weights["head.weight"]) if "head.weight" in weights else 0,
            depths=config.depths,
            embed_dims=config.hidden_sizes,
            num_heads=config.num_attention_heads,
            sr_ratios=config.sr_ratios,
            mlp_ratios=config.mlp_ratios,
            qkv_bias=config.qkv_bias,
            linear=config.linear_attention,
        )
    model.load_state_dict(weights, assign=True)
    weights.clear()
    _to_float64(model)
    if not is_backbone:
        return [model(image) for image in probe_images(config)]
    return [
        map_ for image in probe_images(config) for map_ in model.forward_intermediates(image, intermediates_only=True)
    ]


@torch.no_grad()
def largest_difference(model: PreTrainedModel, expected: Outputs, architecture: Architecture) -> float:
    """The largest difference between a model, which is turned to float64 for it, and the outputs of its source.

    Raises:
        ConversionError: If it is above `TOLERANCE`, or not a number.
    """
    _to_float64(model)
    actual = [output for image in probe_images(model.config) for output in architecture.outputs(model, image)]
    difference = max((a - b).abs().max().item() for a, b in zip(actual, expected, strict=True))
    if any(not tensor.isfinite().all() for tensor in (*actual, *expected)):
        raise ConversionError("The checkpoint's outputs are not finite numbers. Nothing was written.")
    if difference > TOLERANCE:
        raise ConversionError(
            f"The converted model differs from its source by {difference:.1e} in float64, more than {TOLERANCE:.0e}. "
            "Nothing was written. (The number of attention heads, the activation and the epsilons of the norms are not "
            "in a checkpoint: they are the official ones unless `config.json` says otherwise.)"
        )
    return difference
