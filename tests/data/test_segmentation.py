"""Where label maps come from, how bad files are told, and batches of them."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import pvt_hf
from pvt_hf.data.augmentation import SegmentationAugmentation
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
    tutorial = table.rename_columns({"image": "pixel_values", "annotation": "label"})
    for data in (
        read_segmentation_dataset(table, num_labels=11),
        read_segmentation_dataset(table, "annotation"),
        read_segmentation_dataset(tutorial),
        read_segmentation_dataset(table, "annotation", "image"),
    ):
        for index in (0, len(expected) - 1):
            for ours, theirs in zip(data.read(index), expected.read(index), strict=True):
                assert torch.equal(ours, theirs)
    with pytest.raises(ImageError, match=r"must have a column of images `image` and one of label maps.*\['image'\]"):
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
