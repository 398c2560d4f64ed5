"""Slow, obvious evaluation of mmdetection's detectors around their raw head outputs, box by box, in float64.

Written from the papers and from the description of mmdetection 2.13; no code of pvt_hf. Boxes are lists of four
numbers, xyxy in pixels. An assignment is the index of a ground truth, `"negative"` or `"ignored"`.
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


def overlaps(boxes, others):
    """`iou` of every pair: (boxes, others), float64."""
    a, b = (torch.tensor(x, dtype=torch.float64).reshape(-1, 4) for x in (boxes, others))
    width, height = (
        (torch.minimum(a[:, None, i + 2], b[:, i + 2]) - torch.maximum(a[:, None, i], b[:, i])).clamp(min=0)
        for i in (0, 1)
    )
    areas, other_areas = ((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b))
    return width * height / (areas[:, None] + other_areas - width * height).clamp(min=1e-6)


def assign(boxes, truths, positive, negative, low_quality, valid=None):
    valid = valid or [True] * len(boxes)
    if not truths:
        return ["negative" if ok else "ignored" for ok in valid]
    rows = overlaps(truths, boxes).tolist()
    result = []
    for index, ok in enumerate(valid):
        column = [row[index] for row in rows]
        best = max(column)
        if ok and best >= positive:
            result.append(column.index(best))
        else:
            result.append("negative" if ok and best < negative else "ignored")
    for number, row in enumerate(rows):
        best = max(value for value, ok in zip(row, valid, strict=True) if ok)
        if best >= low_quality:
            for index, ok in enumerate(valid):
                if ok and row[index] == best:
                    result[index] = number
    return result


def sample(assignment, total, max_positives):
    """Draws from torch's generator in mmdetection's order."""

    def draw(indices, count):
        if len(indices) <= count:
            return indices
        return sorted(indices[i] for i in torch.randperm(len(indices))[:count].tolist())

    positives = draw([i for i, value in enumerate(assignment) if isinstance(value, int)], max_positives)
    negatives = [i for i, value in enumerate(assignment) if value == "negative"]
    return positives, draw(negatives, total - len(positives))


def nms(boxes, scores, ids, threshold, limit=math.inf):
    """The indices of the first `limit` that are left, best first."""
    ids = torch.tensor(ids)
    suppresses = (overlaps(boxes, boxes) > threshold) & (ids[:, None] == ids)
    kept, suppressed = [], torch.zeros(len(boxes), dtype=torch.bool)
    for index in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if len(kept) < limit and not suppressed[index]:
            kept.append(index)
            suppressed |= suppresses[index]
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


def padded(size, input_size):
    return [min(math.ceil(side / 32) * 32, limit) for side, limit in zip(size, input_size, strict=True)]


def retinanet_losses(outputs, shapes, sizes, input_size, truths):
    """`truths` per image: a list of (box, class). Sums over levels."""
    strides = COCO_STRIDES["retinanet"]
    logits, deltas = (torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True))
    all_anchors = [box for level in anchors(shapes, strides, RETINANET_SCALES) for box in level]
    class_loss, box_loss, total = 0, 0, 0
    for index, (size, objects) in enumerate(zip(sizes, truths, strict=True)):
        valid = valid_flags(shapes, strides, 9, padded(size, input_size))
        assignment = assign(all_anchors, [box for box, _ in objects], 0.5, 0.4, 0, valid)
        positives = 0
        for row, value in enumerate(assignment):
            if value == "ignored":
                continue
            target = torch.zeros_like(logits[index, row])
            if value != "negative":
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


def proposals(outputs, shapes, sizes, num_candidates=1000, limit=1000):
    """For each image the boxes of the region proposal network, best first.

    `outputs` per level: objectness logits (batch, anchors, 1) and deltas (batch, anchors, 4).
    """
    levels = anchors(shapes, COCO_STRIDES["mask_rcnn"], (8,))
    results = []
    for index, size in enumerate(sizes):
        boxes, scores, ids = [], [], []
        for number, ((logits, deltas), level) in enumerate(zip(outputs, levels, strict=True)):
            level_scores = [sigmoid(z) for z in logits[index, :, 0].tolist()]
            for i in sorted(range(len(level)), key=lambda i: -level_scores[i])[:num_candidates]:
                box = decode(level[i], deltas[index, i].tolist(), size)
                if min(sides(box)) > 0:
                    boxes.append(box)
                    scores.append(level_scores[i])
                    ids.append(number)
        results.append([boxes[i] for i in nms(boxes, scores, ids, 0.7, limit)])
    return results


def interpolation(positions, length):
    """The weights (positions, length) of linear interpolation, with 0 further than 1 outside of the samples."""
    weights = torch.zeros(len(positions), length, dtype=torch.float64)
    for row, position in enumerate(positions):
        if -1 <= position <= length:
            position = min(max(position, 0), length - 1)
            low = min(int(position), length - 1)
            weights[row, low] += 1 - (position - low)
            if low + 1 < length:
                weights[row, low + 1] += position - low
    return weights


def roi_align(feature_map, box, stride, size):
    """(channels, height, width) to (channels, size, size): the mean of as many samples as a bin has cells."""
    matrices, counts = [], []
    for axis, length in ((1, feature_map.shape[1]), (0, feature_map.shape[2])):
        start, end = box[axis] / stride - 0.5, box[axis + 2] / stride - 0.5
        count = math.ceil((end - start) / size)
        step = (end - start) / size
        positions = [start + step * (cell + (i + 0.5) / count) for cell in range(size) for i in range(count)]
        matrices.append(interpolation(positions, length))
        counts.append(count)
    if 0 in counts:
        return feature_map.new_zeros(len(feature_map), size, size)
    samples = torch.einsum("yh,chw,xw->cyx", matrices[0], feature_map, matrices[1])
    return samples.reshape(-1, size, counts[0], size, counts[1]).mean(dim=(2, 4))


def roi_features(levels, boxes, size):
    """Features (all boxes, channels, size, size) of the boxes of each image from P2 to P5."""
    features = []
    for index, image_boxes in enumerate(boxes):
        for box in image_boxes:
            width, height = sides(box)
            level = min(max(math.floor(math.log2(math.sqrt(width * height) / 56 + 1e-6)), 0), 3)
            features.append(roi_align(levels[level][index], box, 4 * 2**level, size))
    return torch.stack(features) if features else levels[0].new_zeros(0, levels[0].shape[1], size, size)


def mask_rcnn_detections(heads, levels, proposed, sizes, original_sizes):
    """For each image (score, class, box in original pixels, row), and the mask logits of its class. `heads` are the box
    head and the mask head, as functions of features."""
    results = []
    for index, (size, original) in enumerate(zip(sizes, original_sizes, strict=True)):
        image_levels = [level[index : index + 1] for level in levels]
        boxes = proposed[index]
        logits, deltas = heads[0](roi_features(image_levels, [boxes], 7))
        scores = logits.softmax(dim=1)[:, :-1].tolist()
        deltas = deltas.reshape(len(boxes), -1, 4).tolist()
        decoded = [[decode(box, d, size, BOX_HEAD_STDS) for d in row] for box, row in zip(boxes, deltas, strict=True)]
        factors = (size[1] / original[1], size[0] / original[0])
        found = detections(decoded, scores, factors)
        rois = [[value * factors[axis % 2] for axis, value in enumerate(box)] for _, _, box, _ in found]
        masks = heads[1](roi_features(image_levels, [rois], 14))
        results.append((found, torch.stack([mask[d[1]] for mask, d in zip(masks, found, strict=True)])))
    return results


def paste(mask_logits, box, size, threshold=0.5):
    """Bool (height, width): where the mask of the box, interpolated between its cells' centres, is at `threshold`."""

    def weights(start, end, pixels, cells):
        matrix = torch.zeros(pixels, cells, dtype=torch.float64)
        for pixel in range(pixels):
            position = (pixel + 0.5 - start) / (end - start) * cells - 0.5
            for cell in (math.floor(position), math.floor(position) + 1):
                if 0 <= cell < cells:
                    matrix[pixel, cell] = 1 - abs(position - cell)
        return matrix

    rows = weights(box[1], box[3], size[0], mask_logits.shape[0])
    columns = weights(box[0], box[2], size[1], mask_logits.shape[1])
    return rows @ mask_logits.sigmoid() @ columns.T >= threshold


def binary_cross_entropy(logits, targets):
    p = 1 / (1 + torch.exp(-logits))
    return -(targets * torch.log(p) + (1 - targets) * torch.log(1 - p))


def mask_rcnn_losses(heads, levels, outputs, shapes, sizes, input_size, truths, masks, samples=(256, 128, 512, 128)):
    """The five losses. Draws from torch's generator: first for all anchors, then for all RoIs.

    `truths` per image: a list of (box, class); `masks` per image: bool (objects, *input_size); `samples`: anchors,
    positive anchors, RoIs and positive RoIs.
    """
    strides = COCO_STRIDES["mask_rcnn"]
    logits, deltas = (torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True))
    all_anchors = [box for level in anchors(shapes, strides, (8,)) for box in level]
    losses, total = dict.fromkeys(("objectness", "rpn_box", "class", "box", "mask"), torch.zeros(())), 0
    for index, (size, objects) in enumerate(zip(sizes, truths, strict=True)):
        valid = valid_flags(shapes, strides, 3, padded(size, input_size))
        assignment = assign(all_anchors, [box for box, _ in objects], 0.7, 0.3, 0.3, valid)
        positives, negatives = sample(assignment, *samples[:2])
        for row in positives + negatives:
            target = torch.tensor(float(row in positives))
            losses["objectness"] = losses["objectness"] + binary_cross_entropy(logits[index, row, 0], target)
        for row in positives:
            wanted = logits.new_tensor(encode(all_anchors[row], objects[assignment[row]][0]))
            losses["rpn_box"] = losses["rpn_box"] + (deltas[index, row] - wanted).abs().sum()
        total += max(len(positives), 1) + max(len(negatives), 1)
    losses["objectness"], losses["rpn_box"] = losses["objectness"] / total, losses["rpn_box"] / total

    rois, positive_rois, labels, targets, mask_targets = [], [], [], [], []
    for index, boxes in enumerate(proposals(outputs, shapes, sizes, num_candidates=2000)):
        true_boxes = [box for box, _ in truths[index]]
        assignment = list(range(len(true_boxes))) + assign(boxes, true_boxes, 0.5, 0.5, 0.5)
        boxes = true_boxes + boxes
        positives, negatives = sample(assignment, *samples[2:])
        rois.append([boxes[row] for row in positives + negatives])
        positive_rois.append([boxes[row] for row in positives])
        for row in positives:
            box, label = truths[index][assignment[row]]
            labels.append(label)
            targets.append(encode(boxes[row], box, BOX_HEAD_STDS))
            mask = masks[index][assignment[row]][None].double()
            inside = [max(0.0, min(value, input_size[1 - axis % 2])) for axis, value in enumerate(boxes[row])]
            mask_targets.append((roi_align(mask, inside, 1, 28)[0] >= 0.5).double())
        labels += ["background"] * len(negatives)
        targets += [None] * len(negatives)
    class_logits, class_deltas = heads[0](roi_features(levels, rois, 7))
    for row, (label, target) in enumerate(zip(labels, targets, strict=True)):
        probabilities = class_logits[row].softmax(dim=0)
        losses["class"] = losses["class"] - torch.log(probabilities[-1 if label == "background" else label])
        if label != "background":
            delta = class_deltas[row, 4 * label : 4 * label + 4]
            losses["box"] = losses["box"] + (delta - delta.new_tensor(target)).abs().sum()
    losses["class"], losses["box"] = losses["class"] / len(labels), losses["box"] / len(labels)
    mask_logits = heads[1](roi_features(levels, positive_rois, 14))
    own_labels = [label for label in labels if label != "background"]
    for mask, label, target in zip(mask_logits, own_labels, mask_targets, strict=True):
        losses["mask"] = losses["mask"] + binary_cross_entropy(mask[label], target).mean() / len(own_labels)
    return losses, (len(own_labels), len(labels))
