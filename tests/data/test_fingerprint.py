"""Fingerprints of data: others where names, sizes or annotations are, and the same wherever the files lie."""

import dataclasses
import shutil
from pathlib import Path

import datasets
import pytest
from PIL import Image
from torch.utils.data import Dataset

from pvt_hf.data.classification import EvaluationImages, StreamedImages, TrainingImages, load_images
from pvt_hf.data.detection import EvaluationDetections, TrainingDetections, read_coco, read_detection_dataset
from pvt_hf.data.digits import write_scenes
from pvt_hf.data.fingerprint import fingerprint
from pvt_hf.data.segmentation import EvaluationMaps, TrainingMaps, read_segmentation_folders

CHECKSUMS = {"names", "sizes", "annotations"}


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def write_images(folder: Path) -> Path:
    for name, color in (("a/1", "red"), ("a/2", "blue"), ("b/1", "red"), ("b/3", "green")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), color).save(folder / f"{name}.png")
    return folder


def read_images(folder: Path, places=None) -> dict:
    rows = load_images(str(folder), "train")
    return fingerprint(TrainingImages(rows, "label", len(rows.features["label"].names), None, places=places))


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images")


def test_images_of_a_folder(folder, tmp_path):
    """Pixels that change the size are seen; those that keep it are not, as is said."""
    first = read_images(folder)
    assert first["kind"] == "TrainingImages" and first["images"] == 4 and first.keys() > CHECKSUMS
    assert changed(first, read_images(shutil.copytree(folder, tmp_path / "elsewhere"))) == set()
    assert changed(first, read_images(folder, places=[1, 0])) == {"annotations"}
    with (folder / "a" / "1.png").open("ab") as file:
        file.write(b"more")
    assert changed(first, read_images(folder)) == {"sizes"}
    (folder / "a" / "1.png").rename(folder / "a" / "0.png")
    assert changed(first, read_images(folder)) == {"sizes", "names"}


def test_rows_of_a_table_are_those_that_are_selected():
    """In their order; a list of the same rows is the same."""
    rows = load_images(None, "train").select([5, 2, 9, 4])
    found = fingerprint(TrainingImages(rows, "label", 10, None))
    assert changed(found, fingerprint(TrainingImages(list(rows), "label", 10, None))) == set()
    assert changed(found, fingerprint(EvaluationImages(rows, "label", 10, None))) == {"kind"}
    assert "annotations" in changed(found, fingerprint(TrainingImages(rows.select([1, 0, 2, 3]), "label", 10, None)))
    assert "sizes" in changed(found, fingerprint(TrainingImages(rows.select([0, 0, 2, 3]), "label", 10, None)))
    missing = [*rows.select(range(3)), {"image": None, "label": 4}]
    assert "sizes" in changed(found, fingerprint(TrainingImages(missing, "label", 10, None)))


@pytest.mark.parametrize("kind", ["tar", "parquet", "memory"])
def test_shards_of_a_stream(kind, tmp_path):
    def read() -> dict:
        pattern = None if kind == "memory" else str(tmp_path / f"*.{kind}")
        rows = load_images(pattern, "train", streaming=True)
        return fingerprint(StreamedImages(rows, "cls" if kind == "tar" else "label", 10, None, 8, 0))

    def write(name: str, numbers: list[int]) -> None:
        rows = load_images(None, "train").select(numbers)
        if kind == "parquet":
            rows.to_parquet(tmp_path / f"{name}.parquet")
        else:
            (tmp_path / "images").mkdir(exist_ok=True)
            for number, row in zip(numbers, rows, strict=True):
                (tmp_path / "images" / f"{number}.png").write_bytes(row["image"]["bytes"])
                (tmp_path / "images" / f"{number}.cls").write_text(str(row["label"]))
            shutil.make_archive(str(tmp_path / name), "tar", tmp_path / "images")

    if kind != "memory":
        write("first", [1, 2])
        write("second", [3])
    found = read()
    assert found.keys() == {"kind"} | CHECKSUMS and changed(found, read()) == set()
    if kind != "memory":
        (tmp_path / f"second.{kind}").rename(tmp_path / f"third.{kind}")
        assert changed(found, read()) == {"names"}
        write("third", [*range(4, 40)])
        assert changed(found, read()) == {"names", "sizes"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", images=3, validation=2)


def test_objects(scenes, tmp_path):
    """Whatever annotations say counts: a box, a class, a mask, what is crowded."""
    data = read_coco(scenes / "train" / "annotations.json", scenes / "train" / "images")
    found = fingerprint(TrainingDetections(data, None))
    assert found["images"] == 3 and found.keys() > CHECKSUMS
    copy = shutil.copytree(scenes, tmp_path / "copy")
    again = read_coco(copy / "train" / "annotations.json", copy / "train" / "images")
    assert changed(found, fingerprint(TrainingDetections(again, None))) == set()
    first = next(record for record in data.records if record.annotations)
    for change in ({"bbox": [0, 0, 9, 9]}, {"category_id": 3}, {"iscrowd": 7}, {"segmentation": [[1, 2, 3, 4, 5, 6]]}):
        other = dataclasses.replace(first, annotations=[first.annotations[0] | change, *first.annotations[1:]])
        records = [other if record is first else record for record in data.records]
        others = dataclasses.replace(data, records=records)
        assert changed(found, fingerprint(TrainingDetections(others, None))) == {"annotations"}
    others = dataclasses.replace(data, label_names=data.label_names[::-1])
    assert changed(found, fingerprint(TrainingDetections(others, None))) == {"annotations"}
    (copy / "train" / "images" / Path(first.stored).name).write_bytes(b"other")
    assert changed(found, fingerprint(TrainingDetections(again, None))) == {"sizes"}


def test_objects_of_a_table():
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "objects": {
                "bbox": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
                "category": datasets.Sequence(datasets.ClassLabel(names=["a", "b"])),
            },
            "width": datasets.Value("int64"),
            "height": datasets.Value("int64"),
        }
    )
    images = load_images(None, "train").select(range(3))["image"]

    def read(box: list[float], rows: list[int]) -> dict:
        columns = {"image": images, "width": [8] * 3, "height": [8] * 3}
        columns |= {"objects": [{"bbox": [box], "category": [1]}] * 3}
        data = datasets.Dataset.from_dict(columns, features=features).select(rows)
        return fingerprint(EvaluationDetections(read_detection_dataset(data)))

    found = read([1, 1, 4, 4], [0, 1, 2])
    assert found["images"] == 3 and changed(found, read([1, 1, 4, 4], [0, 1, 2])) == set()
    assert changed(found, read([1, 1, 4, 5], [0, 1, 2])) == {"annotations"}
    assert "sizes" in changed(found, read([1, 1, 4, 4], [0, 0, 1]))


def test_maps(scenes, tmp_path):
    """Maps count as images do, and how they are read."""
    copy = shutil.copytree(scenes / "train", tmp_path / "copy")

    def read(folder: Path, **settings) -> dict:
        data = read_segmentation_folders(folder / "images", folder / "maps", num_labels=11, **settings)
        return fingerprint(TrainingMaps(data, None))

    found = read(copy)
    assert found["images"] == 3 and found.keys() > CHECKSUMS
    assert changed(found, read(scenes / "train")) == set()
    data = read_segmentation_folders(copy / "images", copy / "maps", num_labels=11)
    assert changed(found, fingerprint(EvaluationMaps(data, None))) == {"kind"}
    assert changed(found, read(copy, reduce_labels=True)) == {"annotations"}
    assert changed(found, read(copy, palette={(0, 0, 0): 0})) == {"annotations"}
    with next((copy / "maps").glob("*.png")).open("ab") as file:
        file.write(b"more")
    assert changed(found, read(copy)) == {"sizes"}


class Others(Dataset):
    def __len__(self):
        return 7


def test_data_of_others_have_a_class_and_a_number():
    assert fingerprint(Others()) == {"kind": "Others", "images": 7}
    assert fingerprint(None) == {}
