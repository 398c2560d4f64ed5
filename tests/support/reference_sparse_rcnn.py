"""Slow, obvious matching, losses and detections of Sparse R-CNN from what its heads say, in float64.

Written from the paper and from the description of mmdetection 2.13; no code of pvt_hf. Objects are (box, class), boxes
are xyxy in pixels.
"""

import itertools
import math

import torch

from tests.support.reference_detection import iou, sides


def generalized_iou(a, b):
    enclosing = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    areas = [w * h for w, h in (sides(a), sides(b))]
    overlap = iou(a, b)
    union = max(sum(areas) / (1 + overlap), 1e-6)  # overlap = intersection / union, and areas = union + intersection
    return overlap - (enclosing - union) / enclosing


def relative_corners(box, size):
    return [value / size[1 - axis % 2] for axis, value in enumerate(box)]


def cost(logits, box, truth, size):
    wanted, label = truth
    p = 1 / (1 + math.exp(-logits[label]))
    focal = -math.log(p + 1e-12) * 0.25 * (1 - p) ** 2 + math.log(1 - p + 1e-12) * 0.75 * p**2
    corners = zip(relative_corners(box, size), relative_corners(wanted, size), strict=True)
    distance = sum(abs(a - b) for a, b in corners)
    return 2 * focal + 5 * distance - 2 * generalized_iou(box, wanted)


def match(logits, boxes, objects, size):
    """The proposal of every object: of all choices the one with the lowest sum of costs."""
    costs = [[cost(*proposal, truth, size) for truth in objects] for proposal in zip(logits, boxes, strict=True)]
    choices = itertools.permutations(range(len(boxes)), len(objects))
    return min(choices, key=lambda rows: sum(costs[row][column] for column, row in enumerate(rows)))


def losses(outputs, truths, sizes):
    """`outputs` per head: logits (batch, proposals, classes) and boxes (batch, proposals, 4). The names are those of
    pvt_hf."""
    result = {}
    for head, (logits, boxes) in enumerate(outputs):
        focal = distances = overlaps = torch.zeros((), dtype=torch.float64)
        matched = 0
        for index, (objects, size) in enumerate(zip(truths, sizes, strict=True)):
            rows = match(logits[index].tolist(), boxes[index].tolist(), objects, size)
            targets = torch.zeros_like(logits[index])
            for (wanted, label), row in zip(objects, rows, strict=True):
                matched += 1
                targets[row, label] = 1
                pairs = zip(relative_corners(boxes[index, row], size), relative_corners(wanted, size), strict=True)
                distances = distances + sum(abs(a - b) for a, b in pairs)
                overlaps = overlaps + 1 - generalized_iou_tensor(boxes[index, row], wanted)
            p = 1 / (1 + torch.exp(-logits[index]))
            entropy = -(targets * torch.log(p) + (1 - targets) * torch.log(1 - p))
            pt = (1 - p) * targets + p * (1 - targets)
            focal = focal + ((0.25 * targets + 0.75 * (1 - targets)) * pt**2 * entropy).sum()
        total = max(matched, 1)
        result |= {f"loss_class_{head}": 2 * focal / total, f"loss_box_{head}": 5 * distances / total}
        result[f"loss_giou_{head}"] = 2 * overlaps / total
    return result


def generalized_iou_tensor(a, b):
    """[`generalized_iou`] with a gradient for the first box."""
    zero = a.new_zeros(())
    width, height = (torch.minimum(a[i + 2], zero + b[i + 2]) - torch.maximum(a[i], zero + b[i]) for i in (0, 1))
    intersection = width.clamp(min=0) * height.clamp(min=0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    width, height = (torch.maximum(a[i + 2], zero + b[i + 2]) - torch.minimum(a[i], zero + b[i]) for i in (0, 1))
    return intersection / union - (width * height - union) / (width * height)


def detections(logits, boxes, sizes, original_sizes, limit=300):
    """For each image (score, class, box in original pixels), best first."""
    results = []
    for index, (size, original) in enumerate(zip(sizes, original_sizes, strict=True)):
        found = []
        for row, (scores, box) in enumerate(zip(logits[index].tolist(), boxes[index].tolist(), strict=True)):
            scaled = [value * original[1 - axis % 2] / size[1 - axis % 2] for axis, value in enumerate(box)]
            found += [(1 / (1 + math.exp(-z)), label, scaled, row) for label, z in enumerate(scores)]
        results.append(sorted(found, key=lambda detection: -detection[0])[:limit])
    return results
