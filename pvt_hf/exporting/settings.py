"""The settings beside a program: the model's own, or those that transformers.js reads.

transformers.js looks up a class by `model_type`, and knows PVT, but neither PVT v2 nor the models of this package. In
all of its classes the program is what computes: they differ in what is done with its outputs.
"""

import json
from typing import Any

from transformers import BaseImageProcessor, PreTrainedModel
from transformers.image_utils import PILImageResampling

from .comparison import CLASSIFICATION, FEATURES, SEGMENTATION, Results
from .targets import ExportError

# Of transformers.js, by what the results are: the model type, the class, and the class of the image processor.
_CLASSES = {
    CLASSIFICATION: ("pvt", "PvtForImageClassification", "PvtImageProcessor"),
    FEATURES: ("pvt", "PvtModel", "PvtImageProcessor"),
    SEGMENTATION: ("segformer", "SegformerForSemanticSegmentation", "SegformerImageProcessor"),
}
_DETR = ("detr", "DetrForObjectDetection", "DetrImageProcessor")
# PIL's numbers. In Node, of all its ways to make an image smaller, Lanczos alone averages over pixels, as PIL's bicubic
# does. In browsers the canvas decides.
_RESAMPLING = {PILImageResampling.BICUBIC: int(PILImageResampling.LANCZOS)}
_DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8"}  # as it calls them


def describe_model(
    model: PreTrainedModel, image_processor: BaseImageProcessor | None, results: Results, target: str, dtype: str
) -> dict[str, dict[str, Any]]:
    """The contents of config.json and, if there is an image processor, of preprocessor_config.json.

    Args:
        model: Of any class.
        image_processor: Of the model, if it has one.
        results: What those of the model are.
        target: Of the program. For `"web"` they are those of transformers.js, which loads the program of this dtype
            where its caller names none.
        dtype: Of the program.

    Raises:
        ExportError: If transformers.js has no class that does the same.
    """
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    settings = {"config.json": config}
    if image_processor is not None:
        settings["preprocessor_config.json"] = json.loads(image_processor.to_json_string())
    if target == "web":
        model_type, model_class, processor_class = _find_classes(model, results)
        config |= {"model_type": model_type, "architectures": [model_class]}
        config["transformers.js_config"] = {"dtype": _DTYPES[dtype]}
        if prepared := settings.get("preprocessor_config.json"):
            prepared["image_processor_type"] = processor_class
            prepared["resample"] = _RESAMPLING.get(prepared["resample"], prepared["resample"])
    return settings


def _find_classes(model: PreTrainedModel, results: Results) -> tuple[str, str, str]:
    if model.config.model_type == "detr":
        return _DETR
    if results not in _CLASSES:
        raise ExportError(
            f"transformers.js makes no boxes of the outputs of {type(model).__name__}; of detectors it knows DETR. "
            "Programs of --target onnx run in onnxruntime-web."
        )
    return _CLASSES[results]
