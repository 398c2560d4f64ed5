"""Slow, obvious evaluation of Cascade Mask R-CNN around its raw head outputs, box by box, in float64.

As `reference_detection.py`, whose parts it puts together: no code of pvt_hf. `heads` are functions of features: those
of the boxes and those of the masks, one for each stage.
"""

import math

import torch

from tests.support import reference_detection as loops
from tests.support.reference_sparse_rcnn import generalized_iou_tensor

STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


def decode_tensor(box, deltas, stds):
    """Not clipped, with a gradient for the deltas."""
    dx, dy, dw, dh = (delta * std for delta, std in zip(deltas, stds, strict=True))
    width, height = loops.sides(box)
    x, y = (box[0] + box[2]) / 2 + width * dx, (box[1] + box[3]) / 2 + height * dy
    w, h = (side * torch.exp(d.clamp(-4.135166556742356, 4.135166556742356)) for side, d in ((width, dw), (height, dh)))
    return torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2))


def detections(heads, levels, proposed, sizes, original_sizes):
    """For each image (score, class, box in original pixels, row), and the mask probabilities of its class."""
    results = []
    for index, (size, original) in enumerate(zip(sizes, original_sizes, strict=True)):
        image_levels = [level[index : index + 1] for level in levels]
        boxes, all_logits = proposed[index], []
        for stage, head in enumerate(heads[0]):
            logits, deltas = head(loops.roi_features(image_levels, [boxes], 7))
            all_logits.append(logits)
            deltas = deltas.reshape(len(boxes), -1, 4).tolist()
            if stage < 2:
                classes = logits[:, :-1].argmax(dim=1).tolist()
                rows = zip(boxes, deltas, classes, strict=True)
                boxes = [loops.decode(box, own[label], size, STDS[stage]) for box, own, label in rows]
        scores = (sum(all_logits) / 3).softmax(dim=1)[:, :-1].tolist()
        decoded = [
            [loops.decode(box, own, size, STDS[2]) for own in row] for box, row in zip(boxes, deltas, strict=True)
        ]
        factors = (size[1] / original[1], size[0] / original[0])
        found = loops.detections(decoded, scores, factors)
        rois = [[value * factors[axis % 2] for axis, value in enumerate(box)] for _, _, box, _ in found]
        features = loops.roi_features(image_levels, [rois], 14)
        probabilities = sum(head(features).sigmoid() for head in heads[1]) / 3
        results.append((found, [mask[d[1]] for mask, d in zip(probabilities, found, strict=True)]))
    return results


def lies_inside(box, size):
    return box[0] >= 0 and box[1] >= 0 and box[2] < size[1] and box[3] < size[0]


def rpn_losses(outputs, shapes, sizes, input_size, truths, total, max_positives):
    logits, deltas = (torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True))
    strides = loops.COCO_STRIDES["mask_rcnn"]
    anchors = [box for level in loops.anchors(shapes, strides, (8,)) for box in level]
    objectness = distances = torch.zeros((), dtype=torch.float64)
    count = 0
    for index, (size, objects) in enumerate(zip(sizes, truths, strict=True)):
        valid = loops.valid_flags(shapes, strides, 3, loops.padded(size, input_size))
        valid = [flag and lies_inside(box, size) for flag, box in zip(valid, anchors, strict=True)]
        assignment = loops.assign(anchors, [box for box, _ in objects], 0.7, 0.3, 0.3, valid)
        positives, negatives = loops.sample(assignment, total, max_positives)
        for row in positives + negatives:
            target = torch.tensor(float(row in positives))
            objectness = objectness + loops.binary_cross_entropy(logits[index, row, 0], target)
        for row in positives:
            wanted = loops.encode(anchors[row], objects[assignment[row]][0])
            for delta, value in zip(deltas[index, row], wanted, strict=True):
                difference = abs(delta - value)
                distances = distances + (difference**2 * 4.5 if difference < 1 / 9 else difference - 1 / 18)
        count += max(len(positives), 1) + max(len(negatives), 1)
    return {"loss_objectness": objectness / count, "loss_rpn_box": distances / count}


def losses(heads, levels, outputs, shapes, sizes, input_size, truths, masks, samples, candidates):
    """All losses, with the names of pvt_hf. `samples`: anchors, positive anchors, RoIs, positive RoIs. Draws from
    torch's generator: for all anchors, then for the RoIs of each stage."""
    result = rpn_losses(outputs, shapes, sizes, input_size, truths, *samples[:2])
    proposed = loops.proposals(outputs, shapes, sizes, candidates, candidates)
    for stage, weight in enumerate((1, 0.5, 0.25)):
        chosen = []  # of each image (box, object or None, whether it is an object's own)
        for boxes, objects in zip(proposed, truths, strict=True):
            own = [box for box, _ in objects]
            threshold = 0.5 + stage * 0.1
            assignment = [*range(len(own)), *loops.assign(boxes, own, threshold, threshold, math.inf)]
            positives, negatives = loops.sample(assignment, *samples[2:])
            boxes = own + boxes
            image = [(boxes[row], assignment[row], row < len(own)) for row in positives]
            chosen.append(image + [(boxes[row], None, False) for row in negatives])
        logits, deltas = heads[0][stage](loops.roi_features(levels, [[roi[0] for roi in im] for im in chosen], 7))
        deltas = deltas.unflatten(1, (-1, 4))
        class_loss = box_loss = mask_loss = torch.zeros((), dtype=torch.float64)
        row, proposed, mask_rois, mask_targets = 0, [], [], []
        for index, image in enumerate(chosen):
            refined, positive = [], [roi for roi in image if roi[1] is not None]
            mask_rois.append([box for box, *_ in positive])
            for box, number, is_object in image:
                label = truths[index][number][1] if number is not None else len(logits[row]) - 1
                class_loss = class_loss - torch.log_softmax(logits[row], dim=0)[label]
                if number is not None:
                    decoded = decode_tensor(box, deltas[row, label], STDS[stage])
                    box_loss = box_loss + 1 - generalized_iou_tensor(decoded, truths[index][number][0])
                    mask = masks[index][number][None].double()
                    inside = [max(0.0, min(value, input_size[1 - axis % 2])) for axis, value in enumerate(box)]
                    target = (loops.roi_align(mask, inside, 1, 28)[0] >= 0.5).double()
                    mask_targets.append((label, target))
                else:
                    label = int(logits[row, :-1].argmax())
                if not is_object:
                    refined.append(loops.decode(box, deltas[row, label].tolist(), sizes[index], STDS[stage]))
                row += 1
            proposed.append(refined)
        mask_logits = heads[1][stage](loops.roi_features(levels, mask_rois, 14))
        for own_logits, (label, target) in zip(mask_logits, mask_targets, strict=True):
            mask_loss = mask_loss + loops.binary_cross_entropy(own_logits[label], target).mean() / len(mask_targets)
        result |= {f"loss_class_{stage}": class_loss / row * weight, f"loss_mask_{stage}": mask_loss * weight}
        result[f"loss_box_{stage}"] = 10 * box_loss / row * weight
    return result
