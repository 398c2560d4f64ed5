import pytest

import pvt_hf
from tests.support.dense_models import build_dense_model
from tests.support.small_models import randomize, small_config

NAMES = ("cat", "cat", "<i>")  # two of one name, and one that must not become HTML
MODELS = {
    "v1": lambda: pvt_hf.PvtForImageClassification(small_config("v1", num_labels=3)),
    "v2": lambda: pvt_hf.PvtV2ForImageClassification(small_config("v2", num_labels=3)),
    "retinanet": lambda: build_dense_model("retinanet"),
    "mask_rcnn": lambda: build_dense_model("mask_rcnn"),
    "semantic_fpn": lambda: build_dense_model("semantic_fpn"),
}
_SIZE = {"size": {"shortest_edge": 64, "longest_edge": 96}}
PROCESSORS = {
    "retinanet": lambda: pvt_hf.PvtDetectionImageProcessor(**_SIZE),
    "mask_rcnn": lambda: pvt_hf.PvtDetectionImageProcessor(**_SIZE),
    "semantic_fpn": lambda: pvt_hf.PvtSegmentationImageProcessor(**_SIZE),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with a small model of each task in a folder of its name."""
    folder = tmp_path_factory.mktemp("models")
    for name, build in MODELS.items():
        model = build()
        if name not in PROCESSORS:
            randomize(model, std=0.2)
        model.config.id2label = dict(enumerate(NAMES))
        model.config.label2id = {name: label for label, name in enumerate(NAMES)}
        model.eval().save_pretrained(folder / name)
        PROCESSORS.get(name, lambda: pvt_hf.PvtImageProcessor(crop_size=64))().save_pretrained(folder / name)
    return folder
