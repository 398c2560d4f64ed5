"""What transformers.js reads of a folder: classes that it knows, for what it computes as they do.

It looks up a class by `model_type`, and knows PVT, but neither PVT v2 nor the models of this package. In all of its
classes the program is what computes: they differ in what is done with its outputs.
"""

import json
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor, PreTrainedModel

from .comparison import CLASSIFICATION, FEATURES, SEGMENTATION, Task
from .targets import ExportError

# By task: the model type, the class, and the class of the image processor.
_CLASSES = {
    CLASSIFICATION: ("pvt", "PvtForImageClassification", "PvtImageProcessor"),
    FEATURES: ("pvt", "PvtModel", "PvtImageProcessor"),
    SEGMENTATION: ("segformer", "SegformerForSemanticSegmentation", "SegformerImageProcessor"),
}
_DETR = ("detr", "DetrForObjectDetection", "DetrImageProcessor")


def find_classes(model: PreTrainedModel, task: Task) -> tuple[str, str, str]:
    """The model type, the class and the class of the image processor of transformers.js for a model.

    Args:
        model: Of any class.
        task: Of the model.

    Raises:
        ExportError: If it has none.
    """
    if model.config.model_type == "detr":
        return _DETR
    if task not in _CLASSES:
        raise ExportError(
            f"transformers.js makes no boxes of the outputs of {type(model).__name__}; of detectors it knows DETR. "
            "Programs of --target onnx run in onnxruntime-web."
        )
    return _CLASSES[task]


def write_settings(
    folder: Path, model: PreTrainedModel, image_processor: BaseImageProcessor | None, task: Task, dtype: str
) -> None:
    """Writes config.json and preprocessor_config.json as transformers.js reads them.

    Args:
        folder: Of the export.
        model: Of any class that it knows.
        image_processor: Of the model, if it has one.
        task: Of the model.
        dtype: Of the program that it loads where its caller names none.
    """
    model_type, model_class, processor_class = find_classes(model, task)
    names = {"fp32": "fp32", "fp16": "fp16", "int8": "q8"}
    settings = model.config.to_dict() | {
        "model_type": model_type,
        "architectures": [model_class],
        "transformers.js_config": {"dtype": names[dtype]},
    }
    _write(folder / "config.json", settings)
    if image_processor is not None:
        _write(
            folder / "preprocessor_config.json",
            json.loads(image_processor.to_json_string()) | {"image_processor_type": processor_class},
        )


def _write(file: Path, settings: dict[str, Any]) -> None:
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
