"""Slow, obvious evaluation of the official detectors around their raw head outputs, box by box, in float64.

Written from the papers and from the description of mmdetection 2.13; no code of pvt_hf. Boxes are lists of four
numbers, xyxy in pixels. An assignment is the index of a ground truth, `"background"` or `"ignored"`.
"""

import math

import torch

COCO_STRIDES = {"retinanet": (8, 16, 32, 64, 128), "mask_rcnn": (4, 8, 16, 32, 64)}
RETINANET_SCALES = tuple(4 * 2 ** (k / 3) for k in range(3))
RATIOS = (0.5, 1.0, 2.0)
BOX_HEAD_STDS = (0.1, 0.1, 0.2, 0.2)


def anchors(shapes, strides, scales, ratios=RATIOS):
    """For each level of (height, width) the anchors, cell after cell."""
    levels = []
    for (height, width), stride in zip(shapes, strides, strict=True):
        level = []
        for y in range(height):
            for x in range(width):
                for ratio in ratios:
                    for scale in scales:
                        w, h = stride * scale / math.sqrt(ratio), stride * scale * math.sqrt(ratio)
                        level.append([x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2])
        levels.append(level)
    return levels


def valid_flags(shapes, strides, per_cell, padded_size):
    """In one list, whether the cell of each anchor lies in the image as it would be padded alone."""
    flags = []
    for (height, width), stride in zip(shapes, strides, strict=True):
        for y in range(height):
            for x in range(width):
                inside = y < math.ceil(padded_size[0] / stride) and x < math.ceil(padded_size[1] / stride)
                flags += [inside] * per_cell
    return flags


def encode(anchor, box, stds=(1, 1, 1, 1)):
    ax, ay, aw, ah = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2, *sides(anchor)
    bx, by, bw, bh = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, *sides(box)
    deltas = ((bx - ax) / aw, (by - ay) / ah, math.log(bw / aw), math.log(bh / ah))
    return [delta / std for delta, std in zip(deltas, stds, strict=True)]


def decode(anchor, deltas, size, stds=(1, 1, 1, 1)):
    """Clipped to an image of `size` (height, width)."""
    dx, dy, dw, dh = (delta * std for delta, std in zip(deltas, stds, strict=True))
    dw, dh = (max(-4.135166556742356, min(4.135166556742356, d)) for d in (dw, dh))
    width, height = sides(anchor)
    x, y = (anchor[0] + anchor[2]) / 2 + width * dx, (anchor[1] + anchor[3]) / 2 + height * dy
    w, h = width * math.exp(dw), height * math.exp(dh)
    box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    return [max(0.0, min(value, float(size[1 - axis % 2]))) for axis, value in enumerate(box)]


def sides(box):
    return box[2] - box[0], box[3] - box[1]


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    areas = [w * h for w, h in (sides(a), sides(b))]
    return intersection / max(sum(areas) - intersection, 1e-6)


def assign(boxes, truths, positive, negative, low_quality, valid=None):
    valid = valid or [True] * len(boxes)
    if not truths:
        return ["background" if ok else "ignored" for ok in valid]
    overlaps = [[iou(truth, box) for box in boxes] for truth in truths]
    result = []
    for index, ok in enumerate(valid):
        column = [row[index] for row in overlaps]
        best = max(column)
        if ok and best >= positive:
            result.append(column.index(best))
        else:
            result.append("background" if ok and best < negative else "ignored")
    for number, row in enumerate(overlaps):
        best = max(value for value, ok in zip(row, valid, strict=True) if ok)
        if best >= low_quality:
            for index, ok in enumerate(valid):
                if ok and row[index] == best:
                    result[index] = number
    return result


def sample(assignment, total, max_positives):
    """Draws from torch's generator in the official order."""

    def draw(indices, count):
        if len(indices) <= count:
            return indices
        return sorted(indices[i] for i in torch.randperm(len(indices))[:count].tolist())

    positives = draw([i for i, value in enumerate(assignment) if isinstance(value, int)], max_positives)
    negatives = [i for i, value in enumerate(assignment) if value == "background"]
    return positives, draw(negatives, total - len(positives))


def nms(boxes, scores, ids, threshold, limit=math.inf):
    """The indices of the first `limit` that are left, best first."""
    kept = []
    for index in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(ids[index] != ids[other] or iou(boxes[index], boxes[other]) <= threshold for other in kept):
            kept.append(index)
        if len(kept) == limit:
            break
    return kept


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def scaled(box, factors):
    return [value / factors[axis % 2] for axis, value in enumerate(box)]


def detections(boxes, scores, factors, limit=100):
    """(score, class, box, row) of the final detections: `boxes[row][class]`, divided by `factors` (width, height)."""
    candidates = [
        (score, label, scaled(boxes[row][label], factors), row)
        for row, row_scores in enumerate(scores)
        for label, score in enumerate(row_scores)
        if score > 0.05
    ]
    kept = nms([c[2] for c in candidates], [c[0] for c in candidates], [c[1] for c in candidates], 0.5, limit)
    return [candidates[index] for index in kept]


def retinanet_detections(outputs, shapes, sizes, original_sizes, limit=100):
    """`outputs` per level: logits (batch, anchors, classes) and deltas (batch, anchors, 4)."""
    results = []
    for index, (size, original) in enumerate(zip(sizes, original_sizes, strict=True)):
        boxes, scores = [], []
        levels = anchors(shapes, COCO_STRIDES["retinanet"], RETINANET_SCALES)
        for (logits, deltas), level in zip(outputs, levels, strict=True):
            rows = [[sigmoid(z) for z in row] for row in logits[index].tolist()]
            order = list(range(len(rows)))
            if len(order) > 1000:
                order = sorted(order, key=lambda i: -max(rows[i]))[:1000]
            for i in order:
                box = decode(level[i], deltas[index, i].tolist(), size)
                boxes.append([box] * len(rows[i]))
                scores.append(rows[i])
        results.append(detections(boxes, scores, (size[1] / original[1], size[0] / original[0]), limit))
    return results


def padded(size, canvas):
    return [min(math.ceil(side / 32) * 32, limit) for side, limit in zip(size, canvas, strict=True)]


def retinanet_losses(outputs, shapes, sizes, canvas, truths):
    """`truths` per image: a list of (box, class). Sums over levels."""
    strides = COCO_STRIDES["retinanet"]
    logits, deltas = (torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True))
    all_anchors = [box for level in anchors(shapes, strides, RETINANET_SCALES) for box in level]
    class_loss, box_loss, total = 0, 0, 0
    for index, (size, objects) in enumerate(zip(sizes, truths, strict=True)):
        valid = valid_flags(shapes, strides, 9, padded(size, canvas))
        assignment = assign(all_anchors, [box for box, _ in objects], 0.5, 0.4, 0, valid)
        positives = 0
        for row, value in enumerate(assignment):
            if value == "ignored":
                continue
            target = torch.zeros_like(logits[index, row])
            if value != "background":
                box, label = objects[value]
                target[label] = 1
                positives += 1
                wanted = logits.new_tensor(encode(all_anchors[row], box))
                box_loss = box_loss + (deltas[index, row] - wanted).abs().sum()
            p = 1 / (1 + torch.exp(-logits[index, row]))
            pt = (1 - p) * target + p * (1 - target)
            entropy = -(target * torch.log(p) + (1 - target) * torch.log(1 - p))
            class_loss = class_loss + ((0.25 * target + 0.75 * (1 - target)) * pt**2 * entropy).sum()
        total += max(positives, 1)
    return class_loss / total, box_loss / total
