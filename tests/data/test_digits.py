"""The digit scenes: files that agree with each other, the same for the same seed, and digits that can be seen."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from pvt_hf.data.digits import CLASSES, draw_scene, load_digit_images, write_scenes
from pvt_hf.models.annotations import rasterize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", images=60, validation=30, seed=3)


def test_boxes_masks_and_maps_agree(folder):
    for split, count in (("train", 60), ("validation", 30)):
        records = json.loads((folder / split / "annotations.json").read_text())
        assert [category["name"] for category in records["categories"]] == list(CLASSES)
        assert len(records["images"]) == count
        assert [annotation["id"] for annotation in records["annotations"]] == [
            *range(1, len(records["annotations"]) + 1)
        ]
        for image in records["images"]:
            pixels = np.asarray(Image.open(folder / split / "images" / image["file_name"]))
            labels = np.asarray(Image.open(folder / split / "maps" / image["file_name"]))
            size = image["height"], image["width"]
            assert pixels.shape == (*size, 3) and min(size) >= 112 and max(size) <= 192
            expected = np.zeros(size, dtype=np.uint8)
            for annotation in records["annotations"]:
                if annotation["image_id"] == image["id"]:
                    mask = rasterize(annotation["segmentation"], size)
                    x, y, width, height = annotation["bbox"]
                    box = np.zeros(size, dtype=bool)
                    box[y : y + height, x : x + width] = True
                    assert not mask[~box].any() and mask.any(axis=1).sum() == height and mask.any(axis=0).sum() == width
                    assert mask.sum() == annotation["area"] and not expected[mask].any()
                    expected[mask] = annotation["category_id"]
            np.testing.assert_array_equal(labels, expected)


def test_scenes_have_all_digits_and_contrast():
    glyphs, labels = load_digit_images("train")
    scenes = [draw_scene(glyphs, labels, np.random.default_rng(seed)) for seed in range(200)]
    counts = [len(scene.labels) for scene in scenes]
    assert 2 <= counts.count(0) <= 20 and max(counts) == 5 and 2 < np.mean(counts) < 3.5
    assert np.bincount(np.concatenate([scene.labels for scene in scenes]).astype(int)).min() > 20
    heights = [mask.any(axis=1).sum() for scene in scenes for mask in scene.masks]
    assert min(heights) >= 15 and max(heights) <= 64 and np.ptp(heights) > 35
    for scene in scenes:
        brightness = scene.pixels @ np.array([0.299, 0.587, 0.114])
        for mask in scene.masks:
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            around = np.zeros_like(mask)
            around[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
            around &= ~scene.masks.any(axis=0)
            assert abs(brightness[mask].mean() - brightness[around].mean()) > 40


def test_no_digit_is_in_both_splits():
    (train, labels), (validation, validation_labels) = load_digit_images("train"), load_digit_images("validation")
    assert len(train) == len(labels) == 1437 and len(validation) == len(validation_labels) == 360
    assert not {glyph.tobytes() for glyph in train} & {glyph.tobytes() for glyph in validation}
    assert set(validation_labels) == set(range(10))
    train[:] = 0  # of the caller, whoever reads them again
    assert load_digit_images("train")[0].any()


def test_same_seed_gives_same_bytes(folder, tmp_path):
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.*"))
    again = write_scenes(tmp_path / "again", images=60, validation=30, seed=3)
    assert len(files) == 2 * 90 + 3
    assert all((folder / file).read_bytes() == (again / file).read_bytes() for file in files)
    other = write_scenes(tmp_path / "other", images=2, validation=2, seed=4)
    first = "train/images/000001.png"
    assert (other / first).read_bytes() != (folder / first).read_bytes()
    assert (other / first).read_bytes() != (other / "validation/images/000001.png").read_bytes()


def test_scenes_are_written_once_and_completely(folder, tmp_path, monkeypatch):
    time = (folder / "scenes.json").stat().st_mtime_ns
    assert write_scenes(folder, images=60, validation=30, seed=3) == folder
    assert (folder / "scenes.json").stat().st_mtime_ns == time
    with pytest.raises(FileExistsError, match="does not hold the scenes .*'seed': 4"):
        write_scenes(folder, images=60, validation=30, seed=4)

    def broken(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError, match="no space"):
        write_scenes(tmp_path / "new", images=1, validation=1)
    assert list(tmp_path.iterdir()) == []


def test_slower_of_two_programs_takes_what_is_there(tmp_path, monkeypatch):
    """The one that is late takes what the other has written."""
    rename, others = os.rename, []

    def late(source, target):
        if not others:
            others.append(True)
            write_scenes(target, images=1, validation=1)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    folder = write_scenes(tmp_path / "scenes", images=1, validation=1)
    assert others and len(list(folder.rglob("*.png"))) == 4
