"""The Pyramid Vision Transformer (PVT v1 and v2) as Hugging Face models.

`import pvt_hf` makes the Auto classes and pipelines of transformers use these classes for `pvt` and `pvt_v2`, and know
the detectors and the segmenter.
"""

import importlib
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
)

from .models.backbone import load_pretrained_backbone
from .models.configuration_atss import ATSSConfig
from .models.configuration_cascade_mask_rcnn import CascadeMaskRCNNConfig
from .models.configuration_gfl import GFLConfig
from .models.configuration_mask_rcnn import MaskRCNNConfig
from .models.configuration_pvt import PvtConfig
from .models.configuration_pvt_v2 import PvtV2Config
from .models.configuration_retinanet import RetinaNetConfig
from .models.configuration_semantic_fpn import SemanticFPNConfig
from .models.configuration_sparse_rcnn import SparseRCNNConfig
from .models.detr import build_detr, build_detr_config, detr_loss, prepare_detr_training
from .models.image_processing_detection import PvtDetectionImageProcessor, PvtDetectionImageProcessorPil
from .models.image_processing_pvt import PvtImageProcessor, PvtImageProcessorPil
from .models.image_processing_segmentation import PvtSegmentationImageProcessor, PvtSegmentationImageProcessorPil
from .models.modeling_atss import ATSSForObjectDetection
from .models.modeling_cascade_mask_rcnn import CascadeMaskRCNNForInstanceSegmentation
from .models.modeling_gfl import GFLForObjectDetection
from .models.modeling_mask_rcnn import MaskRCNNForInstanceSegmentation
from .models.modeling_pvt import PvtBackbone, PvtForImageClassification, PvtModel
from .models.modeling_pvt_v2 import PvtV2Backbone, PvtV2ForImageClassification, PvtV2Model
from .models.modeling_retinanet import RetinaNetForObjectDetection
from .models.modeling_semantic_fpn import SemanticFPNForSemanticSegmentation
from .models.modeling_sparse_rcnn import SparseRCNNForObjectDetection
from .models.post_processing import detr_detections
from .models.sliding_window import sliding_window_logits
from .variants import VARIANTS, build_config

if TYPE_CHECKING:
    from .prediction.loading import load_predictor
    from .prediction.model_info import inspect_model
    from .prediction.run import predict, predict_to_folder

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "ATSSConfig",
    "ATSSForObjectDetection",
    "CascadeMaskRCNNConfig",
    "CascadeMaskRCNNForInstanceSegmentation",
    "GFLConfig",
    "GFLForObjectDetection",
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
    "SparseRCNNConfig",
    "SparseRCNNForObjectDetection",
    "build_config",
    "build_detr",
    "build_detr_config",
    "detr_detections",
    "detr_loss",
    "inspect_model",
    "load_predictor",
    "load_pretrained_backbone",
    "predict",
    "predict_to_folder",
    "prepare_detr_training",
    "sliding_window_logits",
]

# What is imported when it is asked for, by its module: it needs the converter and what draws.
_LATER = {
    "inspect_model": "prediction.model_info",
    "load_predictor": "prediction.loading",
    "predict": "prediction.run",
    "predict_to_folder": "prediction.run",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


# Where pipelines look up which classes they support; what is not there they run, but report as an error.
_PIPELINE_NAMES = {
    AutoModelForImageSegmentation: MODEL_FOR_IMAGE_SEGMENTATION_MAPPING_NAMES,
    AutoModelForInstanceSegmentation: MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES,
    AutoModelForObjectDetection: MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    AutoModelForSemanticSegmentation: MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
}


def _register(
    config_class: type[PreTrainedConfig],
    model_classes: dict[Any, type[PreTrainedModel]],
    image_processor: type[BaseImageProcessor],
    image_processor_pil: type[BaseImageProcessor],
) -> None:
    """Registers an architecture with the Auto classes, also over a class of transformers.

    Raises:
        RuntimeError: If an Auto class does not give the registered class afterwards, as a later transformers might.
    """
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class, model_class in model_classes.items():
        auto_class.register(config_class, model_class, exist_ok=True)
        if auto_class in _PIPELINE_NAMES:
            _PIPELINE_NAMES[auto_class][config_class.model_type] = model_class.__name__
    image_processors = {"torchvision": image_processor, "pil": image_processor_pil}
    AutoImageProcessor.register(config_class, image_processor_classes=image_processors, exist_ok=True)

    found: dict[str, Any] = {
        auto_class.__name__: auto_class._model_mapping.get(config_class, None) for auto_class in model_classes
    }
    found |= {"AutoConfig": type(AutoConfig.for_model(config_class.model_type))}
    found |= {"AutoImageProcessor": IMAGE_PROCESSOR_MAPPING.get(config_class, None)}
    wanted: dict[str, Any] = {auto_class.__name__: model_class for auto_class, model_class in model_classes.items()}
    wanted |= {"AutoConfig": config_class, "AutoImageProcessor": image_processors}
    if wrong := {name: found[name] for name in wanted if found[name] != wanted[name]}:
        raise RuntimeError(f"This version of transformers does not take the classes of pvt_hf, it gives {wrong}.")


_register(
    PvtConfig,
    {AutoModel: PvtModel, AutoModelForImageClassification: PvtForImageClassification, AutoBackbone: PvtBackbone},
    PvtImageProcessor,
    PvtImageProcessorPil,
)
_register(
    PvtV2Config,
    {AutoModel: PvtV2Model, AutoModelForImageClassification: PvtV2ForImageClassification, AutoBackbone: PvtV2Backbone},
    PvtImageProcessor,
    PvtImageProcessorPil,
)
_register(
    RetinaNetConfig,
    {AutoModelForObjectDetection: RetinaNetForObjectDetection},
    PvtDetectionImageProcessor,
    PvtDetectionImageProcessorPil,
)
_register(
    ATSSConfig,
    {AutoModelForObjectDetection: ATSSForObjectDetection},
    PvtDetectionImageProcessor,
    PvtDetectionImageProcessorPil,
)
_register(
    GFLConfig,
    {AutoModelForObjectDetection: GFLForObjectDetection},
    PvtDetectionImageProcessor,
    PvtDetectionImageProcessorPil,
)
_register(
    MaskRCNNConfig,
    {
        AutoModelForInstanceSegmentation: MaskRCNNForInstanceSegmentation,
        AutoModelForImageSegmentation: MaskRCNNForInstanceSegmentation,
        AutoModelForObjectDetection: MaskRCNNForInstanceSegmentation,
    },
    PvtDetectionImageProcessor,
    PvtDetectionImageProcessorPil,
)
_register(
    CascadeMaskRCNNConfig,
    {
        AutoModelForInstanceSegmentation: CascadeMaskRCNNForInstanceSegmentation,
        AutoModelForImageSegmentation: CascadeMaskRCNNForInstanceSegmentation,
        AutoModelForObjectDetection: CascadeMaskRCNNForInstanceSegmentation,
    },
    PvtDetectionImageProcessor,
    PvtDetectionImageProcessorPil,
)
_register(
    SparseRCNNConfig,
    {AutoModelForObjectDetection: SparseRCNNForObjectDetection},
    PvtDetectionImageProcessor,
    PvtDetectionImageProcessorPil,
)
_register(
    SemanticFPNConfig,
    {AutoModelForSemanticSegmentation: SemanticFPNForSemanticSegmentation},
    PvtSegmentationImageProcessor,
    PvtSegmentationImageProcessorPil,
)
