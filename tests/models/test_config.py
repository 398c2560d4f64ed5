"""Configurations: labels, sizes, backbone features, and errors that say what is wrong."""

import copy
import json

import pytest
import torch
import transformers

import pvt_hf
from pvt_hf.models.backbone import build_backbone
from tests.support.small_models import SMALL_V1, small_config

BOTH = pytest.mark.parametrize("config_class", [pvt_hf.PvtConfig, pvt_hf.PvtV2Config])
DENSE = [
    pvt_hf.RetinaNetConfig,
    pvt_hf.ATSSConfig,
    pvt_hf.GFLConfig,
    pvt_hf.MaskRCNNConfig,
    pvt_hf.SemanticFPNConfig,
]
EVERY = pytest.mark.parametrize("config_class", [pvt_hf.PvtConfig, pvt_hf.PvtV2Config, *DENSE])


@BOTH
def test_id2label_alone_sets_the_number_of_classes(config_class):
    config = config_class(id2label={0: "a", 1: "b", 2: "c"})
    assert config.num_labels == 3
    model_class = {pvt_hf.PvtConfig: pvt_hf.PvtForImageClassification}.get(
        config_class, pvt_hf.PvtV2ForImageClassification
    )
    assert model_class(config_class(**(config.to_dict() | {"depths": [1, 1, 1, 1]}))).classifier.out_features == 3


def test_default_number_of_classes_is_transformers():
    assert pvt_hf.PvtConfig().num_labels == 1000
    assert pvt_hf.PvtV2Config().num_labels == 2


@EVERY
@pytest.mark.parametrize(
    "labels",
    [{"num_labels": 1}, {"num_labels": 2}, {"id2label": {0: "cat", 1: "dog"}}],
    ids=str,
)
def test_classes_survive_every_copy(config_class, labels, tmp_path):
    """Two classes without names are transformers' default, which it does not write."""
    config = config_class(**labels)
    if "num_labels" in labels:
        assert config.num_labels == labels["num_labels"]
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_labels"] == config.num_labels
    for copied in (
        config_class.from_pretrained(tmp_path),
        config_class(**config.to_dict()),
        config_class.from_dict(config.to_diff_dict()),
        copy.deepcopy(config),
    ):
        assert (copied.num_labels, copied.id2label) == (config.num_labels, config.id2label)
    assert config_class.from_pretrained(tmp_path, num_labels=12).num_labels == 12
    assert config_class.from_pretrained(tmp_path, id2label={0: "x"}).num_labels == 1


@pytest.mark.parametrize("config_class", [*DENSE, transformers.DetrConfig])
def test_classes_of_a_backbone_survive(config_class, tmp_path):
    config_class(backbone_config=pvt_hf.PvtConfig(num_labels=2), num_labels=2).save_pretrained(tmp_path)
    config = config_class.from_pretrained(tmp_path)
    assert (config.num_labels, config.backbone_config.num_labels) == (2, 2)


@EVERY
def test_class_names_by_string_keys_are_read_as_in_json(config_class, tmp_path):
    config = config_class(id2label={"0": "cat", "1": "dog"})
    assert config.id2label == {0: "cat", 1: "dog"}
    config.id2label = {"0": "owl"}
    assert config.id2label == {0: "owl"}
    config.save_pretrained(tmp_path)
    assert config_class.from_pretrained(tmp_path, id2label={"0": "bat"}).id2label == {0: "bat"}


@EVERY
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {"cat": "0"}}, "`id2label` must map class indices to names, got the key 'cat'; see `label2id`"),
        ({"id2label": ["cat"]}, "`id2label` must map class indices to names, got a list"),
        ({"num_labels": -1}, "`num_labels` must be a number of classes, got -1"),
        ({"num_labels": 2.0}, "`num_labels` must be a number of classes, got 2.0"),
        (
            {"problem_type": "single"},
            "`problem_type` must be one of .*'single_label_classification'.* or None, got 'single'",
        ),
    ],
    ids=["names as keys", "list", "negative", "float", "problem type"],
)
def test_wrong_labels_are_refused(config_class, fields, message):
    with pytest.raises(ValueError, match=message):
        config_class(**fields)
    config = config_class()
    with pytest.raises(ValueError, match=message):
        setattr(config, *next(iter(fields.items())))


@BOTH
def test_saved_configuration_loads_unchanged(config_class, tmp_path):
    config = config_class(image_size=(96, 160), depths=[1, 2, 3, 4], out_features=["stage2", "stage4"])
    config.save_pretrained(tmp_path)
    loaded = config_class.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.out_indices == [1, 3]


def test_image_size_is_a_number_or_a_pair():
    assert pvt_hf.PvtConfig(image_size=224).image_shape == (224, 224)
    assert pvt_hf.PvtConfig(image_size=[96, 160]).image_shape == (96, 160)
    model = pvt_hf.PvtBackbone(small_config("v1", image_size=(96, 160), out_features=["stage4"]))
    assert [embedding.grid for embedding in model.encoder.patch_embeddings] == [(24, 40), (12, 20), (6, 10), (3, 5)]
    assert model.encoder.patch_embeddings[3].position_embeddings.shape == (1, 1 + 15, 32)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_sizes": [8, 16, 24, 30]}, r"`hidden_sizes\[3\]` must be divisible by .*got 30 and 4"),
        ({"depths": [1, 1, 1]}, r"`depths` must have one value for each of the 4 stages.*got 3: \[1, 1, 1\]"),
        ({"mlp_ratios": [2] * 5}, "`mlp_ratios` must have one value for each of the 4 stages.*got 5"),
        ({"num_encoder_blocks": 3}, "`depths` must have one value for each of the 3 stages.*got 4"),
        ({"out_features": ["stage5"]}, "out_features must be a subset of stage_names.*stage5"),
    ],
    ids=["heads", "depths", "mlp_ratios", "stages", "out_features"],
)
def test_wrong_fields_are_refused(version, fields, message):
    with pytest.raises(ValueError, match=message):
        small_config(version, **fields)


def test_v1_cannot_reduce_the_cls_token():
    with pytest.raises(ValueError, match=r"`sequence_reduction_ratios\[-1\]` must be 1.*got 2"):
        pvt_hf.PvtModel(small_config("v1", sequence_reduction_ratios=[8, 4, 2, 2]))


def test_v1_image_size_has_to_hold_every_stage():
    with pytest.raises(ValueError, match="`image_size` must be at least 32, got 16"):
        pvt_hf.PvtModel(small_config("v1", image_size=16))


def test_wrong_image_size_is_refused():
    with pytest.raises(ValueError, match=r"`image_size` must be one number or \(height, width\), got \[224\]"):
        pvt_hf.PvtConfig(image_size=[224])


def test_overlapping_v1_kernels_need_a_larger_image():
    model = pvt_hf.PvtBackbone(small_config("v1", patch_sizes=[7, 3, 3, 3], out_features=["stage4"]))
    smallest = model.encoder.minimum_size
    model(torch.zeros(1, 3, smallest, smallest))
    with pytest.raises(ValueError, match=f"at least {smallest} pixels"):
        model(torch.zeros(1, 3, smallest - 1, smallest))


def test_models_may_have_three_stages():
    fields = {key: value[:3] if isinstance(value, list) else value for key, value in SMALL_V1.items()}
    fields |= {"sequence_reduction_ratios": [4, 2, 1], "patch_sizes": [4, 2, 2], "strides": [4, 2, 2]}
    config = pvt_hf.PvtConfig(num_encoder_blocks=3, **fields)
    assert config.stage_names == ["stage1", "stage2", "stage3"]
    assert pvt_hf.PvtForImageClassification(config).pvt.encoder.minimum_size == 16


@pytest.mark.parametrize("config_class", DENSE)
def test_stages_that_a_head_wants_are_no_field(config_class, tmp_path):
    """They are the default backbone's `out_features`, and any other backbone has to give as many maps."""
    config = config_class()
    wanted = config_class.backbone_out_features
    assert config.backbone_config.out_features == list(wanted)
    config.save_pretrained(tmp_path)
    assert "backbone_out_features" not in (tmp_path / "config.json").read_text()
    assert config_class.from_pretrained(tmp_path).to_dict() == config.to_dict()
    resnet = transformers.ResNetConfig(hidden_sizes=[8] * 4, depths=[1] * 4, out_indices=[*range(1, len(wanted) + 1)])
    assert len(build_backbone(config_class(backbone_config=resnet)).channels) == len(wanted)
    resnet.out_features = ["stem", *resnet.out_features]
    with pytest.raises(ValueError, match=rf"`backbone_config` .* must name {len(wanted)} `out_features`, got"):
        build_backbone(config_class(backbone_config=resnet))
