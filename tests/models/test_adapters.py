"""PEFT on the models: its wrappers for encoders and classifiers, and the modules that adapters go to."""

import peft
import pytest
import torch

import pvt_hf
from tests.support.small_models import randomize, small_config

VERSIONS = pytest.mark.parametrize("version", ["v1", "v2", "v2_linear"])
ATTENTION = ["query", "key", "value"]


def build(version, kind):
    model_class = getattr(pvt_hf, f"Pvt{'' if version == 'v1' else 'V2'}{kind}")
    return randomize(model_class(small_config(version, depths=[1, 1, 1, 1])))


@VERSIONS
def test_encoders_take_adapters(version):
    config = peft.LoraConfig(r=2, target_modules=ATTENTION, task_type="FEATURE_EXTRACTION")
    model, pixels = build(version, "Model").eval(), torch.randn(2, 3, 64, 64)
    expected = model(pixels).pooler_output
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(adapted(pixel_values=pixels).pooler_output, expected, rtol=1e-4, atol=1e-5)
    adapted(pixel_values=pixels).pooler_output.sum().backward()
    with_gradients = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert len(with_gradients) == 2 * len(ATTENTION) * 4 and all("lora_" in name for name in with_gradients)


@VERSIONS
def test_classifiers_take_adapters(version):
    config = peft.LoraConfig(r=2, target_modules=ATTENTION, task_type="SEQ_CLS")
    adapted = peft.get_peft_model(build(version, "ForImageClassification"), config)
    adapted(pixel_values=torch.randn(2, 3, 64, 64), labels=torch.tensor([0, 4])).loss.backward()
    with_gradients = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert {name for name in with_gradients if "lora_" not in name} == {
        f"base_model.model.classifier.modules_to_save.default.{name}" for name in ("weight", "bias")
    }


def test_depth_wise_convolutions_are_named_with_their_wrapper():
    """`dwconv` alone names the wrapper too. (PEFT wants a rank that is a multiple of the groups.)"""
    config = peft.LoraConfig(r=192, target_modules=["dwconv.dwconv"])
    adapted = peft.get_peft_model(build("v2", "Model"), config)
    names = [name for name, _ in adapted.named_modules() if name.endswith("lora_A.default")]
    assert len(names) == 4 and all(".mlp.dwconv.dwconv." in name for name in names)
    adapted(pixel_values=torch.randn(1, 3, 64, 64))


def test_the_wrapper_of_a_depth_wise_convolution_is_refused_by_name():
    with pytest.raises(ValueError, match="Target module PvtV2DepthWiseConv"):
        peft.get_peft_model(build("v2", "Model"), peft.LoraConfig(r=64, target_modules=["dwconv"]))
