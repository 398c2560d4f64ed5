"""Loading that leaves nothing at random, and what transformers has to know about every model here."""

import sys
from collections.abc import Iterable
from os import PathLike
from typing import Any, ClassVar, Self

from torch import nn

# Each Auto class whose model is in the modeling file of an encoder, and how the name of that model ends.
_CLASS_ENDINGS = {
    "AutoModel": "Model",
    "AutoModelForImageClassification": "ForImageClassification",
    "AutoBackbone": "Backbone",
}


class PretrainedMixin:
    """Mixin of all models here, before [`~transformers.PreTrainedModel`]: complete loading, and what transformers has
    to know. The class attributes with an underscore say which tensors a checkpoint may differ in."""

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
    # Tensors that are new where a checkpoint has them in another shape, with `ignore_mismatched_sizes=True`.
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
            lost |= {name for name in mismatched if not name.startswith(cls._may_change_shape)}
            unused = {name for name in loading_info["unexpected_keys"] if cls._must_have_a_place in name}
            if lost or unused:
                raise ValueError(
                    f"`pretrained_model_name_or_path` ({pretrained_model_name_or_path}) is not a complete checkpoint "
                    f"of this {cls.__name__}: it lacks, or has in another shape, {list_tensors(lost)}, and has "
                    f"{list_tensors(unused)} without a place. (A model takes images of any size without another "
                    "`image_size` than the checkpoint's. To start from a pretrained backbone, build the model from a "
                    "configuration and call `load_pretrained_backbone`.)"
                )
        return model

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """
        As [`~transformers.PreTrainedModel.save_pretrained`]. After `register_for_auto_class`, which saves the code with
        the weights, the configuration of an encoder names the classes in it for every Auto class, not only for the
        registered one: `AutoModel` of a saved classifier would else be transformers' own class.
        """
        prefix, module = type(self.config).__name__.removesuffix("Config"), sys.modules[type(self).__module__]
        classes = {key: getattr(module, prefix + ending, None) for key, ending in _CLASS_ENDINGS.items()}
        if self.is_remote_code() and all(classes.values()):  # a user's own subclass has no siblings
            classes["AutoConfig"] = type(self.config)
            auto_map = {key: f"{value.__module__.split('.')[-1]}.{value.__name__}" for key, value in classes.items()}
            self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | auto_map
        return super().save_pretrained(save_directory, *args, **kwargs)


def list_tensors(names: Iterable[str]) -> str:
    """How many tensors these are and the first of their names, for messages."""
    names = sorted(names)
    return f"{len(names)} tensors {names[:3]}" if names else "none"
