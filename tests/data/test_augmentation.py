"""Augmentation: objects and maps stay in place, colours are OpenCV's, each change comes as often as it should."""

import json

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.ops import masks_to_boxes

from pvt_hf.data.augmentation import (
    DetectionAugmentation,
    SegmentationAugmentation,
    apply_photometric_distortion,
    build_training_transform,
    flip,
    random_crop,
    resize_keep_ratio,
    to_hsv,
    to_rgb,
)
from pvt_hf.models.annotations import Objects
from pvt_hf.recipes import ImageNetRecipe


def squares(height: int, width: int, count: int = 3, seed: int = 0) -> tuple[torch.Tensor, Objects]:
    """An image that is white where its objects' masks are, which are rectangles like their boxes."""
    draw = np.random.default_rng(seed)
    boxes, masks = [], torch.zeros(count, height, width, dtype=torch.bool)
    for mask in masks:
        top, left = draw.integers(0, height - 30), draw.integers(0, width - 30)
        bottom, right = draw.integers(top + 12, height + 1), draw.integers(left + 12, width + 1)
        mask[top:bottom, left:right] = True
        boxes.append([left, top, right, bottom])
    boxes = torch.tensor(boxes, dtype=torch.float32)
    image = (masks.any(0) * 255).to(torch.uint8).expand(3, -1, -1)
    ones = torch.ones(count, dtype=torch.int64)
    return image, Objects(boxes, torch.arange(count), torch.ones(count), ones, masks)


def boxes_of(masks: torch.Tensor) -> torch.Tensor:
    """xyxy around each mask, with the ends that boxes have: one beyond the last pixel."""
    return masks_to_boxes(masks) + torch.tensor([0.0, 0, 1, 1])


def assert_aligned(image: torch.Tensor, objects: Objects, atol: float) -> None:
    assert objects.masks.shape[1:] == image.shape[1:]
    torch.testing.assert_close(objects.boxes, boxes_of(objects.masks), rtol=0, atol=atol)
    different = (image[0] > 127) != objects.masks.any(0)
    assert different.float().mean() < 0.05  # the borders, where the nearest pixel and bilinear differ


def picture(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of 16 labels, and an image of the same greys."""
    labels = (
        torch.arange(0, 256, 16).view(4, 4).repeat_interleave(-(-height // 4), 0).repeat_interleave(-(-width // 4), 1)
    )
    labels = labels[:height, :width]
    return labels.to(torch.uint8).expand(3, -1, -1), labels


def test_resize_keeps_objects_in_place():
    image, objects = squares(90, 130)
    for short, long in ((200, 260), (45, 1000), (64, 80), (90, 130)):
        resized, moved = resize_keep_ratio(image, objects, short, long)
        factor = min(long / 130, short / 90)
        size = int(90 * factor + 0.5), int(130 * factor + 0.5)
        expected = cv2.resize(image.permute(1, 2, 0).numpy(), size[::-1], interpolation=cv2.INTER_LINEAR)
        np.testing.assert_array_equal(resized.permute(1, 2, 0).numpy(), expected)
        assert_aligned(resized, moved, atol=1.01)
        scale = torch.tensor([size[1] / 130, size[0] / 90] * 2)
        torch.testing.assert_close(moved.boxes, objects.boxes * scale)


def test_flip_keeps_objects_in_place():
    image, objects = squares(90, 131)
    flipped, moved = flip(image, objects)
    assert torch.equal(flipped, image.flip(2)) and not torch.equal(moved.boxes, objects.boxes)
    assert_aligned(flipped, moved, atol=0)
    again, back = flip(flipped, moved)
    assert (
        torch.equal(again, image) and torch.equal(back.boxes, objects.boxes) and torch.equal(back.masks, objects.masks)
    )


def test_crop_keeps_objects_in_place():
    image, objects = squares(120, 150, count=5)
    sizes, vanished = [], 0
    for seed in range(60):
        cut, left = random_crop(image, objects, (40, 130), np.random.default_rng(seed))
        assert 40 <= cut.shape[1] <= 120 and 40 <= cut.shape[2] <= 130  # no longer than the image
        sizes.append(cut.shape[1:])
        assert_aligned(cut, left, atol=0)
        expected = [
            label for label, mask in zip(objects.class_labels, objects.masks, strict=True) if label in left.class_labels
        ]
        assert left.class_labels.tolist() == [int(label) for label in expected]
        vanished += len(objects) - len(left)
    heights, widths = zip(*sizes, strict=True)
    assert 115 < max(heights) <= 120 and min(heights) < 50 and max(widths) > 120 and min(widths) < 50 and vanished > 10
    small, kept = random_crop(image, objects, (384, 600), np.random.default_rng(0))
    assert torch.equal(small, image) and torch.equal(kept.boxes, objects.boxes)


def test_crop_may_leave_nothing():
    image, objects = squares(120, 150)
    cut = objects.crop(0, 0, 1, 1)
    assert len(cut) == 0 and cut.boxes.shape == (0, 4) and cut.masks.shape == (0, 1, 1)


def test_augmentation_draws_sizes_flips_and_crops_as_often_as_it_should():
    """What is drawn: short sides, flips and crops, each as often as it should be."""
    image, objects = squares(100, 160, count=1)
    one = DetectionAugmentation((64,), 200)
    flips = 0
    for seed in range(200):
        out, moved = one(image, objects, np.random.default_rng(seed))
        assert out.shape == (3, 64, 102)
        flips += bool(abs(moved.boxes[0, 0] - objects.boxes[0, 0] * 102 / 160) > 1e-3)
    assert 75 < flips < 125
    ranged = DetectionAugmentation(range(50, 61), 200, flip=0)
    shorts = [ranged(image, objects, np.random.default_rng(seed))[0].shape[1] for seed in range(200)]
    assert set(shorts) == set(range(50, 61)) and np.bincount(shorts).max() < 40
    cropped = DetectionAugmentation((64,), 2000, flip=0, crop_shortest_edges=(80, 90), crop_sides=(40, 60))
    ratios = []
    for seed in range(200):
        out, moved = cropped(image, objects, np.random.default_rng(seed))
        assert min(out.shape[1:]) == 64
        if len(moved):
            assert_aligned(out, moved, atol=3)
        ratios.append(out.shape[2] / out.shape[1])
    assert 70 < sum(abs(ratio - 1.6) < 0.01 for ratio in ratios) < 130
    assert min(ratios) >= 40 / 60 - 0.02 and max(ratios) <= 1.6
    again = [cropped(image, objects, np.random.default_rng(5)) for _ in range(2)]
    assert torch.equal(again[0][0], again[1][0]) and torch.equal(again[0][1].boxes, again[1][1].boxes)


def test_colors_are_opencvs():
    rgb = np.mgrid[0:256:5, 0:256:5, 0:256:5].reshape(3, 1, -1).astype(np.uint8)
    expected = cv2.cvtColor(rgb.transpose(1, 2, 0), cv2.COLOR_RGB2HSV).transpose(2, 0, 1)
    np.testing.assert_array_equal(to_hsv(torch.from_numpy(rgb)).numpy(), expected)
    hsv = np.stack(np.meshgrid(range(180), range(0, 256, 9), range(0, 256, 9)), 0).reshape(3, 1, -1).astype(np.uint8)
    expected = cv2.cvtColor(hsv.transpose(1, 2, 0), cv2.COLOR_HSV2RGB).transpose(2, 0, 1)
    difference = np.abs(to_rgb(torch.from_numpy(hsv)).numpy().astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.03


def test_photometric_distortion_changes_each_by_mmsegmentations_amounts():
    """Each of the four by the amounts of `PhotoMetricDistortion`, and the others as they are."""
    image = torch.tensor([150, 100, 70], dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 2)
    changed = [apply_photometric_distortion(image, np.random.default_rng(seed))[:, 0, 0] for seed in range(400)]
    same = [torch.equal(pixel, image[:, 0, 0]) for pixel in changed]
    assert 10 < sum(same) < 45  # 1 in 16
    hue, saturation, value = to_hsv(torch.stack(changed).T[..., None])[..., 0].int()
    plain = to_hsv(image)[:, 0, 0].int()
    turned = (hue - plain[0] + 90) % 180 - 90
    assert -20 <= turned.min() < -12 and 12 < turned.max() <= 20 and 150 < (turned.abs() <= 2).sum() < 260
    assert value.min() < 75 and value.max() > 220 and saturation.min() < 80 and saturation.max() > 180
    assert torch.equal(
        apply_photometric_distortion(image, np.random.default_rng(3)), changed[3].view(3, 1, 1).expand(3, 2, 2)
    )


def test_maps_follow_their_images():
    image, labels = picture(128, 256)
    shapes, starts = set(), set()
    for seed in range(60):
        augment = SegmentationAugmentation(128, 512, crop=(100, 120), max_share=1, distortion=False)
        crop, crop_labels = augment(image, labels, np.random.default_rng(seed))
        assert crop.shape[1:] == crop_labels.shape and crop_labels.dtype == torch.int64
        wrong = (crop[0].float() / 16).round() * 16 != crop_labels
        assert (crop_labels % 16 == 0).all()  # the nearest, nothing between
        assert wrong.float().mean() < 0.1  # between blocks
        shapes.add(tuple(crop_labels.shape))
        starts.add(int(crop_labels[0, 0]))
    assert max(shapes) == (100, 120) and min(shapes)[0] < 70 and len(starts) > 8
    small, _ = SegmentationAugmentation(64, 256, scales=(1, 1), flip=0, distortion=False)(
        image, labels, np.random.default_rng(0)
    )
    expected = cv2.resize(image.permute(1, 2, 0).numpy(), (128, 64), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(small.permute(1, 2, 0).numpy(), expected)


def test_crops_have_several_classes():
    """One corner has another class, the rest of the image is nearly all one, with some pixels ignored."""
    labels = torch.zeros(100, 100, dtype=torch.int64)
    labels[:40, :40] = 1
    labels[60:] = 255
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    shares = {}
    for max_share in (0.75, 1.1):
        augment = SegmentationAugmentation(100, 100, (1, 1), (50, 50), max_share, distortion=False)
        crops = [augment(image, labels, np.random.default_rng(seed))[1] for seed in range(200)]
        counted = [crop[crop != 255] for crop in crops]
        shares[max_share] = np.mean([0.25 < (crop == 1).float().mean() < 0.75 for crop in counted])
    assert shares[0.75] > 0.9 > 0.6 > shares[1.1] > 0.1


def test_training_transform_is_timms_with_the_papers_settings():
    text = str(build_training_transform(ImageNetRecipe(), 224)).replace("\n", "")
    for part in (
        "size=(224, 224), scale=(0.08, 1.0)",
        "interpolation=bicubic",
        "RandAugment",
        "n=2",
        "m=9",
        "mstd=0.5",
    ):
        assert part in text, part
    operations = next(
        part.ops for part in build_training_transform(ImageNetRecipe(), 224).transforms if hasattr(part, "ops")
    )
    posterize = next(operation.aug_fn for operation in operations if operation.name == "PosterizeIncreasing")
    image = Image.new("RGB", (2, 2), (200, 100, 7))
    assert [posterize(image, bits).getpixel((0, 0))[0] for bits in (0, 1, 2, 8)] == [0, 128, 192, 200]
    assert "RandomErasing(p=0.25, mode=pixel, count=(1, 1))" in text
    assert json.dumps("ColorJitter") not in text  # timm leaves it to RandAugment
