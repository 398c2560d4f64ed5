"""Predictors of folders and variants, and checkpoints that cannot be one."""

import pytest
import safetensors.torch
import torch
from PIL import Image

import pvt_hf
from pvt_hf.prediction import loading
from pvt_hf.prediction.loading import ModelError, load_predictor
from tests.support.checkpoints import TINY, equal, official_weights, save
from tests.support.small_models import small_config


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    pvt_hf.PvtV2ForImageClassification(small_config("v2")).save_pretrained(folder)
    pvt_hf.PvtImageProcessor(crop_size=32).save_pretrained(folder)
    return folder


def test_folder_is_loaded_in_a_dtype_with_settings(classifier):
    predictor = load_predictor(str(classifier), device="cpu", dtype="bfloat16", top_k=3)
    assert predictor.model.dtype == torch.bfloat16 and not predictor.model.training
    (found,) = predictor([Image.new("RGB", (40, 50))])
    assert len(found.list_best()) == 3 and found.scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cud"}, "`device` must be one that torch has here, such as cpu, got 'cud': "),
        ({"device": "cuda"}, "`device` must be one that torch has here, such as cpu, got 'cuda': "),
        ({"dtype": "int8"}, "`dtype` must be one of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_unknown_device_and_dtype_are_errors(classifier, arguments, message):
    if arguments.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=message):
        load_predictor(str(classifier), **arguments)


def test_checkpoint_that_leaves_tensors_at_random_is_an_error(classifier, tmp_path):
    for file in classifier.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights["classifier.weight"]  # which fine-tuning may lack, and predictions may not
    safetensors.torch.save_file(weights | {"x": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors \['classifier.weight'\], and has 1 tensors \['x'\] without"):
        load_predictor(str(tmp_path))
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=f"{tmp_path} cannot be loaded: .*preprocessor_config.json"):
        load_predictor(str(tmp_path))


def test_other_things_than_models_are_errors(classifier, tmp_path):
    with pytest.raises(ModelError, match=r"config.json is a file: .*`pvt-hf convert` makes a folder"):
        load_predictor(str(classifier / "config.json"))
    with pytest.raises(ModelError, match="cannot be loaded: it must be a folder with a model's config.json"):
        load_predictor(str(tmp_path))
    pvt_hf.PvtV2Model(small_config("v2")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="predicts nothing: the model is a PvtV2Model: it must be a classifier"):
        load_predictor(str(tmp_path))


def test_variant_is_converted_once(tmp_path, monkeypatch):
    """Of the file that the release's address gives, here a file of a small variant that was downloaded before."""
    monkeypatch.setattr(loading, "HF_HOME", str(tmp_path))
    monkeypatch.setitem(pvt_hf.VARIANTS, "tiny_v2", TINY["v2"])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    save(official_weights(TINY["v2"]), tmp_path / "checkpoints" / "tiny_v2.pth")
    assert loading.find_converted("tiny_v2") is None
    first = load_predictor("tiny_v2").model
    (tmp_path / "checkpoints" / "tiny_v2.pth").unlink()
    again = load_predictor("tiny_v2").model
    assert equal(again.state_dict(), first.state_dict()) and first.config.id2label[0] == "tench"
    (tmp_path / "pvt_hf" / "converted" / "tiny_v2" / "config.json").unlink()
    (tmp_path / "checkpoints" / "tiny_v2.pth").write_text("<html>")
    with pytest.raises(ModelError, match="tiny_v2"):
        load_predictor("tiny_v2")
