"""Sparse R-CNN: mmdetection's refinement, matching, losses, gradients and detections, and life as a model of
transformers."""

import pytest
import torch
import transformers
from torch.testing import assert_close

import pvt_hf
from pvt_hf.conversion import reference_heads
from pvt_hf.conversion.architectures.sparse_rcnn import SparseRCNN
from pvt_hf.models.post_processing import detect_objects
from tests.support import checkpoints, detectors, head_shapes
from tests.support import reference_sparse_rcnn as loops
from tests.support.detectors import CHANNELS, CLASSES, backbone_config, labels_of, padded_batch, tiny_backbone
from tests.support.small_models import STAGES, randomize

SIZES, INPUT_SIZE, ORIGINAL = [(64, 96), (45, 60)], (64, 96), [(127, 193), (45, 61)]
OBJECTS = [
    [([10.0, 12.0, 60.0, 50.0], 1), ([70.0, 40.0, 104.0, 66.0], 4), ([12.0, 10.0, 64.0, 46.0], 0)],  # one reaches out
    [([3.0, 10.0, 48.0, 39.0], 2)],
]
SMALL = {"num_proposals": 6, "num_heads": 2, "dynamic_channels": 4, "ffn_dim": 24}


def official_weights(variant):
    """Learned boxes of all sizes and places, so that heads refine something."""
    options = {"proposals": 6, "heads": 2, "dynamic": 4, "hidden": 24, "channels": CHANNELS, "num_labels": CLASSES}
    weights = head_shapes.checkpoint_weights(head_shapes.sparse_rcnn, variant, std=0.2, **options)
    boxes = weights["rpn_head.init_proposal_bboxes.weight"]
    boxes[:, :2].uniform_(0.2, 0.8), boxes[:, 2:].uniform_(0.1, 1.0)
    return {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in weights.items()}


def small_model(backbone="v2", **overrides):
    fields = {"neck_channels": 16, "num_labels": CLASSES, "num_attention_heads": 2} | SMALL | overrides
    config = pvt_hf.SparseRCNNConfig(backbone_config=backbone_config(backbone, out_features=STAGES), **fields)
    return pvt_hf.SparseRCNNForObjectDetection(config)


def converted_model(weights, version):
    fields = {"neck_channels": CHANNELS, "num_labels": CLASSES} | SMALL
    config = pvt_hf.SparseRCNNConfig(backbone_config=tiny_backbone(version, STAGES), **fields)
    return detectors.converted(pvt_hf.SparseRCNNForObjectDetection(config), weights, SparseRCNN())


def reference_outputs(weights, pixels):
    levels = reference_heads.pyramid(weights, detectors.feature_maps(weights, pixels))
    return reference_heads.sparse_rcnn(weights, levels, SIZES)


@pytest.mark.parametrize("version", ["v1", "v2"])
@torch.no_grad()
def test_every_head_and_the_detections_equal_the_reference(version):
    weights = official_weights(checkpoints.TINY[version])
    weights["rpn_head.init_proposal_bboxes.weight"][0, 2] = -0.1  # a box of no level, which has no features
    pixels, mask = padded_batch(SIZES, INPUT_SIZE)
    expected, seen = reference_outputs(weights, pixels), []
    model = converted_model(weights, version)
    refine = model.refine_proposals
    model.refine_proposals = lambda *args: seen.append(refine(*args)) or seen[0]
    outputs = model(pixels, mask)
    logits, boxes = (torch.stack(part) for part in zip(*expected, strict=True))
    assert_close(seen[0], (logits, boxes), rtol=0, atol=1e-9)
    assert (boxes[-1] - boxes[0]).abs().amax() > 5  # something was refined
    found = detect_objects(outputs, 0.0, ORIGINAL, max_detections=300)
    for image, wanted in zip(found, loops.detections(*expected[-1], SIZES, ORIGINAL), strict=True):
        assert len(wanted) == 6 * CLASSES and image["labels"].tolist() == [label for _, label, *_ in wanted]
        scores, rows = (torch.tensor([d[i] for d in wanted], dtype=torch.float64) for i in (0, 2))
        assert_close((image["scores"], image["boxes"]), (scores, rows), rtol=0, atol=1e-9)
    assert len(detect_objects(outputs, 0.0, max_detections=7)[0]["scores"]) == 7
    half = detect_objects(outputs, 0.5, ORIGINAL)[0]
    assert half["scores"].tolist() == [score for score in found[0]["scores"].tolist() if score > 0.5]


@pytest.mark.parametrize("objects", [OBJECTS, [[], OBJECTS[1]], [[], []]], ids=["default", "one", "none"])
def test_losses_and_gradients_equal_the_reference(objects):
    """Without an object in the batch the sums are divided by 1."""
    weights = official_weights(checkpoints.TINY["v2"])
    pixels, mask = padded_batch(SIZES, INPUT_SIZE)
    model = converted_model(weights, "v2").train()
    outputs = model(pixels, mask, labels=labels_of(objects, SIZES))
    outputs.loss.backward()
    leaves = {key: value.clone().requires_grad_(value.is_floating_point()) for key, value in weights.items()}
    expected = loops.losses(reference_outputs(leaves, pixels), objects, SIZES)
    sum(expected.values()).backward()
    assert outputs.loss_dict.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(outputs.loss_dict[name], value, rtol=1e-9, atol=1e-14)
    assert_close(outputs.loss, sum(expected.values()), rtol=1e-9, atol=0)
    gradients = {key: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for key, leaf in leaves.items()}
    gradients = SparseRCNN().from_official(gradients)
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).norm() <= 1e-8 * largest, name
    assert gradients["proposals.boxes"].any() == any(objects)


def test_more_objects_than_proposals_are_matched_as_far_as_they_go():
    model = small_model(num_proposals=2).train()
    outputs = model(torch.randn(2, 3, *INPUT_SIZE), labels=labels_of(OBJECTS, SIZES))
    outputs.loss.backward()
    assert outputs.loss.isfinite()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_predictions_that_are_not_finite_have_such_losses(value):
    """They are matched nevertheless, so that the other heads learn on and a loss scale can be lowered."""
    model = small_model()
    model.heads[1].class_predictor.bias.data[:] = value
    losses = model(torch.randn(2, 3, *INPUT_SIZE), labels=labels_of(OBJECTS, SIZES)).loss_dict
    finite = {name: bool(loss.isfinite()) for name, loss in losses.items()}
    assert not all(finite.values()) and all(finite[name] for name in finite if "0" in name)


@pytest.mark.parametrize("backbone", ["v1", "v2_linear", "resnet"])
def test_trained_model_reloads(backbone, tmp_path):
    model = small_model(backbone).train()
    pixels, mask = padded_batch(SIZES, INPUT_SIZE, torch.float32)
    model(pixels, mask, labels=labels_of(OBJECTS, SIZES)).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    randomize(model).eval().save_pretrained(tmp_path)
    loaded = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert type(loaded) is pvt_hf.SparseRCNNForObjectDetection
    with torch.no_grad():
        expected = model(pixels, mask)
        assert_close(dict(loaded(pixels, mask)), dict(expected), rtol=0, atol=0)
    # In the form of Deformable DETR: its image processor makes the same detections.
    processor = transformers.DeformableDetrImageProcessor()
    theirs = processor.post_process_object_detection(expected, 0.0, ORIGINAL, top_k=30)
    for a, b in zip(theirs, detect_objects(expected, 0.0, ORIGINAL), strict=True):
        assert_close(a["scores"], b["scores"]), assert_close(a["boxes"], b["boxes"], rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_another_number_of_classes_keeps_all_other_tensors(tmp_path):
    model = randomize(small_model())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    saved, kept = model.state_dict(), loaded.state_dict()
    new = {name for name in saved if kept[name].shape != saved[name].shape}
    assert {name.rsplit(".", 1)[0] for name in new} == {"heads.0.class_predictor", "heads.1.class_predictor"}
    assert all(torch.equal(kept[name], saved[name]) for name in saved.keys() - new)
    assert_close(kept["heads.1.class_predictor.bias"], torch.full((3,), -4.59512), rtol=1e-5, atol=0)
    model.save_pretrained(tmp_path, state_dict=checkpoints.without(saved, "heads.1.fc1.weight"))
    with pytest.raises(ValueError, match=r"in another shape, 1 tensors \['heads.1.fc1.weight'\]"):
        type(model).from_pretrained(tmp_path)


@torch.no_grad()
def test_initialisation_is_mmdetections():
    model = small_model(neck_channels=64, ffn_dim=128, dynamic_channels=16, num_proposals=50)
    assert model.proposals.boxes.unique(dim=0).tolist() == [[0.5, 0.5, 1, 1]]
    assert abs(model.proposals.features.std() - 1) < 0.1
    for name, parameter in model.heads[1].named_parameters():
        if parameter.ndim == 2:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name
        elif "norm" in name or "layers.1" in name or "layers.4" in name or "layers.7" in name:
            assert parameter.unique().tolist() == [float(name.endswith("weight"))], name
        elif name.startswith(("attention.", "box_predictor.")):
            assert not parameter.any(), name
        elif name == "class_predictor.bias":
            assert_close(parameter, torch.full_like(parameter, -4.59512))
        else:
            inputs = dict(model.heads[1].named_parameters())[name.replace("bias", "weight")].shape[1]
            assert 0.5 * inputs**-0.5 < parameter.abs().max() <= inputs**-0.5, name


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="`strides` must have one value for each of the 4 levels"):
        pvt_hf.SparseRCNNConfig(strides=[4])
    with pytest.raises(ValueError, match="`neck_channels` must be a multiple of `num_attention_heads`, got 20 and 8"):
        pvt_hf.SparseRCNNConfig(neck_channels=20)
