"""ATSS and GFL: mmdetection's outputs, detections, matching, losses, gradients, and life as models of transformers."""

import pytest
import torch
import transformers
from torch.testing import assert_close

import pvt_hf
from pvt_hf.conversion import reference_heads
from pvt_hf.conversion.architectures.atss import ATSS
from pvt_hf.conversion.architectures.gfl import GFL
from pvt_hf.models import boxes as ours
from pvt_hf.models.modeling_gfl import compute_distribution_loss
from pvt_hf.models.post_processing import detect_objects
from tests.support import checkpoints, detectors
from tests.support import reference_detection as loops
from tests.support import reference_one_stage as one_stage
from tests.support.detectors import CLASSES, GROUPS, backbone_config, labels_of, padded_batch, relative, tiny_backbone
from tests.support.small_models import STAGES, randomize

CONFIGS = {"atss": pvt_hf.ATSSConfig, "gfl": pvt_hf.GFLConfig}
MODELS = {"atss": pvt_hf.ATSSForObjectDetection, "gfl": pvt_hf.GFLForObjectDetection}
CONVERTED = {"atss": ATSS(), "gfl": GFL()}
OFFICIAL = {"atss": detectors.official_atss, "gfl": detectors.official_gfl}
LOSSES = {"atss": one_stage.atss_losses, "gfl": one_stage.gfl_losses}
TERMS = {
    "atss": ("loss_class", "loss_box", "loss_centerness"),
    "gfl": ("loss_class", "loss_box", "loss_distribution"),
}
BOTH = pytest.mark.parametrize("name", CONFIGS)
SIZES, INPUT_SIZE, ORIGINAL = [(96, 128), (70, 90)], (96, 128), [(191, 257), (70, 91)]
OBJECTS = [  # of the first image, one reaches out, one is in between centres, and two have the same place
    [
        ([10.0, 12.0, 60.0, 70.0], 1),
        ([99.0, 77.0, 135.0, 103.0], 4),
        ([41.0, 41.0, 47.0, 47.0], 2),
        ([12.0, 10.0, 64.0, 66.0], 0),
        ([12.0, 10.0, 64.0, 66.0], 3),
    ],
    [([3.0, 30.0, 88.0, 69.0], 2)],
]


def small_model(name, backbone="v2", **overrides):
    fields = {"neck_channels": 16, "norm_groups": GROUPS, "num_labels": CLASSES} | overrides
    return MODELS[name](CONFIGS[name](backbone_config=backbone_config(backbone, out_features=STAGES[1:]), **fields))


def reference_outputs(name, weights, pixels):
    """Per level the raw outputs, and the shapes of the levels."""
    levels = reference_heads.pyramid(weights, detectors.feature_maps(weights, pixels)[1:], on_output=True)
    outputs = getattr(reference_heads, name)(weights, levels, groups=GROUPS)
    return outputs, [tuple(level.shape[2:]) for level in levels]


def converted_model(name, weights, version):
    config = CONFIGS[name](
        backbone_config=tiny_backbone(version),
        neck_channels=detectors.CHANNELS,
        norm_groups=GROUPS,
        num_labels=CLASSES,
    )
    return detectors.converted(MODELS[name](config), weights, CONVERTED[name])


@pytest.mark.parametrize(("name", "version"), [("atss", "v1"), ("atss", "v2"), ("gfl", "v2_linear")])
@torch.no_grad()
def test_outputs_and_detections_equal_the_reference(name, version):
    weights = OFFICIAL[name](checkpoints.TINY[version])
    pixels, mask = padded_batch(SIZES, INPUT_SIZE)
    raw, shapes = reference_outputs(name, weights, pixels)
    model = converted_model(name, weights, version)
    outputs = model(pixels, mask)
    assert_close(outputs.logits, torch.cat([level[0] for level in raw], dim=1), rtol=0, atol=1e-9)
    if name == "atss":
        assert_close(outputs.centerness, torch.cat([level[2] for level in raw], dim=1)[..., 0], rtol=0, atol=1e-9)
    assert outputs.level_sizes.tolist() == [level[0].shape[1] for level in raw] and outputs.nms_threshold == 0.6
    assert outputs.image_sizes.tolist() == [list(size) for size in SIZES]
    limits = [{"limit": 12, "num_candidates": 1000}, {"limit": 10_000, "num_candidates": 60}]
    for index, size in enumerate(SIZES):
        levels = one_stage.decoded_levels(raw, shapes, index)
        boxes = [one_stage.clip(box, size) for level in levels for box, *_ in level]
        assert_close(outputs.pred_boxes[index], relative(boxes, size), rtol=0, atol=1e-9)
        for limit in limits:
            wanted = one_stage.detections(levels, size, ORIGINAL[index], **limit)
            found = detect_objects(
                outputs,
                model.evaluation_threshold,
                ORIGINAL,
                candidates_per_level=limit["num_candidates"],
                max_detections=limit["limit"],
            )[index]
            assert len(wanted) == 12 or limit["limit"] > len(wanted) > 12
            assert found["labels"].tolist() == [label for _, label, _ in wanted]
            assert_close(found["scores"], found["scores"].new_tensor([w[0] for w in wanted]), rtol=0, atol=1e-9)
            assert_close(found["boxes"], found["boxes"].new_tensor([w[2] for w in wanted]), rtol=0, atol=1e-8)
    if name == "atss":  # the threshold that is asked for is that of the scores
        scores = detect_objects(outputs, 0, ORIGINAL)[1]["scores"]
        found = detect_objects(outputs, 0, ORIGINAL, max_detections=10_000)[1]["scores"]
        assert found[-1] < 0.05 < scores[3]
        assert torch.equal(detect_objects(outputs, scores[3].item(), ORIGINAL)[1]["scores"], scores[:3])


@BOTH
@pytest.mark.parametrize("objects", [OBJECTS, [[], OBJECTS[1]], [[], []]], ids=["both", "one", "none"])
def test_losses_and_gradients_equal_the_reference(name, objects):
    weights = OFFICIAL[name](checkpoints.TINY["v2"])
    pixels, mask = padded_batch(SIZES, INPUT_SIZE)
    model = converted_model(name, weights, "v2")
    outputs = model(pixels, mask, labels=labels_of(objects, SIZES))
    outputs.loss.backward()

    leaves = {key: value.clone().requires_grad_() for key, value in weights.items()}
    raw, shapes = reference_outputs(name, leaves, pixels)
    losses = LOSSES[name](raw, shapes, SIZES, INPUT_SIZE, objects)
    sum(losses).backward()
    for term, loss in zip(TERMS[name], losses, strict=True):
        assert_close(outputs.loss_dict[term], torch.as_tensor(loss).double(), rtol=1e-9, atol=0)
    assert_close(outputs.loss, sum(outputs.loss_dict.values()), rtol=1e-12, atol=0)
    gradients = {key: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for key, leaf in leaves.items()}
    gradients = CONVERTED[name].from_official(gradients)
    largest = max(gradient.norm() for gradient in gradients.values())
    for key, parameter in model.named_parameters():
        difference = (parameter.grad - gradients[key]).abs().max()
        assert difference <= 1e-8 * largest, (key, difference)


def test_far_sides_are_clamped_for_their_distribution_only():
    """A side may be further away than the last bin, which 15.9 of 16 strides stand for."""
    logits = torch.randn(5, 17).double()
    losses = compute_distribution_loss(logits, torch.tensor([0.0, 2.3, 15.0, 15.95, 40.0], dtype=torch.double))
    logs = logits.log_softmax(dim=1)
    wanted = [-logs[0, 0], -0.7 * logs[1, 2] - 0.3 * logs[1, 3], -logs[2, 15]]
    wanted += [-0.1 * logs[row, 15] - 0.9 * logs[row, 16] for row in (3, 4)]
    assert_close(losses, torch.stack(wanted), rtol=0, atol=1e-12)


SHAPES = [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]


@pytest.mark.parametrize(
    ("objects", "padded"),
    [
        ([box for box, _ in OBJECTS[0]], (96, 128)),
        ([[36.0, 36.0, 60.0, 60.0], [28.0, 36.0, 52.0, 60.0]], (96, 128)),  # ties of distances and of overlaps
        ([[33.0, 33.0, 39.0, 39.0]], (96, 128)),  # no centre inside: no anchor
        ([[0.0, 0.0, 128.0, 96.0]], (96, 128)),
        ([[26.0, 7.0, 114.0, 65.0]], (96, 128)),  # one overlap is between the thresholds of the two deviations
        ([[2.0, 3.0, 30.0, 31.0], [60.0, 60.0, 90.0, 90.0]], (32, 32)),  # fewer than nine of most levels
        ([], (64, 64)),
    ],
)
def test_matching_equals_its_description(objects, padded):
    levels = one_stage.anchors(SHAPES)
    grid = ours.AnchorGrid(one_stage.STRIDES, (8.0,), (1.0,))
    anchors = grid.generate_anchors(SHAPES, torch.zeros(0, dtype=torch.double))
    assert anchors.boxes.tolist() == [box for level in levels for box in level]
    valid = loops.valid_flags(SHAPES, one_stage.STRIDES, 1, padded)
    matches = ours.match_atss(torch.tensor(objects).reshape(-1, 4).double(), anchors, 9, torch.tensor(valid))
    wanted = one_stage.assign(levels, objects, valid)
    assert matches.tolist() == [{"negative": -1, "ignored": -2}.get(match, match) for match in wanted]
    if objects == [[33.0, 33.0, 39.0, 39.0]]:
        assert matches.max() == -1


def test_candidates_of_equal_overlap_are_all_at_the_threshold():
    grid = ours.AnchorGrid((8,), (8.0,), (1.0,))
    anchors = grid.generate_anchors([(9, 9)], torch.zeros(0))
    matches = ours.match_atss(torch.tensor([[20.0, 20.0, 44.0, 44.0]]), anchors, 9)
    assert (matches == 0).nonzero().flatten().tolist() == [
        9 * row + column for row in (3, 4, 5) for column in (3, 4, 5)
    ]


def test_more_padding_changes_no_match():
    """Of equally distant anchors the first ones are candidates, whatever the batch is padded to."""
    grid = ours.AnchorGrid((8, 16), (8.0,), (1.0,))
    objects = torch.tensor([[2.0, 6.0, 62.0, 50.0], [8.0, 0.0, 40.0, 62.0]])
    tight, wide = ([(8, 8), (4, 4)], [(12, 16), (6, 8)])
    first = ours.match_atss(objects, grid.generate_anchors(tight, objects), 9, grid.find_valid(tight, (64, 64)))
    valid = grid.find_valid(wide, (64, 64))
    second = ours.match_atss(objects, grid.generate_anchors(wide, objects), 9, valid)
    assert first.max() == 1 and torch.equal(second[valid], first) and (second[~valid] == ours.IGNORED).all()


@pytest.mark.parametrize(("name", "backbone"), [("atss", "resnet"), ("gfl", "v1")])
def test_trained_model_reloads(name, backbone, tmp_path):
    model = small_model(name, backbone).train()
    sizes = [(64, 32), (30, 64)]
    pixels, mask = padded_batch(sizes, (64, 64), torch.float32)
    labels = labels_of([[([4.0, 2.0, 30.0, 25.0], 1)], [([2.0, 2.0, 60.0, 28.0], 4)]], sizes)
    model(pixels, mask, labels=labels).loss.backward()
    assert not {n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    randomize(model).eval().save_pretrained(tmp_path)
    loaded = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert type(loaded) is MODELS[name]
    with torch.no_grad():
        first, second = model(pixels, mask), loaded(pixels, mask)
    assert torch.equal(first.logits, second.logits) and torch.equal(first.pred_boxes, second.pred_boxes)
    half = loaded.bfloat16()(pixels.bfloat16(), mask, labels=labels)
    assert half.pred_boxes.dtype == half.logits.dtype == half.loss.dtype == torch.float32
    other = MODELS[name].from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert_close(other.head.class_predictor.bias, torch.full((3,), 0.01).logit())


@BOTH
@torch.no_grad()
def test_initialisation_is_mmdetections(name):
    model = small_model(name, neck_channels=32)
    assert_close(model.head.class_predictor.bias, torch.full((CLASSES,), 0.01).logit())
    for key, parameter in model.head.named_parameters():
        if parameter.ndim == 4:
            assert abs(parameter.std() / 0.01 - 1) < 0.15, key
        elif key != "class_predictor.bias":
            assert (parameter == (0 if key.endswith("bias") else 1)).all(), key


@BOTH
def test_wrong_configurations_are_refused(name):
    for fields, message in (
        ({"strides": [8, 16]}, "`strides` must have one value for each of the 5 levels"),
        ({"norm_groups": 24}, "`norm_groups` must divide `neck_channels`, got 24 and 256"),
        ({"neck_channels": 32}, "`norm_groups` must be less than `neck_channels`, .* two channels .*, got 32 and 32"),
        ({"num_candidates": 0}, "`num_candidates` must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            CONFIGS[name](**fields)
    with pytest.raises(ValueError, match="`reg_max` must be at least 1, got 0"):
        pvt_hf.GFLConfig(reg_max=0)


@BOTH
@torch.no_grad()
def test_parts_of_outputs_are_enough_or_refused(name):
    """`Trainer` gathers tuples; logits and boxes alone would lose the centerness."""
    model = randomize(small_model(name), std=0.2).eval()
    processor = pvt_hf.PvtDetectionImageProcessor(size={"max_height": 96, "max_width": 128}, num_labels=CLASSES)
    outputs = model(torch.randn(2, 3, 96, 128))
    sizes = [(96, 128)] * 2
    wanted = processor.post_process_object_detection(outputs, 0.01, sizes)
    assert len(wanted[0]["scores"])
    gathered = ({"loss": torch.zeros(())}, *(value.numpy() for value in outputs.to_tuple()))
    for given in (gathered, dict(outputs)):
        for image, other in zip(processor.post_process_object_detection(given, 0.01, sizes), wanted, strict=True):
            assert all(torch.equal(image[key], value) for key, value in other.items())
    with pytest.raises(ValueError, match="of ATSS, GFL and Sparse R-CNN all outputs"):
        part = {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}
        processor.post_process_object_detection(part, 0.01, sizes)
