"""Transforms of torchvision v2: boxes, masks and label maps follow, objects vanish, and the seed decides."""

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from pvt_hf.data.augmentation import DetectionAugmentation, SegmentationAugmentation, build_training_transform, flip
from pvt_hf.data.classification import TrainingImages
from pvt_hf.data.detection import TrainingDetections, read_coco
from pvt_hf.data.digits import write_scenes
from pvt_hf.data.segmentation import TrainingMaps, read_segmentation_folders
from pvt_hf.data.user_transforms import transform_map, transform_objects
from pvt_hf.recipes import ImageNetRecipe
from tests.data.test_augmentation import assert_aligned, picture, squares

FILL = {tv_tensors.Image: 0, tv_tensors.Mask: 255}
GEOMETRY = v2.Compose([v2.RandomHorizontalFlip(1), v2.RandomCrop((60, 70)), v2.ColorJitter(0.1)])


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", images=3, validation=1) / "train"


def test_objects_follow_their_image():
    image, objects = squares(90, 131)
    flipped, moved = transform_objects(v2.RandomHorizontalFlip(1), image, objects, generator())
    expected, ours = flip(image, objects)
    assert (
        torch.equal(flipped, expected) and torch.equal(moved.boxes, ours.boxes) and torch.equal(moved.masks, ours.masks)
    )
    assert torch.equal(moved.class_labels, objects.class_labels) and torch.equal(moved.area, objects.area)
    resized, moved = transform_objects(v2.Resize((180, 262), antialias=False), image, objects, generator())
    assert resized.shape == (3, 180, 262)
    assert_aligned(resized, moved, atol=1)
    torch.testing.assert_close(moved.area, 4 * objects.area)
    assert type(resized) is type(moved.boxes) is type(moved.masks) is torch.Tensor


def test_objects_outside_of_a_crop_vanish():
    """Whether the transform drops them itself or not, with all that belongs to them."""
    image, objects = squares(120, 150, count=5)
    crop, vanished = v2.RandomCrop((50, 60)), 0
    for seed in range(10):
        cut, left = transform_objects(crop, image, objects, generator(seed))
        assert cut.shape == (3, 50, 60) and len(left) == len(left.masks) == len(left.area) == len(left.iscrowd)
        assert_aligned(cut, left, atol=0)
        other = transform_objects(v2.Compose([crop, v2.SanitizeBoundingBoxes()]), image, objects, generator(seed))[1]
        assert torch.equal(other.class_labels, left.class_labels) and torch.equal(other.masks, left.masks)
        vanished += 5 - len(left)
    assert vanished > 5
    without = squares(120, 150)[1]
    without.masks = None
    assert transform_objects(v2.RandomCrop((50, 60)), image, without, generator())[1].masks is None


def test_maps_follow_their_image():
    image, labels = picture(128, 256)
    turned, moved = transform_map(v2.RandomRotation((90, 90), expand=True, fill=FILL), image, labels, generator())
    assert torch.equal(turned, image.rot90(1, (1, 2))) and torch.equal(moved, labels.rot90(1))
    turned, moved = transform_map(v2.RandomRotation((30, 30), fill=FILL), image, labels, generator())
    ignored = moved == 255
    assert 0.2 < ignored.float().mean() < 0.8 and not turned[:, ignored].any()
    assert torch.equal(turned[0][~ignored].long(), moved[~ignored])
    assert type(turned) is type(moved) is torch.Tensor and moved.dtype == torch.int64


def test_seed_decides_what_a_transform_does(scenes):
    """In every data set, and without a change of the random state of the process."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    detections = TrainingDetections(
        read_coco(scenes / "annotations.json", scenes / "images"),
        DetectionAugmentation((64,), 128),
        masks=True,
        transform=GEOMETRY,
    )
    maps = TrainingMaps(
        read_segmentation_folders(scenes / "images", scenes / "maps", num_labels=11),
        SegmentationAugmentation(64, 256, crop=(64, 64)),
        transform=GEOMETRY,
    )
    rows = [{"image": {"path": str(path), "bytes": None}, "label": 0} for path in sorted((scenes / "images").iterdir())]
    classify = v2.Compose([v2.RandomRotation(20), build_training_transform(ImageNetRecipe(), 32)])
    images = TrainingImages(rows, "label", 2, classify)
    for data, key in ((detections, "image"), (maps, "image"), (images, "pixel_values")):
        one, again, other = data[1, 0, 0, 0], data[1, 0, 0, 0], data[1, 0, 0, 1]
        assert torch.equal(one[key], again[key])
        assert one[key].shape != other[key].shape or not torch.equal(one[key], other[key])
    plain = TrainingMaps(maps.data, maps.augment)[1, 0, 0, 0]
    assert not torch.equal(plain["image"], maps[1, 0, 0, 0]["image"])
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_transform_may_not_give_is_an_error():
    image, objects = squares(90, 131)
    floats = v2.ToDtype(torch.float32, scale=True)
    with pytest.raises(
        ValueError, match=r"must give an RGB image as it gets one, uint8 .*got torch.float32 \[3, 90, 131\]"
    ):
        transform_map(floats, image, torch.zeros(90, 131, dtype=torch.int64), generator())
    with pytest.raises(ValueError, match="got Image"):
        transform_map(v2.ToPILImage(), image, torch.zeros(90, 131, dtype=torch.int64), generator())
    with pytest.raises(ValueError, match=r"a label map of the image's size, int64 \[90, 131\], got .* \[45, 131\]"):
        transform_map(lambda image, labels: (image, labels[::2]), image, torch.zeros(90, 131).long(), generator())
    with pytest.raises(ValueError, match="boxes, labels and masks of the same objects"):
        transform_objects(
            lambda image, target: (image, target | {"boxes": target["boxes"][:1]}), image, objects, generator()
        )
