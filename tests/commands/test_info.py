"""`pvt-hf info`: what a model is, beside what the model itself says when it is loaded."""

import json

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForImageClassification

import pvt_hf
from pvt_hf.commands import info
from pvt_hf.prediction import loading
from pvt_hf.prediction.model_info import inspect_model
from tests.support.checkpoints import TINY, official_weights, run, save
from tests.support.predictors import build_predictor
from tests.support.small_models import STAGES, small_config


def test_variant_is_told_without_its_weights(monkeypatch, tmp_path):
    name = "pvt_v2_b2_li"
    monkeypatch.setattr(loading, "HF_HOME", str(tmp_path))
    found, variant = inspect_model(name), pvt_hf.VARIANTS[name]
    assert (found.models, found.variant, found.num_labels, found.label_names[0]) == ("classifier", name, 1000, "tench")
    assert found.parameters / 1e6 == pytest.approx(variant.released_params, abs=0.051)
    assert found.size == (224, 224) and found.multiply_adds / 1e9 == pytest.approx(variant.paper_gflops, abs=0.15)
    assert found.origin == {"release": variant.checkpoint_url} and found.files == [] and found.missing is None
    assert [stage.blocks for stage in found.stages] == list(variant.depths)
    assert [stage.reduction for stage in found.stages] == [None] * 4
    assert not any(tmp_path.iterdir())
    assert "files          not downloaded" in found.describe()


@pytest.mark.parametrize("version", ["v1", "v2", "v2_linear"])
def test_stages_are_those_of_the_backbone(version, tmp_path):
    """At a size that the strides do not divide, where v1 drops the rest and v2 does not."""
    config = small_config(version, out_features=STAGES)
    backbone = {"v1": pvt_hf.PvtBackbone}.get(version, pvt_hf.PvtV2Backbone)(config).eval()
    backbone.save_pretrained(tmp_path)
    found = inspect_model(str(tmp_path), (101, 70))
    maps = backbone(torch.zeros(1, 3, 101, 70)).feature_maps
    assert [(stage.channels, *stage.map_size) for stage in found.stages] == [tuple(m.shape[1:]) for m in maps]
    assert [stage.stride for stage in found.stages] == [4, 8, 16, 32] and found.models == "backbone"
    assert found.num_labels is None and found.image_processor is None
    assert found.parameters == found.backbone_parameters == backbone.num_parameters()
    assert found.bytes == 4 * found.parameters and found.dtypes == {"F32": found.parameters} and found.missing == []


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn", "detr"])
def test_dense_models(name, tmp_path):
    predictor = build_predictor(name)
    predictor.model.save_pretrained(tmp_path)
    predictor.image_processor.save_pretrained(tmp_path)
    found = inspect_model(str(tmp_path), 96)
    backbone = predictor.model.model.backbone if name == "detr" else predictor.model.backbone
    assert found.model_class == type(predictor.model).__name__ and found.num_labels == 3
    assert found.parameters == predictor.model.num_parameters() and found.missing == [] == found.unused
    assert found.backbone_parameters == sum(parameter.numel() for parameter in backbone.parameters())
    assert 0 < found.backbone_multiply_adds < (found.multiply_adds or 10**12)
    assert (found.multiply_adds is None) == (name in ("mask_rcnn", "detr"))
    assert found.image_processor["size"] == {"shortest_edge": 64, "longest_edge": 128}


def test_what_would_be_at_random_is_listed(tmp_path, capsys):
    pvt_hf.PvtV2ForImageClassification(small_config("v2")).save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights["classifier.weight"]
    weights["classifier.bias"], weights["x"] = torch.zeros(9), torch.zeros(1)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    found = inspect_model(str(tmp_path))
    assert found.missing == ["classifier.bias", "classifier.weight"] and found.unused == ["x"]
    info.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "at random      2 tensors ['classifier.bias', 'classifier.weight'] would be at random" in printed
    pvt_hf.PvtV2Model(small_config("v2")).save_pretrained(tmp_path)  # of an encoder, for a classifier
    AutoConfig.from_pretrained(tmp_path, architectures=["PvtV2ForImageClassification"]).save_pretrained(tmp_path)
    assert inspect_model(str(tmp_path)).missing == ["classifier.bias", "classifier.weight"]


def test_conversion_is_where_weights_are_from(tmp_path, capsys):
    source = save(official_weights(TINY["v2"]), tmp_path / "tiny.pth")
    assert run(source, tmp_path / "converted") == 0
    capsys.readouterr()
    info.main([str(tmp_path / "converted"), "--json", "--size", "64", "96"])
    found = json.loads(capsys.readouterr().out)
    assert (
        found["origin"]["conversion"]["source"] == "tiny.pth" and found["missing"] == [] and found["size"] == [64, 96]
    )
    assert found["files"] == ["model.safetensors"] and found["stages"][3]["map_size"] == [2, 3]
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "converted")
    assert found["parameters"] == model.num_parameters()


@pytest.mark.slow
def test_repository_is_told_from_its_headers(hub, python, tmp_path):
    """No complete file of weights is asked for."""
    pvt_hf.PvtV2ForImageClassification(small_config("v2")).save_pretrained(tmp_path / "saved")
    hub.repos["me/b"] = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    result = python("-m", "pvt_hf.commands.info", "me/b", "--json")
    found = json.loads(result.stdout)
    assert found["files"] == ["model.safetensors"] and found["missing"] == [], result.stderr
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_wrong_size_and_model_are_errors(tmp_path):
    pvt_hf.PvtV2Model(small_config("v2")).save_pretrained(tmp_path)
    with pytest.raises(
        SystemExit, match=r"`size` must be a height and a width of at least 32 pixels.*, got \[1, 2, 3\]"
    ):
        info.main([str(tmp_path), "--size", "1", "2", "3"])
    with pytest.raises(SystemExit, match=r"`size` must be .*, got \[31\]"):
        info.main([str(tmp_path), "--size", "31"])
    with pytest.raises(SystemExit, match="nowhere cannot be loaded: it must be a folder"):
        info.main(["nowhere"])
