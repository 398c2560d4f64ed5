"""Cascade Mask R-CNN: mmdetection's cascade, detections, masks, losses and gradients, and life as a model of
transformers."""

from functools import partial

import pytest
import torch
import transformers
from torch.testing import assert_close

import pvt_hf
from pvt_hf.conversion import reference_heads
from pvt_hf.conversion.architectures.cascade_mask_rcnn import CascadeMaskRCNN
from pvt_hf.models.post_processing import detect_objects, segment_instances
from pvt_hf.models.two_stage import average_logits
from tests.models.test_mask_rcnn import INPUT_SIZE, OBJECTS, ORIGINAL, SIZES, labels_of, masks_of, reference_outputs
from tests.support import checkpoints, detectors, head_shapes
from tests.support import reference_cascade as cascade
from tests.support import reference_detection as loops
from tests.support.detectors import CHANNELS, CLASSES, backbone_config, padded_batch, standardize, tiny_backbone
from tests.support.small_models import STAGES, randomize

SAMPLES = (24, 4, 12, 4)  # anchors, positive ones, RoIs, positive ones: so few that there is something to draw
FEW = {"num_candidates_train": 30, "num_proposals_train": 30, "num_candidates": 20, "num_proposals": 20}


def official_weights(variant):
    """Objectness and class scores of all sizes, and boxes in some distance from their anchors and proposals."""
    options = {"channels": CHANNELS, "num_labels": CLASSES, "hidden": 32}
    weights = head_shapes.checkpoint_weights(head_shapes.cascade_mask_rcnn, variant, std=0.1, **options)
    weights = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in weights.items()}
    pixels = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    levels, raw, _ = reference_outputs(weights, pixels)
    logits, deltas = (torch.cat(x, dim=1) for x in zip(*raw, strict=True))
    standardize(weights, "rpn_head.rpn_cls", logits, mean=0, std=2)
    standardize(weights, "rpn_head.rpn_reg", deltas, mean=0, std=0.3)
    boxes = (torch.rand(20, 2).double() * 50).repeat(1, 2) + torch.tensor([0, 0, 20, 25])
    features = loops.roi_features(levels, [boxes.tolist()], 7)
    for stage in range(3):
        logits, deltas = reference_heads.cascade_box_head(weights, features, stage)
        standardize(weights, f"roi_head.bbox_head.{stage}.fc_cls", logits, mean=0, std=1)
        standardize(weights, f"roi_head.bbox_head.{stage}.fc_reg", deltas, mean=0, std=1)
    return weights


def reference_heads_of(weights, batch_statistics=False):
    box_heads = [
        partial(reference_heads.cascade_box_head, weights, stage=stage, batch_statistics=batch_statistics)
        for stage in range(3)
    ]
    return box_heads, [
        partial(reference_heads.mask_head, weights, name=f"roi_head.mask_head.{stage}") for stage in range(3)
    ]


def small_model(backbone="v2", **overrides):
    fields = {"neck_channels": 8, "box_head_size": 16, "num_box_convs": 1, "num_mask_convs": 1} | FEW
    fields |= {"num_labels": CLASSES, "roi_num_samples": 16} | overrides
    config = pvt_hf.CascadeMaskRCNNConfig(backbone_config=backbone_config(backbone, out_features=STAGES), **fields)
    return pvt_hf.CascadeMaskRCNNForInstanceSegmentation(config)


def converted_model(weights, version):
    config = pvt_hf.CascadeMaskRCNNConfig(
        backbone_config=tiny_backbone(version, STAGES),
        neck_channels=CHANNELS,
        box_head_size=32,
        num_labels=CLASSES,
        rpn_num_samples=SAMPLES[0],
        rpn_positive_fraction=SAMPLES[1] / SAMPLES[0],
        roi_num_samples=SAMPLES[2],
        roi_positive_fraction=SAMPLES[3] / SAMPLES[2],
        **FEW,
    )
    return detectors.converted(pvt_hf.CascadeMaskRCNNForInstanceSegmentation(config), weights, CascadeMaskRCNN())


@torch.no_grad()
def test_detections_and_masks_equal_the_reference():
    weights = official_weights(checkpoints.TINY["v2"])
    pixels, mask = padded_batch(SIZES, INPUT_SIZE)
    levels, raw, shapes = reference_outputs(weights, pixels)
    outputs = converted_model(weights, "v2")(pixels, mask)
    proposals = loops.proposals(raw, shapes, SIZES, 20, 20)
    found = cascade.detections(reference_heads_of(weights), levels, proposals, SIZES, ORIGINAL)
    detections = detect_objects(outputs, 0.05, ORIGINAL)
    for index, (wanted, masks) in enumerate(found):
        scores, boxes = (torch.tensor([d[i] for d in wanted], dtype=torch.float64) for i in (0, 2))
        assert len(wanted) > 20
        assert detections[index]["labels"].tolist() == [label for _, label, *_ in wanted]
        assert_close(detections[index]["scores"], scores, rtol=0, atol=1e-10)
        assert_close(detections[index]["boxes"], boxes, rtol=0, atol=1e-9)
        assert_close(outputs.pred_masks[index, : len(masks)].sigmoid(), torch.stack(masks), rtol=0, atol=1e-9)
    assert segment_instances(outputs, 0.05, target_sizes=ORIGINAL)[0]["segmentation"].shape == ORIGINAL[0]


@pytest.mark.parametrize("objects", [OBJECTS, [[], OBJECTS[1]], [[], []]], ids=["default", "one", "none"])
def test_losses_and_gradients_equal_the_reference(objects):
    """With the statistics of all RoIs of the batch."""
    weights = official_weights(checkpoints.TINY["v2"])
    pixels, mask = padded_batch(SIZES, INPUT_SIZE)
    model = converted_model(weights, "v2").train()
    torch.manual_seed(1)
    outputs = model(pixels, mask, labels=labels_of(objects))
    outputs.loss.backward()
    drawn = torch.get_rng_state()

    leaves = {key: value.clone().requires_grad_(value.is_floating_point()) for key, value in weights.items()}
    levels, raw, shapes = reference_outputs(leaves, pixels)
    torch.manual_seed(1)
    heads, masks = reference_heads_of(leaves, batch_statistics=True), [masks_of(image) for image in objects]
    expected = cascade.losses(heads, levels, raw, shapes, SIZES, INPUT_SIZE, objects, masks, SAMPLES, 30)
    assert torch.equal(torch.get_rng_state(), drawn)
    sum(expected.values()).backward()
    assert outputs.loss_dict.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(outputs.loss_dict[name], value, rtol=1e-9, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}")
    gradients = {key: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for key, leaf in leaves.items()}
    gradients = CascadeMaskRCNN().from_official(gradients)
    largest = max(gradient.double().norm() for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).norm() <= 1e-8 * largest, name


def test_logits_of_a_mean_probability_are_finite():
    logits = torch.tensor([[-200.0, 200, 1, -3], [-200, 200, -1, 5], [-100, 300, 0.5, 2]], dtype=torch.float64)
    mean = average_logits(list(logits))
    assert mean.isfinite().all()
    assert_close(mean.sigmoid(), logits.sigmoid().mean(dim=0), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("backbone", "masks"), [("v1", True), ("v2_linear", False), ("resnet", True)])
def test_trained_model_reloads(backbone, masks, tmp_path):
    """Without masks it is Cascade R-CNN."""
    model = small_model(backbone, use_masks=masks).train()
    pixels, mask = padded_batch(SIZES, INPUT_SIZE, torch.float32)
    outputs = model(pixels, mask, labels=labels_of(OBJECTS))
    outputs.loss.backward()
    assert len(outputs.loss_dict) == 2 + 3 * (2 + masks) and outputs.scores is None
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    randomize(model).eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(pixels, mask)
        for auto_class in (
            transformers.AutoModelForInstanceSegmentation,
            transformers.AutoModelForImageSegmentation,
            transformers.AutoModelForObjectDetection,
        ):
            loaded = auto_class.from_pretrained(tmp_path)
            assert type(loaded) is pvt_hf.CascadeMaskRCNNForInstanceSegmentation
            assert_close(dict(loaded(pixels, mask)), dict(expected), rtol=0, atol=0)
    assert ("pred_masks" in expected) == masks


@torch.no_grad()
def test_another_number_of_classes_keeps_all_other_tensors(tmp_path):
    model = randomize(small_model())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    saved, kept = model.state_dict(), loaded.state_dict()
    new = {name for name in saved if kept[name].shape != saved[name].shape}
    parts = ("box_heads.{}.class_predictor", "box_heads.{}.box_predictor", "mask_heads.{}.predictor")
    assert {name.rsplit(".", 1)[0] for name in new} == {part.format(stage) for part in parts for stage in range(3)}
    assert all(torch.equal(kept[name], saved[name]) for name in saved.keys() - new)


@torch.no_grad()
def test_initialisation_is_mmdetections():
    """Upsampling and predictor of the masks are as PyTorch has them."""
    model = small_model(neck_channels=64, box_head_size=256, num_box_convs=2, num_mask_convs=2)
    for name, parameter in (*model.box_heads.named_parameters(), *model.mask_heads.named_parameters()):
        kernel = parameter[0, 0].numel() if parameter.ndim == 4 else 1
        if ".bn." in name:
            assert parameter.unique().tolist() == [float(name.endswith("weight"))], name
        elif ".upsample." in name or ".predictor." in name:
            bound = (64 * (4 if ".upsample." in name else 1)) ** -0.5
            assert 0.5 * bound < parameter.abs().max() <= bound, name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif ".convs." in name:
            assert abs(parameter.std() / (2 / (64 * kernel)) ** 0.5 - 1) < 0.1, name
        else:
            assert abs(parameter.std() / (2 / sum(parameter.shape)) ** 0.5 - 1) < 0.1, name


def test_image_without_an_anchor_inside_has_a_loss():
    model = small_model().train()
    size = (32, 32)  # the smallest anchors are as large
    label = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
    outputs = model(torch.randn(1, 3, *size), labels=[label | {"masks": torch.ones(1, *size)}])
    outputs.loss.backward()
    assert outputs.loss.isfinite() and outputs.loss_dict["loss_objectness"] == 0


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="`strides` must have one value for each of the 5 levels"):
        pvt_hf.CascadeMaskRCNNConfig(strides=[4])
    with pytest.raises(ValueError, match=r"`box_stds` must have one value for each stage, got .*thresholds': 2"):
        pvt_hf.CascadeMaskRCNNConfig(roi_iou_thresholds=[0.5, 0.6])
