"""Anchors, coder, matcher, sampler and suppression against loops, and against torchvision's where they agree."""

import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection import _utils as torchvision_detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from pvt_hf.models import boxes as ours
from tests.support import reference_detection as loops

SCALES = loops.RETINANET_SCALES
GRID = ours.AnchorGrid((8, 16), SCALES, loops.RATIOS)
FLOAT64 = torch.zeros(0, dtype=torch.float64)


def random_boxes(count, size=100.0, dtype=torch.float64):
    corners = torch.rand(count, 2, dtype=dtype) * size
    return torch.cat((corners, corners + 1 + torch.rand(count, 2, dtype=dtype) * size / 2), dim=1)


def test_anchors_equal_those_of_loops():
    shapes = [(3, 5), (2, 3)]
    expected = sum(loops.anchors(shapes, GRID.strides, SCALES), [])
    assert_close(GRID.generate_boxes(shapes, FLOAT64), torch.tensor(expected, dtype=torch.float64))
    first = GRID.generate_boxes(shapes, torch.zeros(0))[[0, 3, 8], 2:]
    assert torch.allclose(first, torch.tensor([[22.6274, 11.3137], [16, 16], [17.9594, 35.9188]]), atol=1e-4)


def test_anchors_are_torchvisions_but_for_its_rounding_and_order():
    generator = AnchorGenerator(sizes=((32, 64),), aspect_ratios=((0.25, 1.0, 4.0),))
    (theirs,) = generator(ImageList(torch.zeros(1, 3, 32, 48), [(32, 48)]), [torch.zeros(1, 1, 4, 6)])
    grid = ours.AnchorGrid((8,), (4, 8), (0.25, 1.0, 4.0))
    assert torch.equal(grid.generate_boxes([(4, 6)], torch.zeros(0)), theirs)


@pytest.mark.parametrize("size", [(32, 32), (24, 64), (64, 64), (17, 33)], ids=str)
def test_valid_anchors_equal_those_of_loops(size):
    shapes = [(8, 8), (4, 4)]
    assert GRID.find_valid(shapes, size).tolist() == loops.valid_flags(shapes, GRID.strides, 9, size)


def test_rows_are_in_the_order_of_the_anchors():
    feature_map = torch.arange(2 * 6 * 2 * 3).reshape(2, 6, 2, 3)
    rows = ours.flatten_to_anchors(feature_map, num_values=2)  # three anchors of two values
    for y in range(2):
        for x in range(3):
            for anchor in range(3):
                expected = feature_map[1, 2 * anchor : 2 * anchor + 2, y, x]
                assert torch.equal(rows[1, (y * 3 + x) * 3 + anchor], expected)


@pytest.mark.parametrize("stds", [(1, 1, 1, 1), loops.BOX_HEAD_STDS], ids=str)
def test_coder_equals_loops_and_torchvision(stds):
    anchors, boxes = random_boxes(50), random_boxes(50)
    deltas = ours.encode_boxes(anchors, boxes, stds)
    expected = [loops.encode(a, b, stds) for a, b in zip(anchors.tolist(), boxes.tolist(), strict=True)]
    assert_close(deltas, torch.tensor(expected, dtype=torch.float64))
    assert_close(ours.decode_boxes(anchors, deltas, stds), boxes)
    theirs = torchvision_detection.BoxCoder([1 / std for std in stds])
    assert_close(theirs.encode_single(boxes, anchors), deltas)


def test_decoded_boxes_are_clamped_and_clipped():
    anchors, deltas = random_boxes(200), torch.randn(200, 4, dtype=torch.float64) * 4
    assert (deltas[:, 2:].abs() > 4.2).any()
    size = torch.tensor([60, 80])
    expected = [loops.decode(a, d, (60, 80)) for a, d in zip(anchors.tolist(), deltas.tolist(), strict=True)]
    decoded = ours.decode_boxes(anchors, deltas)
    assert_close(ours.clip_boxes(decoded, size), torch.tensor(expected, dtype=torch.float64))
    assert decoded.max() > 80 and decoded.min() < 0  # the test reaches every side
    per_class = ours.decode_boxes(anchors[:, None], deltas.reshape(200, 1, 4).expand(-1, 3, -1))
    assert torch.equal(per_class[:, 2], decoded)


def test_iou_equals_loops():
    boxes, others = random_boxes(20), random_boxes(30)
    boxes[0, 2:] = boxes[0, :2]  # no area
    others[0] = boxes[0]
    expected = [[loops.iou(a, b) for b in others.tolist()] for a in boxes.tolist()]
    iou = ours.pairwise_iou(boxes, others)
    assert_close(iou, torch.tensor(expected, dtype=torch.float64))
    assert iou[0].eq(0).all() and iou.max() > 0.5
    assert_close(loops.overlaps(boxes.tolist(), others.tolist()), iou)  # the reference's own short cut


def as_words(matches):
    names = {ours.NEGATIVE: "negative", ours.IGNORED: "ignored"}
    return [names.get(match, match) for match in matches.tolist()]


@pytest.mark.parametrize("thresholds", [(0.5, 0.4, 0), (0.7, 0.3, 0.3), (0.5, 0.5, 0.5)], ids=str)
@pytest.mark.parametrize("num_objects", [0, 1, 6])
def test_matches_equal_those_of_loops(thresholds, num_objects):
    anchors = GRID.generate_boxes([(8, 8), (4, 4)], FLOAT64)
    truths = random_boxes(num_objects, 50.0)
    valid = GRID.find_valid([(8, 8), (4, 4)], (64, 48))
    for flags in (None, valid):
        expected = loops.assign(
            anchors.tolist(), truths.tolist(), *thresholds, None if flags is None else flags.tolist()
        )
        matches = ours.match_boxes(ours.pairwise_iou(truths, anchors), *thresholds, flags)
        assert as_words(matches) == expected
    assert ours.match_boxes(ours.pairwise_iou(truths, anchors[:0]), *thresholds).tolist() == []
    if num_objects == 6:
        assert {"negative", "ignored"} <= set(expected)
        assert (thresholds[2] == 0.5) or any(isinstance(value, int) for value in expected)


def test_low_quality_matches_overwrite_in_order():
    iou = torch.tensor([[0.9, 0.3, 0.3, 0.0], [0.2, 0.3, 0.1, 0.0], [0.6, 0.2, 0.1, 0.0]])
    # Object 2's best box is box 0, which object 0 has the larger overlap with: the last one wins.
    assert ours.match_boxes(iou, 0.5, 0.4, 0.0).tolist() == [2, 1, -1, -1]
    assert ours.match_boxes(iou, 0.5, 0.25, 0.6).tolist() == [2, -2, -2, -1]
    assert ours.match_boxes(iou, 0.5, 0.4, 0.95).tolist() == [0, -1, -1, -1]
    # At the thresholds themselves.
    assert ours.match_boxes(torch.tensor([[0.5, 0.4, 0.39]]), 0.5, 0.4, 2.0).tolist() == [0, -2, -1]
    assert ours.match_boxes(torch.tensor([[0.25, 0.1]]), 0.75, 0.25, 0.25).tolist() == [0, -1]
    # mmdetection's quirk: an object that overlaps with nothing takes every box, but none that is not valid.
    nothing = torch.zeros(1, 3)
    assert ours.match_boxes(nothing, 0.5, 0.4, 0.0, torch.tensor([True, False, True])).tolist() == [0, -2, 0]
    assert ours.match_boxes(nothing, 0.7, 0.3, 0.3).tolist() == [-1, -1, -1]


def test_matches_are_torchvisions_but_for_low_quality_ones():
    iou = torch.rand(5, 300, dtype=torch.float64)
    theirs = torchvision_detection.Matcher(0.7, 0.3, allow_low_quality_matches=False)
    assert torch.equal(ours.match_boxes(iou, 0.7, 0.3, 2.0), theirs(iou))


def test_samples_equal_those_of_loops_and_draw_as_often():
    for positives, total, max_positives in ((40, 20, 10), (3, 20, 10), (0, 20, 10), (8, 500, 128)):
        matches = torch.full((100,), ours.NEGATIVE)
        matches[torch.randperm(100)[: positives + 10]] = ours.IGNORED
        matches[(matches == ours.IGNORED).nonzero().flatten()[:positives]] = 3
        torch.manual_seed(1)
        expected = loops.sample(as_words(matches), total, max_positives)
        drawn = torch.get_rng_state()
        torch.manual_seed(1)
        sampled = ours.sample_boxes(matches, total, max_positives)
        assert tuple(indices.tolist() for indices in sampled) == expected
        assert torch.equal(torch.get_rng_state(), drawn)  # not one random number more


def test_samples_without_random_numbers_are_evenly_spaced():
    matches = torch.tensor([0, 1, 2, 3, -1, -1, -1, -1, -2])
    before = torch.get_rng_state()
    positives, negatives = ours.sample_boxes(matches, 5, 2, shuffle=False)
    assert (positives.tolist(), negatives.tolist()) == ([0, 2], [4, 5, 6])
    assert torch.equal(torch.get_rng_state(), before)


def test_nms_equals_loops():
    boxes, scores = random_boxes(300), torch.rand(300, dtype=torch.float64)
    ids = torch.randint(0, 3, (300,))
    expected = loops.nms(boxes.tolist(), scores.tolist(), ids.tolist(), 0.5)
    assert ours.batched_nms(boxes, scores, ids, 0.5).tolist() == expected
    assert 10 < len(expected) < 290
    assert ours.batched_nms(boxes[:0], scores[:0], ids[:0], 0.5).tolist() == []


def test_nms_shifts_in_the_precision_of_the_boxes():
    """In float32 the shift of class 79 moves corners to a grid of 1/128: an overlap just beyond the threshold falls
    onto it, and the box stays, as in mmdetection."""
    boxes = torch.tensor([[0, 0, 10.0, 10.0], [0, 0, 10.0, 5.003], [0, 0, 1333.0, 1333.0]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    for label, dtype, kept in ((0, torch.float32, [0, 2]), (79, torch.float64, [0, 2]), (79, torch.float32, [0, 1, 2])):
        ids = torch.tensor([label, label, 0])
        assert ours.batched_nms(boxes.to(dtype), scores.to(dtype), ids, 0.5).tolist() == kept


def test_nms_of_many_boxes_goes_through_the_ids():
    """From 10000 boxes on; the result is the same but for the order of equal scores, which is that of the boxes."""
    boxes, scores = random_boxes(10_000, 4000.0), torch.rand(10_000, dtype=torch.float64)
    ids = torch.randint(0, 4, (10_000,))
    many = ours.batched_nms(boxes, scores, ids, 0.5)
    kept = []
    for label in range(4):
        members = (ids == label).nonzero().flatten()
        kept += members[ours.batched_nms(boxes[members], scores[members], ids[members], 0.5)].tolist()
    assert many.tolist() == sorted(kept, key=lambda index: -scores[index])
    assert len(kept) < 10_000
