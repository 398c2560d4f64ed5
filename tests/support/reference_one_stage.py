"""Slow, obvious evaluation of mmdetection's ATSS and GFL around their raw head outputs, as `reference_detection.py`."""

import math

import torch

from tests.support import reference_detection as loops

STRIDES = (8, 16, 32, 64, 128)
STDS = (0.1, 0.1, 0.2, 0.2)


def anchors(shapes):
    """One square of 8 strides for each cell, level by level."""
    return loops.anchors(shapes, STRIDES, (8,), ratios=(1.0,))


def centre(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def assign(levels, truths, valid, num_candidates=9):
    """The index of a ground truth, `"negative"` or `"ignored"` for each anchor. `valid` is one list."""
    boxes = [box for level in levels for box in level]
    claims = {}
    for number, truth in enumerate(truths):
        candidates, start = [], 0
        for level in levels:
            members = [index for index in range(start, start + len(level)) if valid[index]]
            members.sort(key=lambda index: math.dist(centre(boxes[index]), centre(truth)))  # equal ones keep order
            candidates += members[:num_candidates]
            start += len(level)
        overlaps = [loops.iou(boxes[index], truth) for index in candidates]
        mean = sum(overlaps) / len(overlaps)
        deviation = math.sqrt(sum((overlap - mean) ** 2 for overlap in overlaps) / (len(overlaps) - 1))
        for index, overlap in zip(candidates, overlaps, strict=True):
            x, y = centre(boxes[index])
            inside = min(x - truth[0], y - truth[1], truth[2] - x, truth[3] - y) > 0.01
            if overlap >= mean + deviation and inside:
                claims.setdefault(index, []).append((overlap, -number))
    result = ["negative" if ok else "ignored" for ok in valid]
    for index, claim in claims.items():
        result[index] = -max(claim)[1]
    return result


def giou(a, b):
    """Of tensors or numbers."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    intersection = max(width, 0 * width) * max(height, 0 * height)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - intersection
    enclosing = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return intersection / union - (enclosing - union) / enclosing


def decode_deltas(anchor, deltas):
    """Not clipped; differentiable."""
    (x, y), (width, height) = centre(anchor), loops.sides(anchor)
    dx, dy, dw, dh = (delta * std for delta, std in zip(deltas, STDS, strict=True))
    dw, dh = (delta.clamp(-4.135166556742356, 4.135166556742356) for delta in (dw, dh))
    x, y, width, height = x + width * dx, y + height * dy, width * torch.exp(dw), height * torch.exp(dh)
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def decode_distances(point, logits):
    """`point` and result in strides. The sides are left, top, right, bottom with 17 logits each."""
    left, top, right, bottom = (logits.reshape(4, 17).softmax(dim=1) * torch.arange(17)).sum(dim=1)
    return point[0] - left, point[1] - top, point[0] + right, point[1] + bottom


def clip(box, size):
    return [max(0.0, min(float(value), float(size[1 - axis % 2]))) for axis, value in enumerate(box)]


def detections(levels, size, original, limit, num_candidates):
    """(score, class, box) of an image. `levels` are lists of (box, probabilities of the classes, centerness)."""
    chosen, factors = [], (size[1] / original[1], size[0] / original[0])
    for level in levels:
        level = sorted(level, key=lambda row: -max(row[1]) * row[2]) if len(level) > num_candidates else level
        for box, scores, centerness in level[:num_candidates]:
            box = loops.scaled(clip(box, size), factors)
            chosen += [(p * centerness, label, box) for label, p in enumerate(scores) if p > 0.05]
    kept = loops.nms([c[2] for c in chosen], [c[0] for c in chosen], [c[1] for c in chosen], 0.6, limit)
    return [chosen[index] for index in kept]


def decoded_levels(outputs, shapes, index):
    """What `detections` takes of an image: 2 outputs per level are GFL's, 3 are ATSS's."""
    levels = []
    for (logits, boxes, *centerness), level, stride in zip(outputs, anchors(shapes), STRIDES, strict=True):
        rows = []
        for anchor, row, scores, q in zip(
            level,
            boxes[index].unbind(),
            logits[index].sigmoid().tolist(),
            centerness[0][index, :, 0].sigmoid().tolist() if centerness else [1.0] * len(level),
            strict=True,
        ):
            if centerness:
                box = decode_deltas(anchor, row)
            else:
                box = [value * stride for value in decode_distances([v / stride for v in centre(anchor)], row)]
            rows.append((box, scores, q))
        levels.append(rows)
    return levels


def join(outputs):
    """Of the levels together: all anchors."""
    return [torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True)]


def iter_images(shapes, sizes, input_size, truths):
    """Of each image the assignment of its anchors, and a list of the positive ones: the row, the level's stride, the
    anchor and the ground truth (box, class)."""
    levels = anchors(shapes)
    strides = [stride for stride, level in zip(STRIDES, levels, strict=True) for _ in level]
    boxes = [box for level in levels for box in level]
    for size, objects in zip(sizes, truths, strict=True):
        valid = loops.valid_flags(shapes, STRIDES, 1, loops.padded(size, input_size))
        assignment = assign(levels, [box for box, _ in objects], valid)
        rows = [row for row, match in enumerate(assignment) if isinstance(match, int)]
        yield assignment, [(row, strides[row], boxes[row], objects[assignment[row]]) for row in rows]


def atss_losses(outputs, *arguments):
    """Class, box and centerness."""
    all_logits, all_deltas, all_centerness = join(outputs)
    classes, total, weight = 0, 0, 0
    boxes, centers = 0 * all_deltas.sum(), 0 * all_centerness.sum()
    for index, (assignment, positives) in enumerate(iter_images(*arguments)):
        total += max(len(positives), 1)
        targets = torch.zeros_like(all_logits[index])
        for row, _, anchor, (box, label) in positives:
            targets[row, label] = 1
            x, y = centre(anchor)
            left, top, right, bottom = x - box[0], y - box[1], box[2] - x, box[3] - y
            c = math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
            centers = centers + loops.binary_cross_entropy(all_centerness[index, row, 0], c)
            boxes = boxes + c * (1 - giou(decode_deltas(anchor, all_deltas[index, row]), box))
            weight += c
        p = all_logits[index].sigmoid()
        pt = (1 - p) * targets + p * (1 - targets)
        focal = (0.25 * targets + 0.75 * (1 - targets)) * pt**2
        losses = focal * loops.binary_cross_entropy(all_logits[index], targets)
        classes = classes + losses[[match != "ignored" for match in assignment]].sum()
    return classes / total, 2 * boxes / max(weight, 1), centers / total


def gfl_losses(outputs, *arguments):
    """Class, box and distribution."""
    all_logits, all_distances = join(outputs)
    classes, distributions, total, weight = 0, 0, 0, 0
    boxes = 0 * all_distances.sum()
    for index, (assignment, positives) in enumerate(iter_images(*arguments)):
        total += max(len(positives), 1)
        scores = all_logits[index].sigmoid()
        losses = loops.binary_cross_entropy(all_logits[index], 0) * scores**2
        for row, stride, anchor, (box, label) in positives:
            distances = all_distances[index, row]
            point, box = [v / stride for v in centre(anchor)], [v / stride for v in box]
            predicted = decode_distances(point, distances)
            quality = loops.iou([value.item() for value in predicted], box)
            own = loops.binary_cross_entropy(all_logits[index, row, label], quality)
            classes = classes - losses[row, label] + own * (quality - scores[row, label]).abs() ** 2
            w = max(scores[row].tolist())
            boxes = boxes + w * (1 - giou(predicted, box))
            for side, distance in enumerate(
                (point[0] - box[0], point[1] - box[1], box[2] - point[0], box[3] - point[1])
            ):
                t = min(distance, 15.9)
                i = math.floor(t)
                logs = distances[17 * side : 17 * side + 17].log_softmax(dim=0)
                distributions = distributions - w * (logs[i] * (i + 1 - t) + logs[i + 1] * (t - i)) / 4
            weight += w
        classes = classes + losses[[match != "ignored" for match in assignment]].sum()
    return classes / total, 2 * boxes / max(weight, 1), 0.25 * distributions / max(weight, 1)
