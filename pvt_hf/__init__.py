"""The Pyramid Vision Transformer (PVT v1 and v2) as Hugging Face models.

`import pvt_hf` makes the Auto classes of transformers use these classes for `pvt` and `pvt_v2`. It costs next to
nothing: the classes (and with them two seconds of transformers) are imported when one of them is first looked at, by
name here or by model type in an Auto class.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

from .variants import VARIANTS, build_config

if TYPE_CHECKING:
    from .configuration_pvt import PvtConfig
    from .configuration_pvt_v2 import PvtV2Config
    from .image_processing_pvt import PvtImageProcessor, PvtImageProcessorPil
    from .modeling_pvt import PvtBackbone, PvtForImageClassification, PvtModel
    from .modeling_pvt_v2 import PvtV2Backbone, PvtV2ForImageClassification, PvtV2Model

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "PvtBackbone",
    "PvtConfig",
    "PvtForImageClassification",
    "PvtImageProcessor",
    "PvtImageProcessorPil",
    "PvtModel",
    "PvtV2Backbone",
    "PvtV2Config",
    "PvtV2ForImageClassification",
    "PvtV2Model",
    "build_config",
]

_MODULES = {
    "PvtConfig": "configuration_pvt",
    "PvtV2Config": "configuration_pvt_v2",
    "PvtModel": "modeling_pvt",
    "PvtForImageClassification": "modeling_pvt",
    "PvtBackbone": "modeling_pvt",
    "PvtV2Model": "modeling_pvt_v2",
    "PvtV2ForImageClassification": "modeling_pvt_v2",
    "PvtV2Backbone": "modeling_pvt_v2",
    "PvtImageProcessor": "image_processing_pvt",
    "PvtImageProcessorPil": "image_processing_pvt",
}
_CONFIGS = {"pvt": "PvtConfig", "pvt_v2": "PvtV2Config"}
_MODELS = {
    "AutoModel": ("PvtModel", "PvtV2Model"),
    "AutoModelForImageClassification": ("PvtForImageClassification", "PvtV2ForImageClassification"),
    "AutoBackbone": ("PvtBackbone", "PvtV2Backbone"),
}


def _load(name: str) -> type:
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __getattr__(name: str) -> type:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _CONFIGS.values():
        _register_models()
    globals()[name] = _load(name)
    return globals()[name]


def __dir__() -> list[str]:
    return __all__


def _register_models() -> None:
    from transformers.models.auto import configuration_auto, modeling_auto

    for position, (model_type, config_name) in enumerate(_CONFIGS.items()):
        config_class = _load(config_name)
        configuration_auto.AutoConfig.register(model_type, config_class, exist_ok=True)
        for auto_class, model_names in _MODELS.items():
            getattr(modeling_auto, auto_class).register(config_class, _load(model_names[position]), exist_ok=True)


def _defer_models(configuration_auto) -> None:
    """Has transformers look up the configurations in this module, whose `__getattr__` registers everything."""
    mapping = configuration_auto.CONFIG_MAPPING
    if hasattr(mapping, "_modules"):
        mapping._modules.update(dict.fromkeys(_CONFIGS, sys.modules[__name__]))
    else:
        _register_models()


def _register_image_processors(image_processing_auto) -> None:
    classes = {"torchvision": _load("PvtImageProcessor"), "pil": _load("PvtImageProcessorPil")}
    for config_name in _CONFIGS.values():
        image_processing_auto.AutoImageProcessor.register(
            _load(config_name), image_processor_classes=dict(classes), exist_ok=True
        )


class _RegisterOnImport(MetaPathFinder):
    """Registers with transformers' Auto modules as soon as they have been imported."""

    hooks = {
        "transformers.models.auto.configuration_auto": _defer_models,
        "transformers.models.auto.image_processing_auto": _register_image_processors,
    }

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.hooks:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.hooks[fullname](module)

        spec.loader.exec_module = exec_module
        return spec


for _name, _hook in _RegisterOnImport.hooks.items():
    if _name in sys.modules:
        _hook(sys.modules[_name])
sys.meta_path.insert(0, _RegisterOnImport())
