"""Images as they are stored, the same for every reader, and the random state in which they are augmented."""

import random
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision import transforms
from transformers.image_utils import load_image

import pvt_hf
from pvt_hf.data.checks import check_images
from pvt_hf.data.classification import EvaluationImages, TrainingImages, load_images
from pvt_hf.data.detection import DetectionData, ImageRecord
from pvt_hf.data.images import ImageError, decode, load_split, seed_random_state
from pvt_hf.data.segmentation import EvaluationMaps, SegmentationData


def test_seeding_leaves_no_trace(monkeypatch):
    """Nor in the generators of GPUs, from which stochastic depth draws between two images."""
    for device in (torch.cuda, torch.mps, torch.xpu):
        monkeypatch.setattr(device, "manual_seed" if device is torch.mps else "manual_seed_all", pytest.fail)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    draws = []
    for seed in (1, 1, 2):
        with seed_random_state(seed, 7):
            draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1] and len(set(draws[0]) | set(draws[2])) == 6
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())


def write(path: Path, pixels: np.ndarray, orientation: int = 1, mode: str | None = None, **options) -> str:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels, mode=mode).save(path, exif=exif, **options)
    return str(path)


GREY = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
COLOURS = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
ALPHA = np.random.default_rng(2).integers(0, 256, (20, 30, 1), dtype=np.uint8)
INK = np.concatenate([255 - COLOURS, np.zeros_like(ALPHA)], axis=-1)
# What a file holds, and the image that it is everywhere.
FILES = {
    "16.png": (GREY.astype(np.uint16) * 256 + 77, np.dstack([GREY] * 3)),
    "16.tif": (GREY.astype(np.uint16) * 256 + 77, np.dstack([GREY] * 3)),
    "alpha.png": (np.concatenate([COLOURS, ALPHA], axis=-1), COLOURS),
    "alpha.webp": (np.concatenate([COLOURS, np.maximum(ALPHA, 1)], axis=-1), COLOURS),
    "grey_alpha.png": (np.concatenate([GREY[..., None], ALPHA], axis=-1), np.dstack([GREY] * 3)),
    "cmyk.tif": (INK, COLOURS),
}


@pytest.mark.parametrize("name", FILES)
def test_every_reader_sees_what_the_image_processors_see(name, tmp_path):
    """Training, evaluation and inference: 16 bits by their range, without transparency."""
    pixels, expected = FILES[name]
    path = write(tmp_path / name, pixels, mode="CMYK" if name == "cmyk.tif" else None, lossless=True)
    file = {"path": path, "bytes": None}
    np.testing.assert_array_equal(decode({"bytes": Path(path).read_bytes()}, name), expected)
    process = pvt_hf.PvtImageProcessorPil(crop_size=16)
    for given in (path, Image.open(path)):
        assert torch.equal(
            process(given, return_tensors="pt").pixel_values, process(expected, return_tensors="pt").pixel_values
        )
    rows = [{"image": file, "label": 0, "label_map": {"path": write(tmp_path / "map.png", GREY)}}]
    transform = transforms.PILToTensor()
    record = ImageRecord(0, name, (20, 30), [], path)
    read = {
        "classification": TrainingImages(rows, "label", 1, transform)[0, 0]["pixel_values"],
        "segmentation": SegmentationData(rows).read(0)[0],
        "detection": DetectionData([], [], [record]).image(0),
    }
    for image in read.values():
        np.testing.assert_array_equal(image.permute(1, 2, 0), expected)


def test_images_without_a_known_range_are_refused_by_name(tmp_path):
    path = write(tmp_path / "float.tif", GREY.astype(np.float32) / 255)
    rows = [{"image": {"path": path, "bytes": None}, "label": 0, "label_map": {"path": path}}]
    process = pvt_hf.PvtImageProcessorPil()
    for read in (
        lambda: TrainingImages(rows, "label", 1, None)[0, 0],
        lambda: EvaluationImages(rows, "label", 1, process)[0],
        lambda: DetectionData([], [], [ImageRecord(0, path, (20, 30), [], path)]).image(0),
    ):
        with pytest.raises(ImageError, match=r"float\.tif .*floating-point pixels \(PIL's mode 'F'\)"):
            read()
    (found,) = check_images([path])  # before the first step
    assert "floating-point pixels (PIL's mode 'F')" in found.problem
    with pytest.raises(ValueError, match=r"float\.tif.* floating-point pixels"):
        process(path)
    rows[0]["image"]["path"] = write(tmp_path / "thin.png", np.zeros((20000, 1, 3), np.uint8))
    with pytest.raises(ImageError, match=r"thin\.png cannot be prepared: .* 20000 x 1 pixels"):
        EvaluationImages(rows, "label", 1, process)[0]


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_exif_turns_images_as_pipelines_do(orientation, tmp_path):
    """In classification, segmentation and detection, for training and evaluation. Maps and annotations are of the
    turned image, or of the stored one where only that has their size."""
    path = write(tmp_path / "a.png", COLOURS, orientation)
    expected = np.asarray(load_image(path))
    turned = expected.shape[:2]
    process = pvt_hf.PvtImageProcessorPil(crop_size=16)
    pixel_values = process(load_image(path), return_tensors="pt").pixel_values[0]
    for labels, image in ((GREY if turned == (20, 30) else GREY.T, expected), (GREY, None)):
        image = image if image is not None else expected if turned == (20, 30) else COLOURS
        file = {"path": path, "bytes": None}
        rows = [{"image": file, "label": 0, "label_map": {"path": write(tmp_path / "map.png", labels)}}]
        data = SegmentationData(rows)
        read, read_labels = data.read(0)
        np.testing.assert_array_equal(read.permute(1, 2, 0), image)
        np.testing.assert_array_equal(read_labels, labels)
        segmenter = pvt_hf.PvtSegmentationImageProcessor(size={"height": 32, "width": 32})
        row = EvaluationMaps(data, segmenter)[0]
        assert torch.equal(row["pixel_values"], segmenter(image, return_tensors="pt").pixel_values[0])
        record = ImageRecord(0, path, labels.shape, [], path)
        np.testing.assert_array_equal(DetectionData([], [], [record]).image(0).permute(1, 2, 0), image)
    training = TrainingImages(rows, "label", 1, transforms.PILToTensor())
    np.testing.assert_array_equal(training[0, 0]["pixel_values"].permute(1, 2, 0), expected)
    assert torch.equal(EvaluationImages(rows, "label", 1, process)[0]["pixel_values"], pixel_values)
    write(tmp_path / "map.png", GREY[:, :-1])
    with pytest.raises(ValueError, match=r"has \(height, width\) \[20, 29\].*EXIF"):
        data.read(0)


def test_maps_are_turned_by_their_own_exif(tmp_path):
    rows = [{"image": {"path": write(tmp_path / "a.png", COLOURS)}, "label_map": {"path": str(tmp_path / "map.png")}}]
    write(tmp_path / "map.png", GREY.astype(np.uint16) * 200, orientation=3)
    np.testing.assert_array_equal(SegmentationData(rows).read(0)[1], GREY[::-1, ::-1].astype(int) * 200)


def test_corrupt_exif_turns_nothing(tmp_path):
    content = Path(write(tmp_path / "a.jpg", COLOURS, orientation=3)).read_bytes()
    upright = Path(write(tmp_path / "b.jpg", COLOURS)).read_bytes()
    for header in (b"MM\x00*", b"II*\x00"):
        content = content.replace(header, b"\xff" * 4)
    np.testing.assert_array_equal(decode({"bytes": content}, "a.jpg"), decode({"bytes": upright}, "b.jpg"))


def test_data_sets_that_were_saved_are_loaded_by_every_reader(tmp_path):
    """As `save_to_disk` writes them, with splits; a split that is missing is told with those that are there."""
    path = write(tmp_path / "a.png", GREY)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": [path], "label": [1]}, features=features)
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "saved"))
    for load in (load_split, load_images):
        data = load(str(tmp_path / "saved"), "train")
        assert data["label"][:] == [1] and data.features["label"].names == ["a", "b"]
        with pytest.raises(ImageError, match=r"Split 'test' of .* cannot be loaded: it has the splits \['train'\]"):
            load(str(tmp_path / "saved"), "test")
