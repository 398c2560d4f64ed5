"""The segmentation models of transformers on the backbones of pvt_hf: train, save, reload, predict in a pipeline."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import pipeline

import pvt_hf
from tests.support.small_models import STAGES, randomize, small_config

SEMANTIC = {"labels": torch.randint(0, 4, (2, 64, 64), generator=torch.Generator().manual_seed(0))}
MASKS = {"mask_labels": [torch.ones(1, 64, 64)] * 2, "class_labels": [torch.tensor([1])] * 2}
NAMES = {"id2label": {0: "sky", 1: "tree", 2: "road", 3: "car"}, "num_labels": 4}
NAMES["label2id"] = {name: index for index, name in NAMES["id2label"].items()}


def upernet(version):
    config = small_config(version, out_features=STAGES)
    config = transformers.UperNetConfig(backbone_config=config, hidden_size=16, auxiliary_in_channels=24, **NAMES)
    return transformers.UperNetForSemanticSegmentation(config), SEMANTIC


def maskformer(version):
    decoder = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5, "encoder_ffn_dim": 32}
    decoder |= {"decoder_attention_heads": 2, "encoder_attention_heads": 2, "decoder_ffn_dim": 32}
    config = transformers.MaskFormerConfig(
        backbone_config=small_config(version, out_features=STAGES),
        decoder_config=transformers.DetrConfig(**decoder),
        fpn_feature_size=32,
        mask_feature_size=32,
        **NAMES,
    )
    return transformers.MaskFormerForInstanceSegmentation(config), MASKS


def mask2former(version):
    fields = dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size", "dim_feedforward"), 32)
    fields |= {"encoder_feedforward_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2}
    config = small_config(version, out_features=STAGES)
    config = transformers.Mask2FormerConfig(backbone_config=config, num_queries=5, **fields, **NAMES)
    return transformers.Mask2FormerForUniversalSegmentation(config), MASKS


def dpt(version):
    """The hybrid, whose own transformer goes on from the backbone's third map, at stride 16."""
    config = transformers.DPTConfig(
        backbone_config=small_config(version, out_features=STAGES[:3]),
        is_hybrid=True,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=64,
        patch_size=16,
        backbone_featmap_shape=[1, 24, 4, 4],
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 16, 24, 32],
        neck_ignore_stages=[0, 1],
        fusion_hidden_size=16,
        **NAMES,
    )
    return transformers.DPTForSemanticSegmentation(config), SEMANTIC


SIZE = {"height": 64, "width": 64}
PROCESSORS = {
    upernet: transformers.SegformerImageProcessor(size=SIZE),
    maskformer: transformers.MaskFormerImageProcessor(size=SIZE),
    mask2former: transformers.Mask2FormerImageProcessor(size=SIZE),
    dpt: transformers.DPTImageProcessor(size=SIZE),
}
HEADS = pytest.mark.parametrize("head", PROCESSORS, ids=lambda head: head.__name__)
VERSIONS = pytest.mark.parametrize("version", ["v1", "v2"])


def backbone_of(model):
    (backbone,) = (m for m in model.modules() if isinstance(m, pvt_hf.PvtBackbone | pvt_hf.PvtV2Backbone))
    return backbone


@HEADS
@VERSIONS
def test_head_trains_reloads_and_runs_in_a_pipeline(head, version, tmp_path):
    """Every weight of the backbone is reached; a reloaded model is equal; the pipeline makes masks of an image."""
    model, labels = head(version)
    pixels = torch.randn(2, 3, 64, 64)
    model(pixels, **labels).loss.sum().backward()
    # The losses of a random mask transformer may not reach a few biases.
    reached = {name for name, p in backbone_of(model).named_parameters() if p.grad is not None and p.grad.any()}
    assert reached >= {name for name, _ in backbone_of(model).named_parameters() if name.endswith("weight")}

    model.eval().save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and type(backbone_of(loaded)) is type(backbone_of(model))
    with torch.no_grad():
        for actual, expected in zip(loaded(pixels).to_tuple(), model(pixels).to_tuple(), strict=True):
            if isinstance(actual, torch.Tensor):
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)

    PROCESSORS[head].save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8))
    segments = pipeline("image-segmentation", model=str(tmp_path))(image, subtask="semantic")
    assert segments and {segment["label"] for segment in segments} <= set(NAMES["label2id"])
    assert all(segment["mask"].size == (90, 70) for segment in segments)
    assert sum(np.asarray(segment["mask"]).astype(bool) for segment in segments).max() == 1  # no pixel twice


@HEADS
@VERSIONS
def test_pretrained_backbone_fills_every_tensor_of_it(head, version, tmp_path):
    classifier_class = pvt_hf.PvtForImageClassification if version == "v1" else pvt_hf.PvtV2ForImageClassification
    classifier = randomize(classifier_class(small_config(version)))
    classifier.save_pretrained(tmp_path)
    model, _ = head(version)
    backbone = backbone_of(model)
    assert pvt_hf.load_pretrained_backbone(model, str(tmp_path)) == len(backbone.state_dict())
    weights = classifier.base_model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in backbone.state_dict().items())


@VERSIONS
def test_backbone_may_come_from_a_detector(version, tmp_path):
    """A segmenter may start from what a detector has learnt, if the backbones are the same."""
    config = pvt_hf.RetinaNetConfig(
        backbone_config=small_config(version, out_features=STAGES[1:]), num_labels=3, neck_channels=16
    )
    detector = randomize(pvt_hf.RetinaNetForObjectDetection(config))
    detector.save_pretrained(tmp_path / "detector")
    config = pvt_hf.SemanticFPNConfig(backbone_config=small_config(version, out_features=STAGES), num_labels=4)
    segmenter = pvt_hf.SemanticFPNForSemanticSegmentation(config)
    backbone, weights = segmenter.backbone, detector.backbone.state_dict()
    assert pvt_hf.load_pretrained_backbone(segmenter, tmp_path / "detector") == len(weights)
    assert all(torch.equal(value, weights[key]) for key, value in backbone.state_dict().items())

    detector.config.backbone_config.num_attention_heads = [1, 1, 1, 1]
    detector.save_pretrained(tmp_path / "heads")
    with pytest.raises(ValueError, match=r"num_attention_heads is \[1, 1, 1, 1\]"):
        pvt_hf.load_pretrained_backbone(segmenter, tmp_path / "heads")
    lost = {key: value for key, value in detector.state_dict().items() if "backbone.encoder" not in key}
    detector.config.backbone_config.num_attention_heads = config.backbone_config.num_attention_heads
    detector.save_pretrained(tmp_path / "lost", state_dict=lost)
    with pytest.raises(ValueError, match="does not fill the backbone"):
        pvt_hf.load_pretrained_backbone(segmenter, tmp_path / "lost")


@VERSIONS
def test_hooks_of_dpt_are_not_doubled(version):
    """DPT captures hidden states with hooks of its own; the backbone's maps must not depend on hooks."""
    model, _ = dpt(version)
    output = model.eval()(torch.randn(2, 3, 64, 64), output_hidden_states=True)
    assert output.logits.shape == (2, 4, 64, 64) and len(output.hidden_states) == 1 + 4
