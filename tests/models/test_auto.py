"""Saved classifiers load by every Auto class and pipeline of transformers."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import pipeline

import pvt_hf
from tests.support.small_models import STAGES, randomize, small_config


@pytest.fixture(scope="module", params=["v1", "v2"])
def checkpoint(request, tmp_path_factory):
    """A saved classifier with its image processor."""
    folder = tmp_path_factory.mktemp(request.param)
    model_class = pvt_hf.PvtForImageClassification if request.param == "v1" else pvt_hf.PvtV2ForImageClassification
    names = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
    config = {key: value for key, value in small_config(request.param).to_dict().items() if key not in names}
    del config["num_labels"]
    randomize(model_class(model_class.config_class(**(config | names)))).save_pretrained(folder)
    pvt_hf.PvtImageProcessor(crop_size=64).save_pretrained(folder)
    return folder


def test_from_pretrained(checkpoint):
    native = type(transformers.AutoConfig.from_pretrained(checkpoint)).__name__.removesuffix("Config")
    for auto_class, suffix in (
        (transformers.AutoModel, "Model"),
        (transformers.AutoModelForImageClassification, "ForImageClassification"),
    ):
        assert type(auto_class.from_pretrained(checkpoint)) is getattr(pvt_hf, native + suffix)
    config = transformers.AutoConfig.from_pretrained(checkpoint, out_features=STAGES)
    backbone = transformers.AutoBackbone.from_config(config)
    assert type(backbone) is getattr(pvt_hf, f"{native}Backbone") and len(backbone.channels) == 4
    for backend, suffix in (("torchvision", ""), ("pil", "Pil")):
        processor = transformers.AutoImageProcessor.from_pretrained(checkpoint, backend=backend)
        assert type(processor) is getattr(pvt_hf, f"PvtImageProcessor{suffix}")
        assert dict(processor.size) == {"shortest_edge": 73}


def test_pipelines(checkpoint):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    best = pipeline("image-classification", model=str(checkpoint))(image)
    assert {entry["label"] for entry in best} == {"cat", "dog", "owl"}
    assert sum(entry["score"] for entry in best) == pytest.approx(1)
    model = transformers.AutoModelForImageClassification.from_pretrained(checkpoint)
    processor = transformers.AutoImageProcessor.from_pretrained(checkpoint)
    logits = model(**processor(image, return_tensors="pt")).logits
    assert best[0]["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)
    features = pipeline("image-feature-extraction", model=str(checkpoint))(image, return_tensors=True)
    expected = model.base_model(**processor(image, return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    pooled = pipeline("image-feature-extraction", model=str(checkpoint))(image, pool=True, return_tensors=True)
    torch.testing.assert_close(model.classifier(pooled), logits, rtol=1e-4, atol=1e-5)
