"""The backbone of a detector or segmenter: built from its configuration, and filled from a checkpoint."""

import copy
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import AutoBackbone, AutoConfig, BackboneMixin, PreTrainedConfig, PreTrainedModel

from .configuration_pvt import PvtConfig
from .configuration_pvt_v2 import PvtV2Config
from .modeling_pvt import PvtBackbone
from .modeling_pvt_v2 import PvtV2Backbone
from .pretrained import list_tensors

# Here too, for where this file came with the checkpoint of a detector or segmenter, and pvt_hf is not installed.
_BACKBONES: dict[type[PreTrainedConfig], type[PreTrainedModel]] = {PvtConfig: PvtBackbone, PvtV2Config: PvtV2Backbone}
for _config_class, _backbone_class in _BACKBONES.items():
    AutoBackbone.register(_config_class, _backbone_class, exist_ok=True)

# Fields of a backbone's configuration that change its outputs and that the shapes of its tensors do not show.
_UNSEEN_FIELDS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "patch_layer_norm_eps", "linear_attention")


def build_backbone(config: PreTrainedConfig) -> nn.Module:
    """The backbone of a detector or segmenter, from any configuration with as many feature maps as its head wants.

    Args:
        config: With a `backbone_config`, and `backbone_out_features` as their class attribute.

    Raises:
        ValueError: If the backbone gives another number of feature maps.
    """
    num_maps, features = len(config.backbone_out_features), config.backbone_config.out_features
    if len(features) != num_maps:
        raise ValueError(
            f"`backbone_config` of a {type(config).__name__} must name {num_maps} `out_features`, got {features}."
        )
    _register_copy(type(config.backbone_config))
    return AutoBackbone.from_config(config.backbone_config)


def _register_copy(found: type[PreTrainedConfig]) -> None:
    """Registers the class of a configuration if it is another copy of one of ours: transformers copies the code of a
    folder, and imports the files of the configuration and those of the model apart."""
    is_native = found.__module__.startswith("transformers.")
    for config_class, backbone_class in _BACKBONES.items():
        if found.__name__ == config_class.__name__ and found is not config_class and not is_native:
            AutoBackbone.register(found, backbone_class, exist_ok=True)


def load_pretrained_backbone(model: nn.Module, pretrained_model_name_or_path: str | PathLike, **kwargs: Any) -> int:
    """Fills the backbone of a detector or segmenter from a checkpoint and proves that nothing of it is left at random.

    Args:
        model: Any model with one [`~transformers.BackboneMixin`] in it: those of pvt_hf, DETR, UperNet, Mask2Former.
        pretrained_model_name_or_path: Folder or repository of a classifier or a backbone of the same architecture,
            or of a detector or segmenter with such a `backbone`: RetinaNet, Mask R-CNN, Semantic FPN, UperNet.
        **kwargs: As for `from_pretrained`: `revision`, `token`, `cache_dir`, ...

    Returns:
        The number of tensors of the backbone, each of which came from the checkpoint.

    Raises:
        ValueError: If the checkpoint is of another architecture, lacks tensors of the backbone, or has stages or blocks
            that the backbone does not have.
    """
    backbones = [module for module in model.modules() if isinstance(module, BackboneMixin)]
    if len(backbones) != 1:
        raise ValueError(f"`model` must hold one backbone, got a {type(model).__name__} with {len(backbones)}.")
    (backbone,) = backbones
    source = f"`pretrained_model_name_or_path` ({pretrained_model_name_or_path})"
    saved = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
    is_dense = getattr(saved, "backbone_config", None) is not None  # a detector or segmenter
    saved = saved.backbone_config if is_dense else saved
    wrong = [
        f"{field} is {getattr(saved, field, None)}, not {getattr(backbone.config, field, None)}"
        for field in ("model_type", *_UNSEEN_FIELDS)
        if _to_plain(getattr(saved, field, None)) != _to_plain(getattr(backbone.config, field, None))
    ]
    if wrong:
        raise ValueError(f"{source} is not of the backbone's architecture: {'; '.join(wrong)}.")
    loaded, loading_info = type(backbone).from_pretrained(
        pretrained_model_name_or_path,
        config=copy.deepcopy(backbone.config),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # to list them all
        key_mapping={r"^backbone\.": ""} if is_dense else None,
        **kwargs,
    )
    lost = set(loading_info["missing_keys"]) | {key for key, *_ in loading_info["mismatched_keys"]}
    parts = tuple(f"{name}." for name, _ in backbone.named_children())
    prefix = f"{backbone.base_model_prefix}."
    unused = [key for key in loading_info["unexpected_keys"] if key.removeprefix(prefix).startswith(parts)]
    if lost or unused:
        raise ValueError(
            f"{source} does not fill the backbone: it lacks, or has in another shape, {list_tensors(lost)}, and has "
            f"{list_tensors(unused)} without a place. (For another number of input channels fill the backbone with the "
            "checkpoint's, and call the model's `resize_input_channels`.)"
        )
    tensors = loaded.state_dict()
    with torch.no_grad():
        backbone.load_state_dict(tensors)
    return len(tensors)


def _to_plain(value: Any) -> Any:
    """Tuples as lists, which is what a `config.json` has."""
    return list(value) if isinstance(value, list | tuple) else value


def get_backbone_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the PVT in a model.

    Args:
        config: Of a detector or a segmenter, whose `backbone_config` it is, or of a classifier, an encoder or a
            backbone, which is returned as it is.
    """
    return getattr(config, "backbone_config", None) or config
