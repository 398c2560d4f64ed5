"""Loading that leaves nothing at random, and what transformers has to know about every model here."""

import re
import sys
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any, ClassVar, Self

import torch
from torch import nn
from transformers import PreTrainedModel

# Of which Auto classes a class is, by the end of its name.
_AUTO_CLASSES = {
    "Model": ("AutoModel",),
    "Backbone": ("AutoBackbone",),
    "ForImageClassification": ("AutoModelForImageClassification",),
    "ForObjectDetection": ("AutoModelForObjectDetection",),
    "ForInstanceSegmentation": (
        "AutoModelForInstanceSegmentation",
        "AutoModelForImageSegmentation",
        "AutoModelForObjectDetection",
    ),
    "ForSemanticSegmentation": ("AutoModelForSemanticSegmentation",),
}


class PretrainedMixin(PreTrainedModel):
    """Base of all models here: complete loading, and what transformers has to know. The class attributes with an
    underscore say which tensors a checkpoint may differ in."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # The encoder has the attention; that of a detector's or segmenter's backbone refuses what it does not support.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    # Tensors that a checkpoint may lack, by the start of their names: they are new.
    _may_be_missing: ClassVar[tuple[str, ...]] = ()
    # Tensors that are new where a checkpoint has them in another shape, with `ignore_mismatched_sizes=True`; of modules
    # in a list without their numbers.
    _may_change_shape: ClassVar[tuple[str, ...]] = ()
    # What the names of the tensors have in them for which the model must have a place. "" is in all names.
    _must_have_a_place: ClassVar[str] = ""

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers' heuristic looks for the interface in the modeling file, not here

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For classes outside transformers it passes over modules all of whose own tensors are loaded, and so over those
        # that have none, as heads. Their `_init_weights` leaves loaded tensors alone by itself.
        has_tensors = next(module.parameters(recurse=False), None) is not None
        super()._initialize_weights(module, is_custom_code and has_tensors)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike | None,
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], which only logs the tensors that a checkpoint lacks and
        leaves them at random. Here only those that depend on the number of classes may be new: the classifier of an
        image classifier; those of a detector or segmenter only with `ignore_mismatched_sizes=True`.

        Raises:
            ValueError: If the checkpoint lacks other tensors, has them in another shape (even with
                `ignore_mismatched_sizes=True`), or has some that the model does not have (for an encoder or an image
                classifier: tensors of an encoder). With `output_loading_info=True` the caller gets the lists instead.
        """
        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        if output_loading_info:
            return model, loading_info
        if pretrained_model_name_or_path is not None:
            mismatched = {name for name, *_ in loading_info["mismatched_keys"]}
            lost = {name for name in loading_info["missing_keys"] if not name.startswith(cls._may_be_missing)}
            unnumbered = {name: re.sub(r"\.\d+(?=\.)", "", name) for name in mismatched}
            lost |= {name for name in mismatched if not unnumbered[name].startswith(cls._may_change_shape)}
            unused = {name for name in loading_info["unexpected_keys"] if cls._must_have_a_place in name}
            if lost or unused:
                raise ValueError(
                    f"`pretrained_model_name_or_path` ({pretrained_model_name_or_path}) is not a complete checkpoint "
                    f"of this {cls.__name__}: it lacks, or has in another shape, {list_tensors(lost)}, and has "
                    f"{list_tensors(unused)} without a place. (`output_loading_info=True` returns the model with "
                    f"the lists of these. {explain_mismatch(loading_info['mismatched_keys'])})"
                )
        return model

    def resize_input_channels(self, num_channels: int) -> nn.Conv2d:
        """
        Gives the model a first convolution for another number of input channels, made from the one that it has by the
        rule of timm's `in_chans`, and sets `config.num_channels`. Of PVT and of detectors and segmenters on PVT.

        Args:
            num_channels (`int`):
                Channels of the images from now on. For one, the weights are summed up, so that a grey image gives what
                it gave in all channels; for more, they are repeated in turn, times the old number over the new.

        Returns:
            `torch.nn.Conv2d`: The convolution.

        Raises:
            ValueError: If `num_channels` is no positive number, or the first layer is no convolution.
        """
        convolution = self.get_input_embeddings()
        if not isinstance(num_channels, int) or num_channels < 1:
            raise ValueError(f"`num_channels` must be a positive number, got {num_channels!r}.")
        if not isinstance(convolution, nn.Conv2d):
            raise ValueError(f"The first layer of {type(self).__name__} is no convolution: {convolution}.")
        if num_channels != convolution.in_channels:
            with torch.no_grad():
                weight = adapt_input_weight(convolution.weight, num_channels)
            convolution.weight = nn.Parameter(weight, requires_grad=convolution.weight.requires_grad)
            convolution.in_channels = num_channels
        configs = [module.config for module in self.modules() if isinstance(module, PreTrainedModel)]
        for config in [*configs, *(getattr(config, "backbone_config", None) for config in configs)]:
            if hasattr(config, "num_channels"):
                config.num_channels = num_channels
        return convolution

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """
        As [`~transformers.PreTrainedModel.save_pretrained`]. After `register_for_auto_class`, which saves the code with
        the weights, the configuration names the classes in it for every Auto class, not only for the registered one:
        `AutoModel` of a saved classifier would else be transformers' own class. Without it no code is saved, and what
        came with the checkpoint that was loaded is not named.
        """
        if self.is_remote_code():
            auto_map = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = auto_map | _list_auto_classes(type(self), type(self.config))
        else:
            for config in (self.config, getattr(self.config, "backbone_config", None)):
                (config or self.config).__dict__.pop("auto_map", None)
        return super().save_pretrained(save_directory, *args, **kwargs)


def _list_auto_classes(model_class: type, config_class: type) -> dict[str, str]:
    """For each Auto class the model in the file of `model_class` that is of it, as `file.Class`."""
    module, prefix = sys.modules[model_class.__module__], config_class.__name__.removesuffix("Config")
    siblings = {ending: getattr(module, prefix + ending, None) for ending in _AUTO_CLASSES}
    classes = {
        auto_class: sibling
        for ending, sibling in siblings.items()
        if sibling is not None and sibling.__module__ == module.__name__  # a user's own file has no siblings
        for auto_class in _AUTO_CLASSES[ending]
    }
    if classes:
        classes["AutoConfig"] = config_class
    return {key: f"{value.__module__.split('.')[-1]}.{value.__name__}" for key, value in classes.items()}


def explain_mismatch(mismatched_keys: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> str:
    """What to do instead of loading a checkpoint whose tensors have other shapes, for messages.

    Args:
        mismatched_keys: Names, and their shapes in the checkpoint and in the model.
    """
    for name, saved, wanted in mismatched_keys:
        if name.endswith("position_embeddings") and saved[-1] == wanted[-1]:
            return "A model takes images of any size without another `image_size` than the checkpoint's."
        if len(saved) == 4 and saved[1] != wanted[1] and (saved[0], *saved[2:]) == (wanted[0], *wanted[2:]):
            return (
                f"For {wanted[1]} input channels load the checkpoint with its own `num_channels`, {saved[1]}, and call "
                "the model's `resize_input_channels`."
            )
    return "To start from a pretrained backbone, build the model from a config and call `load_pretrained_backbone`."


def adapt_input_weight(weight: torch.Tensor, num_channels: int) -> torch.Tensor:
    """The weight of a first convolution for another number of channels, by the rule of timm's `in_chans`.

    Args:
        weight: (filters, input channels, height, width)
        num_channels: Of the input. One has the sum over the channels, so that a grey image gives what it gives in all
            of them; more have those in turn, times the old number of channels over the new.

    Returns:
        (filters, num_channels, height, width)
    """
    old = weight.shape[1]
    if num_channels == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, [channel % old for channel in range(num_channels)]] * (old / num_channels)


def list_tensors(names: Iterable[str]) -> str:
    """How many tensors these are and the first of their names, for messages."""
    names = sorted(names)
    return f"{len(names)} tensors {names[:3]}" if names else "none"
