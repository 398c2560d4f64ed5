"""`detect_objects` against the plain computation: all scores of all anchors, and the suppression of all candidates."""

import pytest
import torch
from torchvision.ops import box_convert, nms

from pvt_hf.models import boxes as boxes_module
from pvt_hf.models.post_processing import detect_objects

LEVELS = [320, 64, 16]
CLASSES = 16  # with which no number is left over when a CPU computes several at a time, and rounded otherwise
SIZE = (90, 120)


def detect_plainly(outputs, threshold, nms_threshold, candidates_per_level, max_detections, class_threshold=0.05):
    scores = class_scores = outputs["logits"].float().sigmoid()
    if "centerness" in outputs:
        scores = class_scores * outputs["centerness"].float().sigmoid()[:, None]
    chosen, start = [], 0
    for level in scores.amax(dim=1).split(LEVELS):
        best = (
            level.topk(candidates_per_level).indices if len(level) > candidates_per_level else torch.arange(len(level))
        )
        chosen.append(start + best)
        start += len(level)
    chosen = torch.cat(chosen)
    if "centerness" in outputs:
        scores = scores.masked_fill(class_scores <= class_threshold, 0)
    places = box_convert(outputs["pred_boxes"].float(), "cxcywh", "xyxy") * torch.tensor([*SIZE[::-1]] * 2)
    places, scores = places[chosen], scores[chosen]
    rows, labels = (scores > threshold).nonzero().unbind(1)
    shifted = places[rows] + (labels * (places[rows].max() + 1))[:, None]
    kept = nms(shifted, scores[rows, labels], nms_threshold)[:max_detections]
    rows, labels = rows[kept], labels[kept]
    return {"scores": scores[rows, labels], "labels": labels, "boxes": places[rows]}


def write_outputs(kind: str, with_centerness: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(sum(LEVELS), CLASSES, generator=generator) * 3
    centres, sides = (torch.rand(sum(LEVELS), 2, generator=generator) for _ in range(2))
    if kind == "tied":  # of whole numbers, and above 17 where a float32 sigmoid is 1
        logits = (logits * 8).round()
    elif kind == "not finite":
        for value in (float("nan"), float("inf"), float("-inf")):
            logits[torch.rand(logits.shape, generator=generator) < 0.01] = value
    elif kind == "half":
        logits = logits.half()
    elif kind == "one place":  # of which the suppression leaves one of each class
        centres[:], sides[:] = 0.5, 0.3
    outputs = {"logits": logits, "pred_boxes": torch.cat([centres, sides * 0.2 + 0.02], dim=1)}
    if with_centerness:
        outputs["centerness"] = torch.randn(sum(LEVELS), generator=generator)
    return outputs


@pytest.mark.parametrize("with_centerness", [False, True], ids=["classes", "centerness"])
@pytest.mark.parametrize("kind", ["random", "tied", "not finite", "half", "one place"])
@pytest.mark.parametrize("max_detections", [5, 100, 10_000])
def test_detections_have_the_bits_of_the_plain_computation(kind, with_centerness, max_detections):
    """Whether the best candidates suffice for the detections that are wanted or not."""
    outputs = write_outputs(kind, with_centerness)
    batch = {name: value[None] for name, value in outputs.items()} | {"level_sizes": torch.tensor(LEVELS)}
    for threshold, candidates_per_level in ((0.0 if with_centerness else 0.05, 48), (0.7, 1000)):
        settings = {"nms_threshold": 0.5, "max_detections": max_detections}
        settings["candidates_per_level"] = candidates_per_level
        (found,) = detect_objects(batch, threshold, [SIZE], **settings)
        expected = detect_plainly(outputs, threshold, **settings)
        assert len(found["scores"]) == min(max_detections, 16) or kind != "one place"
        for name, values in expected.items():
            assert torch.equal(found[name], values), (name, threshold)


def test_suppression_stops_when_there_are_as_many_as_are_wanted(monkeypatch):
    seen = []
    monkeypatch.setattr("torchvision.ops.nms", lambda boxes, *args: seen.append(len(boxes)) or nms(boxes, *args))
    corners = torch.arange(200.0)[:, None] * 10
    boxes = torch.cat([corners, corners, corners + 5, corners + 5], dim=1)
    scores, ids = torch.linspace(0, 1, 200), torch.zeros(200, dtype=torch.int64)
    expected = list(range(199, -1, -1))
    assert boxes_module.batched_nms(boxes, scores, ids, 0.5).tolist() == expected
    assert boxes_module.batched_nms(boxes, scores, ids, 0.5, 10).tolist()[:10] == expected[:10]
    assert boxes_module.batched_nms(boxes, scores, ids, 0.5, 200).tolist() == expected
    assert boxes_module.batched_nms(boxes[:1].expand(200, 4), scores, ids, 0.5, 10).tolist() == [199]
    assert seen == [200, 50, 200, 50, 200]
