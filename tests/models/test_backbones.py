"""Backbones: which stages exist and run, loading from classifiers, and use inside transformers' dense models."""

import pytest
import torch
import transformers

import pvt_hf
from tests.support.small_models import STAGES, randomize, small_config

BOTH = pytest.mark.parametrize("version", ["v1", "v2"])


def backbone_class(version):
    return pvt_hf.PvtBackbone if version == "v1" else pvt_hf.PvtV2Backbone


def classifier_class(version):
    return pvt_hf.PvtForImageClassification if version == "v1" else pvt_hf.PvtV2ForImageClassification


@BOTH
@pytest.mark.parametrize("out_features", [["stage1"], ["stage2", "stage3"], STAGES], ids=str)
def test_stages_after_the_last_feature_do_not_exist(version, out_features):
    backbone = backbone_class(version)(small_config(version, out_features=out_features)).train()
    stages = backbone.encoder.block if version == "v1" else backbone.encoder.layers
    assert len(stages) == int(out_features[-1][-1])
    maps = backbone(torch.randn(1, 3, 64, 64)).feature_maps
    assert [feature_map.shape[1] for feature_map in maps] == backbone.channels
    assert len(maps) == len(out_features)
    sum(feature_map.sum() for feature_map in maps).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@BOTH
def test_negative_indices_count_from_the_last_stage(version):
    config = small_config(version, out_indices=[0, -1])
    maps = backbone_class(version)(config)(torch.randn(1, 3, 64, 64)).feature_maps
    assert [feature_map.shape[1] for feature_map in maps] == [8, 32]


@BOTH
def test_features_beyond_the_built_stages_are_refused(version):
    backbone = backbone_class(version)(small_config(version, out_features=["stage2"]))
    backbone.out_features = ["stage1", "stage4"]
    with pytest.raises(ValueError, match="`out_features` asks for 'stage4', but .* built up to 'stage2'"):
        backbone(torch.randn(1, 3, 64, 64))


@BOTH
@pytest.mark.parametrize("out_features", [["stage3"], STAGES], ids=str)
@pytest.mark.parametrize("source", ["classifier", "model"])
def test_loads_from_a_classification_checkpoint_without_a_word(version, out_features, source, tmp_path, caplog):
    classifier = randomize(classifier_class(version)(small_config(version)))
    (classifier if source == "classifier" else classifier.base_model).save_pretrained(tmp_path)
    transformers.logging.get_logger("transformers").propagate = True
    backbone, info = backbone_class(version).from_pretrained(
        tmp_path, out_features=out_features, output_loading_info=True
    )
    assert not any(info.values()) and not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    weights = classifier.base_model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in backbone.state_dict().items())


@torch.no_grad()
def test_v1_leaves_the_position_of_the_cls_token_alone():
    backbone = randomize(pvt_hf.PvtBackbone(small_config("v1", out_features=STAGES))).eval()
    names = [name for name, _ in backbone.named_parameters()]
    assert not [name for name in names if "cls_token" in name or name.startswith("encoder.layer_norm")]
    pixels = torch.randn(1, 3, 64, 96)
    before = backbone(pixels).feature_maps[-1]
    backbone.encoder.patch_embeddings[3].position_embeddings[:, 0] = 1e6
    assert torch.equal(backbone(pixels).feature_maps[-1], before)
    backbone.encoder.patch_embeddings[3].position_embeddings[:, 1] = 1e6
    assert not torch.equal(backbone(pixels).feature_maps[-1], before)


TINY = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 5,
    "num_labels": 3,
}


def detr(config):
    config.out_features = ["stage4"]
    model = transformers.DetrForObjectDetection(transformers.DetrConfig(backbone_config=config, **TINY))
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2
    return model, {"labels": labels}, model.model.backbone


@BOTH
def test_detr_trains_and_reloads_with_the_backbone(version, tmp_path):
    """Forward, backward through the backbone, save and reload. (`test_dense_heads.py` has the segmentation models.)"""
    model, labels, backbone = detr(small_config(version, out_features=STAGES))
    assert [type(module) for module in backbone.modules() if "Backbone" in type(module).__name__][-1] is backbone_class(
        version
    )
    pixels = torch.randn(2, 3, 64, 64)
    model(pixels, **labels).loss.sum().backward()
    # The losses of a random model may not reach a few biases; every weight is reached.
    assert all(p.grad is not None for name, p in backbone.named_parameters() if name.endswith("weight"))
    model.eval().save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        for a, b in zip(loaded(pixels).to_tuple(), model(pixels).to_tuple(), strict=True):
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
