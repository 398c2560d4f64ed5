"""The relatives of DETR in transformers, on PVT backbones: they train, save and load."""

import pytest
import torch
import transformers
from transformers import AutoModelForObjectDetection

from tests.support.small_models import randomize, small_config

SIZES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5}
# Its group norms need 32 channels.
DEFORMABLE = {**SIZES, **HEADS, "d_model": 32, "num_feature_levels": 3, "encoder_n_points": 2, "decoder_n_points": 2}
# RT-DETR and its kin read three maps, whose channels they have to be told.
HYBRID = {
    **SIZES,
    **HEADS,
    "encoder_in_channels": [16, 24, 32],
    "encoder_hidden_dim": 16,
    "decoder_in_channels": [16, 16, 16],
    "encode_proj_layers": [2],
    "num_denoising": 0,
    "decoder_n_points": 2,
    "hidden_expansion": 0.5,
    "auxiliary_loss": True,
}
D_FINE = {**HYBRID, "decoder_n_points": [2, 2, 2], "lqe_hidden_dim": 16, "max_num_bins": 8, "depth_mult": 0.34}
LAST, LAST_THREE = ["stage4"], ["stage2", "stage3", "stage4"]
# name of the model, fields of its configuration, feature maps
FAMILY = [
    ("ConditionalDetr", {**SIZES, **HEADS}, LAST),
    ("DabDetr", {"hidden_size": 16, **{k: v for k, v in (SIZES | HEADS).items() if k != "d_model"}}, LAST),
    ("DeformableDetr", DEFORMABLE, LAST_THREE),
    ("RTDetr", HYBRID, LAST_THREE),
    ("RTDetrV2", HYBRID, LAST_THREE),
    ("DFine", D_FINE, LAST_THREE),
]


@pytest.mark.parametrize(("name", "fields", "out_features"), FAMILY, ids=[row[0] for row in FAMILY])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_model_trains_and_reloads(name, fields, out_features, version, tmp_path):
    config_class = getattr(transformers, f"{name}Config")
    config = config_class(backbone_config=small_config(version, out_features=out_features), num_labels=3, **fields)
    model = randomize(getattr(transformers, f"{name}ForObjectDetection")(config)).train()
    labels = [
        {"class_labels": torch.tensor([index, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.2], [0.3, 0.4, 0.2, 0.2]])}
        for index in range(2)
    ]
    pixels = torch.randn(2, 3, 64, 96)
    outputs = model(pixels, labels=labels)
    assert outputs.logits.shape == (2, 5, 3) and outputs.pred_boxes.shape == (2, 5, 4)
    outputs.loss.backward()
    backbone = next(module for module in model.modules() if type(module).__module__.startswith("pvt_hf."))
    unused = [key for key, parameter in backbone.named_parameters() if parameter.grad is None]
    assert unused == [] and all(parameter.grad.isfinite().all() for parameter in backbone.parameters())

    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    for expected, actual in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert expected[0] == actual[0] and torch.equal(expected[1], actual[1])
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)
