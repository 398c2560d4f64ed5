"""PVT v1 for timm: `import pvt_hf.timm`, then `timm.create_model("pvt_tiny")`. (PVT v2 is in timm itself.)

A module to import, because a registration imports timm, which `import pvt_hf` neither needs nor waits for.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import global_pool_nlc
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from .conversion import rename
from .models.layers import tokens_to_map
from .models.modeling_pvt import PvtBackbone, PvtModel
from .variants import VARIANTS, build_config

__all__ = ["PyramidVisionTransformer"]  # timm adds the four functions

_POOLS = ("token", "avg", "max", "avgmax", "")


class PyramidVisionTransformer(nn.Module):
    """PVT v1 (arXiv 2102.12122) with the interface of timm's models, for images of any size from 32 pixels up. Its
    tensors have the names that they have in [`PvtForImageClassification`].

    Args:
        name: A variant of v1.
        num_classes: Number of classes, 0 for none (default: 1000).
        in_chans: Channels of the images (default: 3).
        img_size: Size in pixels for which position embeddings are stored; they are interpolated for every other one
            (default: 224, as in the released checkpoints).
        global_pool: `"token"` (the CLS token), `"avg"`, `"max"`, `"avgmax"` or `""` (none) (default: `"token"`).
        drop_rate: Dropout before the classifier (default: 0).
        drop_path_rate: Stochastic depth (default: 0).
        dense: Whether the network is that of detectors and segmenters: feature maps of all stages without CLS token,
            and no classifier. `features_only=True` of timm sets it (default: False).
        **fields: Any field of [`PvtConfig`].

    Raises:
        ValueError: For another `global_pool`, or a field that the configuration does not have.
    """

    def __init__(
        self,
        name: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dense: bool = False,
        **fields: Any,
    ):
        super().__init__()
        config = build_config(name, num_channels=in_chans, image_size=img_size, drop_path_rate=drop_path_rate, **fields)
        self.dense = dense
        if dense:
            config.out_features = config.stage_names[1:]  # all stages are built
        self.pvt: nn.Module = PvtBackbone(config) if dense else PvtModel(config)
        self.num_features = self.head_hidden_size = config.hidden_sizes[-1]
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(0 if dense else num_classes, global_pool)
        self.feature_info = [
            {"num_chs": channels, "reduction": 4 * 2**stage, "module": f"pvt.encoder.block.{stage}"}
            for stage, channels in enumerate(config.hidden_sizes)
        ]

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new classifier, or none, in the place of the old one.

        Args:
            num_classes: Number of classes, 0 for none.
            global_pool: As of the class (default: what it is).
        """
        if global_pool is not None:
            if global_pool not in _POOLS:
                raise ValueError(f"`global_pool` must be one of {_POOLS}, got {global_pool!r}.")
            self.global_pool = global_pool
        self.num_classes = num_classes
        weight = self.pvt.get_input_embeddings().weight
        self.classifier = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.classifier.apply(self.pvt._init_weights).to(weight.device, weight.dtype).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.pvt.gradient_checkpointing_enable() if enable else self.pvt.gradient_checkpointing_disable()

    def no_weight_decay(self) -> set[str]:
        """The released code's."""
        return {name for name, _ in self.named_parameters() if name.endswith("cls_token")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for layer-wise learning rates: by stage, or (the default) by block."""
        encoder = r"^pvt\.encoder\."
        blocks = [
            (rf"{encoder}patch_embeddings\.(\d+)", (0,)),
            (rf"{encoder}block\.(\d+)\.(\d+)", None),
            (rf"{encoder}layer_norm", (99999,)),
        ]
        stages = rf"{encoder}(?:patch_embeddings|block)\.(\d+)"
        return {"stem": rf"{encoder}patch_embeddings\.0", "blocks": stages if coarse else blocks}

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """
        Args:
            x: Normalised images `(batch, in_chans, height, width)`.
            indices: Stages from 0 on, a number of last stages, or None for all (default: None).
            norm: False: there is no norm after a stage.
            stop_early: Without effect: `features_only=True` has no stages beyond the last one that is wanted.
            output_fmt: `"NCHW"`.
            intermediates_only: Whether just the maps are returned (default: False).

        Returns:
            The maps `(batch, channels, height / stride, width / stride)` of these stages, after what
            [`forward_features`] returns.

        Raises:
            ValueError: For a `norm` or an `output_fmt` that it does not have.
        """
        if norm or output_fmt != "NCHW":
            raise ValueError(f"PVT has `norm=False` and `output_fmt='NCHW'`, got {norm} and {output_fmt!r}.")
        wanted = self._find_stages(indices)
        stages, _, _ = self.pvt.encoder(x, output_attentions=False, output_hidden_states=False)
        # (batch, tokens, channels), without a CLS token -> (batch, channels, height, width)
        maps = [tokens_to_map(tokens[:, -height * width :], height, width) for tokens, height, width in stages]
        intermediates = [maps[stage] for stage in wanted]
        if intermediates_only:
            return intermediates
        last = maps[-1] if self.dense else self.pvt.encoder.layer_norm(stages[-1][0])
        return last, intermediates

    def _find_stages(self, indices: int | Sequence[int] | None) -> list[int]:
        """The numbers from 0 on of these stages; an int stands for so many last ones, and a negative index counts from
        the end. Raises an `IndexError` for a stage that the model does not have."""
        stages = range(len(self.pvt.encoder.block))
        if isinstance(indices, int):
            indices = range(-indices, 0)
        return list(stages) if indices is None else [stages[index] for index in indices]

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages beyond the last of `indices`, and returns these as numbers from 0 on."""
        encoder = self.pvt.encoder
        wanted = self._find_stages(indices)
        kept = slice(max(wanted) + 1)
        encoder.patch_embeddings, encoder.block = encoder.patch_embeddings[kept], encoder.block[kept]
        return wanted

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the normed tokens of the last stage, `(batch, 1 + tokens, channels)`, CLS token first."""
        return self.pvt(x).last_hidden_state

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.head_drop(global_pool_nlc(x, self.global_pool))
        return x if pre_logits else self.classifier(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(batch, in_chans, height, width)` -> `(batch, num_classes)`."""
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(
    state_dict: dict[str, torch.Tensor], model: PyramidVisionTransformer
) -> dict[str, torch.Tensor]:
    """The tensors of a released or of a converted checkpoint with the names that they have in the model.

    Raises:
        ConversionError: If a tensor of the model would be left at random, or one of the checkpoint has no place.
    """
    tensors = rename.from_official(state_dict) if "pos_embed1" in state_dict else rename.add_base_prefix(state_dict)
    if model.dense:
        no_dense = ("pvt.encoder.layer_norm.", "classifier.")
        tensors = {k: v for k, v in tensors.items() if not k.startswith(no_dense) and not k.endswith("cls_token")}
    found, wanted = (
        {name for name in names if not name.startswith("classifier.")} for names in (tensors, model.state_dict())
    )
    if found != wanted:
        raise rename.ConversionError(
            f"The checkpoint does not fit {type(model).__name__}: it lacks {rename.quote(wanted - found) or 'nothing'}"
            f", and no place is for {rename.quote(found - wanted) or 'nothing'}."
        )
    return tensors


def _describe(name: str) -> dict[str, Any]:
    return {
        "url": VARIANTS[name].checkpoint_url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "pvt.encoder.patch_embeddings.0.projection",
        "classifier": "classifier",
        "fixed_input_size": False,
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {f"{name}.in1k": _describe(name) for name, variant in VARIANTS.items() if variant.model_type == "pvt"}
)


def _create(name: str, pretrained: bool, features_only: bool = False, **kwargs: Any) -> nn.Module:
    feature_cfg = {"out_indices": kwargs.pop("out_indices", (0, 1, 2, 3)), "feature_cls": "getter"}
    return build_model_with_cfg(
        PyramidVisionTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        features_only=features_only,
        name=name,
        dense=features_only,
        **kwargs,
    )


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create("pvt_tiny", pretrained, **kwargs)


@register_model
def pvt_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create("pvt_small", pretrained, **kwargs)


@register_model
def pvt_medium(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create("pvt_medium", pretrained, **kwargs)


@register_model
def pvt_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create("pvt_large", pretrained, **kwargs)
