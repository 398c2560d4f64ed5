"""The Pyramid Vision Transformer (PVT v1 and v2) as Hugging Face models.

`import pvt_hf` makes the Auto classes of transformers use these classes for `pvt` and `pvt_v2`. It costs next to
nothing: the classes (and with them two seconds of transformers) are imported when one of them is first looked at, by
name here or by model type in an Auto class.
"""

import importlib
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

from .variants import VARIANTS, build_config

if TYPE_CHECKING:
    from .configuration_mask_rcnn import MaskRCNNConfig
    from .configuration_pvt import PvtConfig
    from .configuration_pvt_v2 import PvtV2Config
    from .configuration_retinanet import RetinaNetConfig
    from .configuration_semantic_fpn import SemanticFPNConfig
    from .dense_prediction import load_pretrained_backbone
    from .detr import build_detr, build_detr_config, detr_detections, detr_loss, prepare_detr_training
    from .image_processing_detection import PvtDetectionImageProcessor, PvtDetectionImageProcessorPil
    from .image_processing_pvt import PvtImageProcessor, PvtImageProcessorPil
    from .image_processing_segmentation import PvtSegmentationImageProcessor, PvtSegmentationImageProcessorPil
    from .modeling_mask_rcnn import MaskRCNNForInstanceSegmentation
    from .modeling_pvt import PvtBackbone, PvtForImageClassification, PvtModel
    from .modeling_pvt_v2 import PvtV2Backbone, PvtV2ForImageClassification, PvtV2Model
    from .modeling_retinanet import RetinaNetForObjectDetection
    from .modeling_semantic_fpn import SemanticFPNForSemanticSegmentation
    from .sliding_window import sliding_window_logits

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "MaskRCNNConfig",
    "MaskRCNNForInstanceSegmentation",
    "PvtBackbone",
    "PvtConfig",
    "PvtDetectionImageProcessor",
    "PvtDetectionImageProcessorPil",
    "PvtForImageClassification",
    "PvtImageProcessor",
    "PvtImageProcessorPil",
    "PvtModel",
    "PvtSegmentationImageProcessor",
    "PvtSegmentationImageProcessorPil",
    "PvtV2Backbone",
    "PvtV2Config",
    "PvtV2ForImageClassification",
    "PvtV2Model",
    "RetinaNetConfig",
    "RetinaNetForObjectDetection",
    "SemanticFPNConfig",
    "SemanticFPNForSemanticSegmentation",
    "build_config",
    "build_detr",
    "build_detr_config",
    "detr_detections",
    "detr_loss",
    "load_pretrained_backbone",
    "prepare_detr_training",
    "sliding_window_logits",
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
    "RetinaNetConfig": "configuration_retinanet",
    "RetinaNetForObjectDetection": "modeling_retinanet",
    "MaskRCNNConfig": "configuration_mask_rcnn",
    "MaskRCNNForInstanceSegmentation": "modeling_mask_rcnn",
    "PvtImageProcessor": "image_processing_pvt",
    "PvtImageProcessorPil": "image_processing_pvt",
    "SemanticFPNConfig": "configuration_semantic_fpn",
    "SemanticFPNForSemanticSegmentation": "modeling_semantic_fpn",
    "load_pretrained_backbone": "dense_prediction",
    "sliding_window_logits": "sliding_window",
    "PvtDetectionImageProcessor": "image_processing_detection",
    "PvtDetectionImageProcessorPil": "image_processing_detection",
    "PvtSegmentationImageProcessor": "image_processing_segmentation",
    "PvtSegmentationImageProcessorPil": "image_processing_segmentation",
    "build_detr": "detr",
    "build_detr_config": "detr",
    "detr_detections": "detr",
    "detr_loss": "detr",
    "prepare_detr_training": "detr",
}
# By model type: the configuration, the image processor (its PIL twin has the ending Pil), the class of each Auto class.
_AUTO_CLASSES = {
    "pvt": (
        "PvtConfig",
        "PvtImageProcessor",
        {
            "AutoModel": "PvtModel",
            "AutoModelForImageClassification": "PvtForImageClassification",
            "AutoBackbone": "PvtBackbone",
        },
    ),
    "pvt_v2": (
        "PvtV2Config",
        "PvtImageProcessor",
        {
            "AutoModel": "PvtV2Model",
            "AutoModelForImageClassification": "PvtV2ForImageClassification",
            "AutoBackbone": "PvtV2Backbone",
        },
    ),
    "pvt_hf_retinanet": (
        "RetinaNetConfig",
        "PvtDetectionImageProcessor",
        {"AutoModelForObjectDetection": "RetinaNetForObjectDetection"},
    ),
    "pvt_hf_semantic_fpn": (
        "SemanticFPNConfig",
        "PvtSegmentationImageProcessor",
        {"AutoModelForSemanticSegmentation": "SemanticFPNForSemanticSegmentation"},
    ),
    "pvt_hf_mask_rcnn": (
        "MaskRCNNConfig",
        "PvtDetectionImageProcessor",
        dict.fromkeys(
            ("AutoModelForInstanceSegmentation", "AutoModelForImageSegmentation", "AutoModelForObjectDetection"),
            "MaskRCNNForInstanceSegmentation",
        ),
    ),
}


def __getattr__(name: str) -> type:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return __all__


def _register() -> None:
    from transformers.models.auto import configuration_auto, image_processing_auto, modeling_auto

    package = sys.modules[__name__]
    for model_type, (config_name, processor_name, models) in _AUTO_CLASSES.items():
        config_class = getattr(package, config_name)
        configuration_auto.AutoConfig.register(model_type, config_class, exist_ok=True)
        for auto_class, model_name in models.items():
            model_class = getattr(package, model_name)
            getattr(modeling_auto, auto_class).register(config_class, model_class, exist_ok=True)
        image_processors = {
            "torchvision": getattr(package, processor_name),
            "pil": getattr(package, f"{processor_name}Pil"),
        }
        image_processing_auto.AutoImageProcessor.register(
            config_class, image_processor_classes=image_processors, exist_ok=True
        )


def _defer_registration() -> None:
    """Has `AutoConfig` find the configurations in this package, where the first look at one of them registers all."""
    mapping = sys.modules["transformers.models.auto.configuration_auto"].CONFIG_MAPPING
    if hasattr(mapping, "_modules") and hasattr(mapping, "_mapping"):
        mapping._modules.update(dict.fromkeys(_AUTO_CLASSES, sys.modules[__name__]))
        mapping._mapping.update({model_type: names[0] for model_type, names in _AUTO_CLASSES.items()})
    else:
        _register()


class _RegisterOnImport(MetaPathFinder):
    """Registers once a module of this package, or the Auto class that looks classes up by name, has been imported."""

    def __init__(self):
        self.registered = False
        self.in_progress = set()
        self.hooks: dict[str, Callable[[], None]] = {
            "transformers.models.auto.configuration_auto": _defer_registration,
            "transformers.models.auto.image_processing_auto": self.register,
            **{f"{__name__}.{module}": self.register for module in _MODULES.values()},
        }

    def register(self) -> None:
        if self.registered or self.in_progress:  # a half imported module registers when it is whole
            return
        self.registered = True
        try:
            _register()
        except BaseException:
            self.registered = False
            raise

    def find_spec(self, fullname, path=None, target=None):
        spec = PathFinder.find_spec(fullname, path, target) if fullname in self.hooks else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            self.in_progress.add(fullname)
            try:
                execute(module)
            finally:
                self.in_progress.discard(fullname)
            self.hooks[fullname]()

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _finder := _RegisterOnImport())
if "transformers.models.auto.image_processing_auto" in sys.modules:
    _finder.register()
elif "transformers.models.auto.configuration_auto" in sys.modules:
    _defer_registration()
