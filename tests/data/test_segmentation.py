"""Images with label maps, and their augmentation: OpenCV's colours, crops with several classes, maps that follow."""

import cv2
import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import pvt_hf
from pvt_hf.data.augmentation import SegmentationAugmentation, apply_photometric_distortion, to_hsv, to_rgb
from pvt_hf.data.digits import write_scenes
from pvt_hf.data.images import ImageError
from pvt_hf.data.samplers import EpochSampler
from pvt_hf.data.segmentation import (
    EvaluationMaps,
    MapCollator,
    TrainingMaps,
    read_segmentation_dataset,
    read_segmentation_folders,
)

PROCESSOR = pvt_hf.PvtSegmentationImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
PLAIN = SegmentationAugmentation(64, 256, crop=(64, 96), distortion=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", images=20, validation=6) / "train"


@pytest.fixture
def files(tmp_path):
    """Two images with maps of the labels 0 to 3."""
    for name in ("a", "b"):
        for kind, mode, ending in (("images", "RGB", "jpg"), ("maps", "L", "png")):
            (tmp_path / kind / "deep").mkdir(parents=True, exist_ok=True)
            values = np.random.default_rng(0).integers(0, 4, (30, 40) if mode == "L" else (30, 40, 3), dtype=np.uint8)
            Image.fromarray(values).save(tmp_path / kind / "deep" / f"{name}.{ending}")
    return tmp_path / "images", tmp_path / "maps"


def picture(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of 16 labels, and an image of the same greys."""
    labels = (
        torch.arange(0, 256, 16).view(4, 4).repeat_interleave(-(-height // 4), 0).repeat_interleave(-(-width // 4), 1)
    )
    labels = labels[:height, :width]
    return labels.to(torch.uint8).expand(3, -1, -1), labels


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


def test_folders_pair_images_and_maps_by_name(files):
    data = read_segmentation_folders(*files, num_labels=4)
    image, labels = data.read(1)
    expected = np.asarray(Image.open(files[1] / "deep" / "b.png"))
    assert len(data) == 2 and image.shape == (3, 30, 40) and image.dtype == torch.uint8
    np.testing.assert_array_equal(labels.numpy(), expected)
    _, reduced = read_segmentation_folders(*files, num_labels=3, reduce_labels=True).read(1)
    np.testing.assert_array_equal(reduced.numpy(), np.where(expected == 0, 255, expected.astype(int) - 1))
    with pytest.raises(ValueError, match=r"label map .*b\.png of .*b\.jpg has the labels \[2, 3\], the classes"):
        read_segmentation_folders(*files, num_labels=2).read(1)
    (files[1] / "deep" / "b.png").rename(files[1] / "deep" / "c.png")
    with pytest.raises(ImageError, match=r"1 images are without a map \(\['deep/b'\]\), 1 maps without .*'deep/c'"):
        read_segmentation_folders(*files)
    with pytest.raises(ImageError, match="has 0 images"):
        read_segmentation_folders(files[0] / "none", files[1] / "none")


def test_corrupt_or_unusable_map_is_skipped_or_an_error(files):
    path = files[1] / "deep" / "b.png"
    data = read_segmentation_folders(*files)
    Image.new("RGB", (40, 30)).save(path)
    with pytest.raises(ValueError, match=r"b\.png of .*b\.jpg .* mode 'RGB': it must have one class label"):
        data.read(1)
    Image.new("L", (30, 40)).save(path)
    with pytest.raises(ValueError, match=r"b\.png of .*has \(height, width\) \[40, 30\], the image \[30, 40\]"):
        data.read(1)
    path.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"b\.png of .*b\.jpg cannot be read"):
        data.read(1)
    collate = MapCollator(PROCESSOR, (64, 96))
    training = TrainingMaps(data, PLAIN, skip_corrupt=True)
    batch = collate([training[0, 0, 0, 0], training[1, 0, 0, 1]])
    assert batch["skipped"] == 1 and len(batch["names"]) == len(batch["labels"]) == 1
    with pytest.raises(ImageError, match="All 1 images"):
        collate([None])
    with pytest.raises(ImageError, match="cannot be read"):
        TrainingMaps(data, PLAIN)[1, 0, 0, 1]
    (files[0] / "deep" / "a.jpg").write_bytes(b"")
    with pytest.raises(ImageError, match=r"a\.jpg cannot be read"):
        EvaluationMaps(data, PROCESSOR)[0]


def test_data_set_of_the_hub_equals_folders(folder):
    expected = read_segmentation_folders(folder / "images", folder / "maps", num_labels=11)
    rows = {"image": [row["image"]["path"] for row in expected.rows]}
    rows |= {"annotation": [row["label_map"]["path"] for row in expected.rows], "other": list(range(len(expected)))}
    features = {"image": datasets.Image(), "annotation": datasets.Image(), "other": datasets.Value("int64")}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    for data in (read_segmentation_dataset(table, num_labels=11), read_segmentation_dataset(table, "annotation")):
        for index in (0, len(expected) - 1):
            for ours, theirs in zip(data.read(index), expected.read(index), strict=True):
                assert torch.equal(ours, theirs)
    with pytest.raises(ImageError, match=r"must have columns of images `image` and `map_column`, it has \['image'\]"):
        read_segmentation_dataset(table.remove_columns("annotation"))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_do_not_depend_on_workers(folder, workers):
    data = read_segmentation_folders(folder / "images", folder / "maps", num_labels=11)
    augment = SegmentationAugmentation(64, 256, crop=(64, 96))
    training, collate = TrainingMaps(data, augment), MapCollator(PROCESSOR, (64, 96))
    sampler = EpochSampler(len(data), seed=1)
    runs = [list(DataLoader(training, 4, sampler=sampler, collate_fn=collate, num_workers=n)) for n in {0, workers}]
    padded = 0
    for one, other in zip(runs[0], runs[-1], strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"]) and torch.equal(one["labels"], other["labels"])
        assert one["pixel_values"].shape == (4, 3, 64, 96) and one["labels"].shape == (4, 64, 96)
        assert one["pixel_values"].dtype == torch.float32 and one["labels"].dtype == torch.int64
        ignored = one["labels"] == 255  # only the padding, in these maps
        assert not one["pixel_values"].movedim(1, -1)[ignored].any() and one["labels"][~ignored].max() <= 10
        padded += int(ignored.sum())
    assert padded > 0


def test_evaluation_keeps_labels_at_the_original_size(folder):
    data = read_segmentation_folders(folder / "images", folder / "maps", num_labels=11)
    row = EvaluationMaps(data, PROCESSOR)[3]
    image, labels = data.read(3)
    assert torch.equal(row["labels"], labels) and labels.shape == image.shape[1:]
    assert torch.equal(row["pixel_values"], PROCESSOR(image, return_tensors="pt").pixel_values[0])
