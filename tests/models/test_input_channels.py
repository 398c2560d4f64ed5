"""A first convolution for another number of channels, from the pretrained one."""

import pytest
import torch
from timm.models._manipulate import adapt_input_conv

import pvt_hf
from tests.support.small_models import STAGES, randomize, small_config

BOTH = pytest.mark.parametrize(
    ("version", "model_class"), [("v1", pvt_hf.PvtForImageClassification), ("v2", pvt_hf.PvtV2Backbone)]
)


def last_output(model, pixels: torch.Tensor) -> torch.Tensor:
    return model(pixels, return_dict=False)[0][-1]


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("num_channels", [1, 7])
def test_weights_are_timms(version, model_class, num_channels, tmp_path):
    model, grey = randomize(model_class(small_config(version))).eval(), torch.randn(2, 1, 64, 64)
    expected, weight = last_output(model, grey.expand(-1, 3, -1, -1)), model.get_input_embeddings().weight.clone()
    assert model.resize_input_channels(num_channels) is model.get_input_embeddings()
    adapted = model.get_input_embeddings().weight
    torch.testing.assert_close(adapted, adapt_input_conv(num_channels, weight))
    if num_channels == 1:
        torch.testing.assert_close(last_output(model, grey), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert loaded.config.num_channels == num_channels and torch.equal(loaded.get_input_embeddings().weight, adapted)
    with pytest.raises(ValueError, match=f"`pixel_values` must have {num_channels} channels"):
        loaded(torch.zeros(1, 3, 64, 64))


@BOTH
def test_other_channels_are_never_new_weights(version, model_class, tmp_path):
    model = model_class(small_config(version))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`output_loading_info=True`.*For 1 input.*`resize_input_channels`") as error:
        model_class.from_pretrained(tmp_path, num_channels=1, ignore_mismatched_sizes=True)
    assert "image_size" not in str(error.value)
    with pytest.raises(ValueError, match="`num_channels` must be a positive number, got 0"):
        model.resize_input_channels(0)


def test_another_image_size_is_not_needed(tmp_path):
    pvt_hf.PvtModel(small_config("v1")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="images of any size without another `image_size` than the checkpoint's"):
        pvt_hf.PvtModel.from_pretrained(tmp_path, image_size=128, ignore_mismatched_sizes=True)


@torch.no_grad()
def test_heads_resize_the_channels_of_their_backbone(tmp_path):
    backbone = small_config("v2", out_features=STAGES)
    config = pvt_hf.SemanticFPNConfig(backbone_config=backbone, neck_channels=8, head_channels=8, num_labels=3)
    model = pvt_hf.SemanticFPNForSemanticSegmentation(config).eval()
    model.resize_input_channels(1)
    model.save_pretrained(tmp_path)
    loaded = pvt_hf.SemanticFPNForSemanticSegmentation.from_pretrained(tmp_path)
    pixels = torch.randn(1, 1, 64, 64)
    torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits)
