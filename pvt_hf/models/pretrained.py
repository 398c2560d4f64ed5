"""Loading that leaves nothing at random, and what transformers has to know about every model here."""

import sys
from collections.abc import Iterable

from torch import nn

# The class of a modeling file that each Auto class stands for, by the end of its name.
_AUTO_CLASSES = {
    "AutoModel": "Model",
    "AutoModelForImageClassification": "ForImageClassification",
    "AutoBackbone": "Backbone",
}


class PretrainedPyramid:
    """Mixin of the pretrained models: what transformers has to know about both versions, and complete loading."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers' heuristic looks for the interface in the modeling file, not here

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], which only logs the tensors that a checkpoint lacks and
        leaves them at random. Here only the classifier may be new.

        Raises:
            ValueError: If the checkpoint lacks tensors of the encoder, has them in another shape (even with
                `ignore_mismatched_sizes=True`), or has encoder tensors that the model lacks. With
                `output_loading_info=True` the caller gets the lists instead.
        """
        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        if pretrained_model_name_or_path is not None and not output_loading_info:
            lost = loading_info["missing_keys"] | {key for key, *_ in loading_info["mismatched_keys"]}
            lost = sorted(key for key in lost if not key.startswith("classifier."))
            unexpected = sorted(key for key in loading_info["unexpected_keys"] if "encoder." in key)
            if lost or unexpected:
                raise ValueError(
                    f"`pretrained_model_name_or_path` ({pretrained_model_name_or_path}) is not a complete checkpoint "
                    f"of this {cls.__name__}: it lacks {len(lost)} tensors (or has them in another shape) {lost[:3]} "
                    f"and has {len(unexpected)} that the model does not have {unexpected[:3]}. (A model takes images "
                    "of any size: there is no need for another `image_size` than the checkpoint's.)"
                )
        return (model, loading_info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """
        As [`~transformers.PreTrainedModel.save_pretrained`]. After `register_for_auto_class`, which saves the code with
        the weights, the configuration names the classes in it for every Auto class, not only for the registered one:
        `AutoModel` of a saved classifier would else be transformers' own class.
        """
        prefix, module = type(self.config).__name__.removesuffix("Config"), sys.modules[type(self).__module__]
        classes = {key: getattr(module, prefix + suffix, None) for key, suffix in _AUTO_CLASSES.items()}
        if self.is_remote_code() and all(classes.values()):  # a user's own subclass has no siblings
            classes["AutoConfig"] = type(self.config)
            auto_map = {key: f"{value.__module__.split('.')[-1]}.{value.__name__}" for key, value in classes.items()}
            self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | auto_map
        return super().save_pretrained(save_directory, *args, **kwargs)


class PretrainedDensePredictor:
    """Mixin of the pretrained detectors and segmenters: what transformers has to know, and complete loading."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # The backbone has the attention; it refuses what it does not support.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The tensors that depend on the number of classes, by the start of their names.
    _class_tensors: tuple[str, ...] = ()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For classes outside transformers it passes over modules all of whose own tensors are loaded, and so over those
        # that have none, as heads. Here `_init_weights` leaves loaded tensors alone by itself.
        super()._initialize_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], which only logs the tensors that a checkpoint lacks and
        leaves them at random. Here only those that depend on the number of classes may be new, and only with
        `ignore_mismatched_sizes=True`.

        Raises:
            ValueError: If the checkpoint lacks other tensors or has some that the model does not have. With
                `output_loading_info=True` the caller gets the lists instead.
        """
        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        if pretrained_model_name_or_path is not None and not output_loading_info:
            lost = set(loading_info["missing_keys"])
            lost |= {key for key, *_ in loading_info["mismatched_keys"] if not key.startswith(cls._class_tensors)}
            unexpected = loading_info["unexpected_keys"]
            if lost or unexpected:
                raise ValueError(
                    f"`pretrained_model_name_or_path` ({pretrained_model_name_or_path}) is not a complete checkpoint "
                    f"of this {cls.__name__}: it lacks {_first(lost)} and has {_first(unexpected)} without a place. "
                    "To start from a pretrained backbone, build the model from a configuration and call "
                    "`load_pretrained_backbone`."
                )
        return (model, loading_info) if output_loading_info else model


def _first(names: Iterable[str]) -> str:
    names = sorted(names)
    return f"{len(names)} tensors {names[:3]}" if names else "none"
