"""The registry: every released variant with its architecture, its released checkpoint and its published numbers."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_RELEASE_URL = "https://github.com/whai362/PVT/releases/download/v2/"


@dataclass(frozen=True)
class Variant:
    """One row of the papers' tables of architectures.

    Attributes:
        name: The name in the released code, for example `pvt_v2_b2_li`.
        model_type: `pvt` (arXiv 2102.12122, Table 1) or `pvt_v2` (arXiv 2106.13797, Table 1).
        depths: Blocks of each stage.
        hidden_sizes: Channels of each stage.
        mlp_ratios: Width of the MLPs of each stage, as a multiple of its channels.
        linear_attention: Linear spatial-reduction attention (v2 only).
        drop_path_rate: Stochastic depth of the papers' ImageNet recipe.
        paper_top1: ImageNet-1k top-1 accuracy at 224 x 224 in the paper, in percent.
        paper_params: Parameters of the classifier in the paper, in millions.
        paper_gflops: Multiply-adds at 224 x 224 in the paper, in billions.
        released_top1: Top-1 that the released code's repository states for the released checkpoint, in percent.
        released_params: Parameters of the released code, in millions: what runs, where it differs from `paper_params`.
    """

    name: str
    model_type: str
    depths: tuple[int, ...]
    paper_top1: float
    paper_params: float
    paper_gflops: float
    hidden_sizes: tuple[int, ...] = (64, 128, 320, 512)
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
    linear_attention: bool = False
    drop_path_rate: float = 0.1
    released_top1: float | None = None
    released_params: float | None = None

    def __post_init__(self) -> None:
        for field in ("top1", "params"):
            if getattr(self, f"released_{field}") is None:
                object.__setattr__(self, f"released_{field}", getattr(self, f"paper_{field}"))

    @property
    def checkpoint_url(self) -> str:
        """The released ImageNet-1k checkpoint."""
        return f"{_RELEASE_URL}{self.name}.pth"

    @property
    def config_fields(self) -> dict[str, Any]:
        """Keyword arguments of the variant's configuration class. Drop-path belongs to the recipe, not here."""
        fields = {
            "depths": list(self.depths),
            "hidden_sizes": list(self.hidden_sizes),
            "mlp_ratios": list(self.mlp_ratios),
            "num_labels": 1000,
        }
        return fields | {"linear_attention": True} if self.linear_attention else fields


# What `PreTrainedConfig` accepts beside its dataclass fields.
_EXTRA_CONFIG_ARGUMENTS = {"num_labels", "out_features", "out_indices", "attn_implementation", "output_attentions"}

# Errors of v1 (24.9, 20.2, 18.8, 18.3) are written as accuracies.
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("pvt_tiny", "pvt", (2, 2, 2, 2), 75.1, 13.2, 1.9),
        Variant("pvt_small", "pvt", (3, 4, 6, 3), 79.8, 24.5, 3.8),
        Variant("pvt_medium", "pvt", (3, 4, 18, 3), 81.2, 44.2, 6.7, drop_path_rate=0.3),
        Variant("pvt_large", "pvt", (3, 8, 27, 3), 81.7, 61.4, 9.8, drop_path_rate=0.3),
        Variant(
            "pvt_v2_b0", "pvt_v2", (2, 2, 2, 2), 70.5, 3.4, 0.6, hidden_sizes=(32, 64, 160, 256), released_params=3.7
        ),
        Variant("pvt_v2_b1", "pvt_v2", (2, 2, 2, 2), 78.7, 13.1, 2.1, released_params=14.0),
        Variant("pvt_v2_b2", "pvt_v2", (3, 4, 6, 3), 82.0, 25.4, 4.0),
        Variant("pvt_v2_b2_li", "pvt_v2", (3, 4, 6, 3), 82.1, 22.6, 3.9, linear_attention=True),
        Variant("pvt_v2_b3", "pvt_v2", (3, 4, 18, 3), 83.2, 45.2, 6.9, drop_path_rate=0.3, released_top1=83.1),
        Variant("pvt_v2_b4", "pvt_v2", (3, 8, 27, 3), 83.6, 62.6, 10.1, drop_path_rate=0.3),
        Variant("pvt_v2_b5", "pvt_v2", (3, 6, 40, 3), 83.8, 82.0, 11.8, mlp_ratios=(4, 4, 4, 4), drop_path_rate=0.3),
    )
}


# What makes a variant; the rest (labels, image size, dropout) is free.
_VARIANT_FIELDS = {
    "pvt": ("depths", "hidden_sizes", "mlp_ratios", "sequence_reduction_ratios", "num_attention_heads", "patch_sizes"),
    "pvt_v2": ("depths", "hidden_sizes", "mlp_ratios", "sr_ratios", "num_attention_heads", "patch_sizes"),
}


def get_variant(name: str) -> Variant:
    """The variant called `name`. Raises a `ValueError` that lists the nearest names if there is none."""
    if name not in VARIANTS:
        nearest = difflib.get_close_matches(str(name), VARIANTS, n=3, cutoff=0.3) or list(VARIANTS)
        raise ValueError(f"`name` must be a variant of PVT, got {name!r}. Nearest: {', '.join(nearest)}.")
    return VARIANTS[name]


def build_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """Builds the configuration of a variant.

    Args:
        name: One of `VARIANTS`, for example `"pvt_v2_b2"`.
        **overrides: Any field of [`PvtConfig`] or [`PvtV2Config`], for example `num_labels=10`, `drop_path_rate=0.1`,
            `image_size=(512, 2048)` or `out_features=["stage2", "stage4"]`.

    Returns:
        A [`PvtConfig`] or a [`PvtV2Config`], for 1000 classes unless `num_labels` or `id2label` says otherwise.

    Raises:
        ValueError: If there is no such variant (the message lists the nearest names) or no such field.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    variant = get_variant(name)
    config_class = CONFIG_MAPPING[variant.model_type]
    known = {field.name for field in dataclasses.fields(config_class)} | _EXTRA_CONFIG_ARGUMENTS
    for field in overrides:
        if field not in known:
            nearest = difflib.get_close_matches(field, known, n=3) or sorted(known)
            raise ValueError(f"{config_class.__name__} has no field {field!r}. Nearest: {', '.join(nearest)}.")
    fields = variant.config_fields
    if overrides.get("id2label") is not None:
        del fields["num_labels"]
    return config_class(**(fields | overrides))


def differences(config: PreTrainedConfig, variant: Variant) -> list[str]:
    """What distinguishes an architecture from a variant, in words. Labels, image size and rates do not count."""
    wanted = build_config(variant.name)
    if config.model_type != wanted.model_type:
        return [f"model_type is {config.model_type}, not {wanted.model_type}"]
    fields: tuple[str, ...] = _VARIANT_FIELDS[config.model_type]
    if config.model_type == "pvt_v2":
        fields = ("linear_attention", *fields)
        if config.linear_attention and wanted.linear_attention:  # which does not use them
            fields = tuple(field for field in fields if field != "sr_ratios")
    return [
        f"{field} is {got}, not {want}"
        for field in fields
        if (got := _plain(getattr(config, field))) != (want := _plain(getattr(wanted, field)))
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def find_variant(config: PreTrainedConfig) -> Variant | None:
    """The released variant that has this architecture."""
    return next((variant for variant in VARIANTS.values() if not differences(config, variant)), None)
