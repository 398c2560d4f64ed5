"""Checkpoints go both ways between pvt_hf and transformers' own classes, and nothing loads half."""

import json

import pytest
import safetensors.torch
import torch
import transformers

import pvt_hf
from tests.support.processes import run_python
from tests.support.small_models import STAGES, randomize, small_config

NATIVE = {
    "v1": (transformers.PvtConfig, transformers.PvtForImageClassification, transformers.PvtModel),
    "v2": (transformers.PvtV2Config, transformers.PvtV2ForImageClassification, transformers.PvtV2Model),
}
OURS = {
    "v1": (pvt_hf.PvtForImageClassification, pvt_hf.PvtModel, pvt_hf.PvtBackbone),
    "v2": (pvt_hf.PvtV2ForImageClassification, pvt_hf.PvtV2Model, pvt_hf.PvtV2Backbone),
}
VERSIONS = pytest.mark.parametrize("version", ["v1", "v2"])


@torch.no_grad()
@VERSIONS
def test_transformers_checkpoint_loads_here(version, tmp_path):
    config_class, *native_classes = NATIVE[version]
    config = small_config(version, image_size=224)
    for native_class, our_class in zip(native_classes, OURS[version], strict=False):
        native = randomize(native_class(config_class(**config.to_diff_dict()))).eval()
        native.save_pretrained(tmp_path)
        loaded, info = our_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert {key: value.shape for key, value in loaded.state_dict().items()} == {
            key: value.shape for key, value in native.state_dict().items()
        }
        pixels = torch.randn(2, 3, 224, 224)
        # Only the epsilon of some norms differs (1e-6 there, 1e-5 here, as official).
        torch.testing.assert_close(loaded(pixels)[0], native(pixels)[0], rtol=0, atol=2e-2)


CHECK_NATIVE = """
import sys, torch, transformers
assert "pvt_hf" not in sys.modules
for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert type(model).__module__.startswith("transformers."), type(model)
    assert not any(info.values()), info
    expected = torch.load(folder + "/expected.pt", weights_only=True)
    for module_name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm) and ("patch_embedding" in module_name or "attention" in module_name):
            module.eps = 1e-5
    output = model.eval()(expected["pixels"])
    output = output.feature_maps if "Backbone" in name else output[:1]
    for actual, tensor in zip(output, expected["output"], strict=True):
        torch.testing.assert_close(actual, tensor, rtol=0, atol=1e-4)
    print(name)
"""


@pytest.mark.process
@torch.no_grad()
def test_our_checkpoint_loads_in_a_process_without_pvt_hf(tmp_path):
    arguments = []
    for version, classes in OURS.items():
        for our_class in classes:
            name = our_class.__name__
            if name == "PvtBackbone":  # transformers has none
                continue
            config = small_config(version, image_size=224, num_labels=7, out_features=STAGES)
            model = randomize(our_class(config)).eval()
            model.save_pretrained(tmp_path / name)
            pixels = torch.randn(1, 3, 224, 224)
            output = model(pixels)
            output = list(output.feature_maps) if "Backbone" in name else [output[0]]
            torch.save({"pixels": pixels, "output": output}, tmp_path / name / "expected.pt")
            arguments += [str(tmp_path / name), name]
    assert len(run_python(CHECK_NATIVE, *arguments).split()) == 5


@pytest.fixture(params=["v1", "v2"])
def saved(request, tmp_path):
    model = OURS[request.param][0](small_config(request.param))
    model.save_pretrained(tmp_path)
    return model, tmp_path


def rewrite(folder, change) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def test_checkpoint_that_lacks_a_tensor_is_refused(saved):
    model, folder = saved
    lost = next(key for key in model.state_dict() if "attention" in key and "key.weight" in key)
    rewrite(folder, lambda weights: {key: value for key, value in weights.items() if key != lost})
    with pytest.raises(
        ValueError,
        match=rf"(?s)complete checkpoint of this {type(model).__name__}.*another shape, 1 tensors.*key",
    ):
        type(model).from_pretrained(folder)
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        transformers.AutoModelForImageClassification.from_pretrained(folder)


def test_checkpoint_of_a_deeper_model_is_refused(saved):
    model, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["depths"][1] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="in another shape, none, and has [1-9][0-9]* tensors .* without a place"):
        type(model).from_pretrained(folder)


def test_foreign_checkpoint_is_refused(saved):
    model, folder = saved
    rewrite(folder, lambda weights: {f"foreign.{index}": value for index, value in enumerate(weights.values())})
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        type(model).from_pretrained(folder)


def test_truncated_file_is_refused(saved):
    model, folder = saved
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(Exception, match="(?i)incomplete|header|deserializing"):
        type(model).from_pretrained(folder)
