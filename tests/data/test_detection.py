"""Where the objects of images come from, how bad files are told, and batches of them."""

import copy
import json
import math

import cv2
import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.ops import masks_to_boxes
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

import pvt_hf
from pvt_hf.data.augmentation import DetectionAugmentation
from pvt_hf.data.detection import (
    DetectionCollator,
    EvaluationDetections,
    TrainingDetections,
    read_coco,
    read_detection_dataset,
)
from pvt_hf.data.digits import write_scenes
from pvt_hf.data.images import ImageError
from pvt_hf.data.samplers import AspectRatioSampler, EpochSampler
from pvt_hf.evaluation.metrics import coco_metrics, coco_results
from pvt_hf.models.annotations import AnnotationError, encode_mask, rasterize

PROCESSOR = pvt_hf.PvtDetectionImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", images=24, validation=6) / "train"


@pytest.fixture
def coco_json(tmp_path):
    """Two images and three objects of categories whose ids have gaps and no order; returns what writes it."""
    for name, size in (("a.png", (60, 40)), ("b.png", (50, 70))):
        Image.new("RGB", size, (10, 20, 30)).save(tmp_path / name)
    content = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 60, "height": 40},
            {"id": 3, "file_name": "b.png", "width": 50, "height": 70},
        ],
        "categories": [{"id": 90, "name": "cat"}, {"id": 4, "name": "dog"}, {"id": 11, "name": "emu"}],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 90, "bbox": [1, 2, 30, 40], "area": 1200, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 4, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0},
            {"id": 3, "image_id": 7, "category_id": 11, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 1},
        ],
    }

    def write(change=lambda content: None):
        changed = copy.deepcopy(content)
        change(changed)
        (tmp_path / "annotations.json").write_text(json.dumps(changed))
        return tmp_path / "annotations.json", tmp_path

    return write


def test_coco_categories_become_labels_and_back(coco_json):
    data = read_coco(*coco_json())
    assert data.label_names == ["dog", "emu", "cat"] and data.category_ids == [4, 11, 90]
    assert [record.image_id for record in data.records] == [7, 3]
    assert [annotation["category_id"] for annotation in data.target(0)["annotations"]] == [0, 1]
    assert data.target(1)["annotations"][0]["category_id"] == 2
    assert data.image(1).shape == (3, 70, 50) and data.image(1)[:, 0, 0].tolist() == [10, 20, 30]
    truth = data.ground_truth()
    assert [annotation["category_id"] for annotation in truth["annotations"]] == [4, 11, 90]
    assert [annotation["iscrowd"] for annotation in truth["annotations"]] == [0, 1, 0]
    assert [annotation["id"] for annotation in truth["annotations"]] == [1, 2, 3]
    assert sorted(map(str, truth["categories"])) == sorted(
        map(str, [{"id": 4, "name": "dog"}, {"id": 11, "name": "emu"}, {"id": 90, "name": "cat"}])
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("categories"), r"has no list \['categories'\]"),
        (lambda content: content.update(images=3), r"has no list \['images'\]"),
        (lambda content: content["annotations"][1].update(image_id=99), "annotation 2 of image 99 has `image_id` 99"),
        (lambda content: content["annotations"][2].update(category_id=5), "annotation 3 of image 7 has `category_id`"),
        (lambda content: content["annotations"][0].pop("bbox"), r"number 0 of `annotations` has no \['bbox'\]"),
        (lambda content: content["images"][1].pop("height"), r"number 1 of `images` has no \['height'\]"),
        (lambda content: content["images"][1].update(id=7), r"`images` whose ids are not different integers: \[7\]"),
        (lambda content: content["images"][1].update(id="b"), r"whose ids are not different integers: \['b'\]"),
        (lambda content: content["categories"][0].update(id=4), "`categories` whose ids are not different"),
    ],
)  # fmt: skip
def test_malformed_coco_json_is_an_error_that_says_where(coco_json, change, message):
    with pytest.raises(AnnotationError, match=rf"annotations\.json.*{message}"):
        read_coco(*coco_json(change))


def test_file_that_is_not_json_is_an_error(tmp_path):
    (tmp_path / "x.json").write_text("{")
    for name in ("x.json", "missing.json"):
        with pytest.raises(AnnotationError, match=rf"{name} cannot be read"):
            read_coco(tmp_path / name, tmp_path)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../secret.png"])
def test_files_outside_of_the_folder_are_refused_unless_allowed(coco_json, name):
    files = coco_json(lambda content: content["images"][1].update(file_name=name))
    with pytest.raises(AnnotationError, match=f"image 3 has `file_name` '{name}', which is outside"):
        read_coco(*files)
    assert read_coco(*files, allow_outside=True).records[1].name == name


def test_corrupt_image_is_skipped_or_an_error(coco_json):
    file, folder = coco_json()
    data = read_coco(file, folder)
    (folder / "b.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"b\.png \(image 3\) cannot be read"):
        data.image(1)
    (folder / "b.png").unlink()
    with pytest.raises(ImageError, match=r"b\.png \(image 3\) cannot be read"):
        data.image(1)
    training = TrainingDetections(data, DetectionAugmentation((64,), 100), skip_corrupt=True)
    batch = DetectionCollator(PROCESSOR)([training[0, 0, 0, 0], training[1, 0, 0, 1]])
    assert batch["skipped"] == 1 and batch["names"] == ["a.png"] and len(batch["labels"]) == 1
    with pytest.raises(ImageError, match="All 1 images"):
        DetectionCollator(PROCESSOR)([training[1, 0, 0, 1]])
    with pytest.raises(ImageError, match=r"b\.png"):
        TrainingDetections(data, DetectionAugmentation())[1, 0, 0, 0]
    Image.new("RGB", (51, 70)).save(folder / "b.png")
    with pytest.raises(ImageError, match=r"b\.png \(image 3\) has \(height, width\) \(70, 51\), but \(70, 50\)"):
        data.image(1)


def test_exif_orientation_is_applied_as_by_opencv(coco_json):
    """Applied as OpenCV does, unless the json has the size of the stored pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for size, turned in (((40, 60), False), ((60, 40), True)):

        def change(content, size=size):
            content["images"][0].update(file_name="a.jpg", height=size[0], width=size[1])

        file, folder = coco_json(change)
        Image.fromarray(pixels).save(folder / "a.jpg", exif=exif, quality=95)
        flag = cv2.IMREAD_COLOR if turned else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        expected = cv2.imread(str(folder / "a.jpg"), flag)[..., ::-1]
        image = read_coco(file, folder).image(0).permute(1, 2, 0).numpy()
        assert image.shape == expected.shape and np.abs(image.astype(int) - expected).mean() < 2


def test_small_and_empty_images_are_not_trained_on(coco_json, caplog):
    def change(content):
        content["images"] += [
            {"id": 8, "file_name": "c.png", "width": 90, "height": 90},
            {"id": 9, "file_name": "d.png", "width": 31, "height": 90},
        ]
        content["annotations"].append({"id": 5, "image_id": 9, "category_id": 4, "bbox": [1, 1, 9, 9]})

    data = read_coco(*coco_json(change))
    assert [record.image_id for record in data.for_training().records] == [7, 3]
    assert "skips 2 of 4 images: 1 have a side of less than 32 pixels, 1 others have no annotations" in caplog.text
    assert "skips 1 of 3 annotations: {'it is a crowd': 1}" in caplog.text
    assert [record.image_id for record in data.for_training(empty=True).records] == [7, 3, 8]
    data.records[1].annotations[0]["bbox"] = [1, 2, math.nan, 4]
    with pytest.raises(AnnotationError, match="Annotation 1 of image 3 has `bbox` .*four finite numbers"):
        data.for_training()
    with pytest.raises(AnnotationError, match="No image of 4 is left"):
        data.for_training(min_side=1000)


def test_data_set_of_the_hub_equals_coco_json(scenes):
    """The scenes as a data set with the columns of the Hub's are the same data."""
    expected = read_coco(scenes / "annotations.json", scenes / "images")
    rows = []
    for record in expected.records:
        columns = {"id": "id", "bbox": "bbox", "area": "area", "category": "category_id"}
        objects = {name: [entry[key] for entry in record.annotations] for name, key in columns.items()}
        row = {"image": record.stored, "image_id": record.image_id, "height": record.size[0], "width": record.size[1]}
        rows.append(row | {"objects": objects})
    category = datasets.ClassLabel(names=expected.label_names)
    lists = {
        "id": datasets.Value("int64"),
        "bbox": datasets.List(datasets.Value("float32"), 4),
        "area": datasets.Value("int64"),
        "category": category,
    }
    numbers = dict.fromkeys(("image_id", "height", "width"), datasets.Value("int64"))
    for objects in ({name: datasets.List(feature) for name, feature in lists.items()}, datasets.List(lists)):
        features = datasets.Features({"image": datasets.Image(), **numbers, "objects": objects})
        given = rows
        if isinstance(objects, datasets.List):
            given = [
                row
                | {
                    "objects": [
                        dict(zip(lists, entry, strict=True))
                        for entry in zip(*(row["objects"][name] for name in lists), strict=True)
                    ]
                }
                for row in rows
            ]
        table = datasets.Dataset.from_list(given, features=features)
        for hub in (table, table.remove_columns(["height", "width"])):
            data = read_detection_dataset(hub)
            assert data.label_names == expected.label_names and len(data) == len(expected)
            for index, (ours, theirs) in enumerate(zip(data.records, expected.records, strict=True)):
                assert (ours.image_id, ours.size) == (theirs.image_id, theirs.size)
                assert torch.equal(data.image(index), expected.image(index))
                for one, other in zip(ours.annotations, theirs.annotations, strict=True):
                    assert (one["category_id"], one["bbox"]) == (other["category_id"], other["bbox"])
    with pytest.raises(AnnotationError, match=r"columns `image` and `objects`, got \['image'"):
        read_detection_dataset(table.remove_columns("objects"))
    with pytest.raises(AnnotationError, match="`objects` must have `bbox` and `category`, got"):
        read_detection_dataset(datasets.Dataset.from_list([{"image": None, "objects": {"box": [1]}}]))


def test_classes_without_names_are_numbered():
    png = {"bytes": None, "path": "x.png"}
    rows = [{"image": png, "height": 4, "width": 5, "objects": {"bbox": [[0, 0, 1, 1]], "label": [2]}}] * 2
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "height": datasets.Value("int32"),
            "width": datasets.Value("int32"),
            "objects": {
                "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
                "label": datasets.List(datasets.Value("int64")),
            },
        }
    )
    data = read_detection_dataset(datasets.Dataset.from_list(rows, features=features))
    assert data.label_names == ["0", "1", "2"] and [record.image_id for record in data.records] == [0, 1]
    rows[0] = copy.deepcopy(rows[0])
    rows[0]["objects"]["label"].append(1)
    with pytest.raises(AnnotationError, match="`objects` of image 0 has lists of different lengths"):
        read_detection_dataset(datasets.Dataset.from_list(rows, features=features))
    rows[0]["objects"]["label"] = [-1]
    with pytest.raises(AnnotationError, match="object of image 0 has `label` -1, the classes are 0 to 2"):
        read_detection_dataset(datasets.Dataset.from_list(rows, features=features))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_do_not_depend_on_workers(scenes, workers):
    data = read_coco(scenes / "annotations.json", scenes / "images").for_training()
    training = TrainingDetections(data, DetectionAugmentation((64, 96), 128), masks=True)
    sampler = AspectRatioSampler([record.size for record in data.records], 4, seed=1)
    collator = DetectionCollator(PROCESSOR)
    runs = [
        list(DataLoader(training, 4, sampler=sampler, collate_fn=collator, num_workers=count)) for count in {0, workers}
    ]
    names = set()
    for batch in runs[0]:
        height, width = batch["pixel_values"].shape[2:]
        assert batch["pixel_values"].shape[:2] == (4, 3) and height % 32 == width % 32 == 0
        assert batch["skipped"] == 0
        names |= set(batch["names"])
        for label, mask in zip(batch["labels"], batch["pixel_mask"], strict=True):
            size = label["size"]
            assert mask.sum() == size.prod() and label["masks"].shape[1:] == (height, width)
            centres, sides = label["boxes"].split(2, dim=1)
            corners = torch.cat([centres - sides / 2, centres + sides / 2], dim=1) * size.flip(0).repeat(2)
            surrounding = masks_to_boxes(label["masks"].bool()) + torch.tensor([0.0, 0, 1, 1])
            torch.testing.assert_close(corners, surrounding, rtol=0, atol=1.01)
    assert names == {record.name for record in data.records}
    for one, other in zip(runs[0], runs[-1], strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
    for keys in ([(0, 1, 0, place) for place in range(8)], [(0, 1, epoch, 0) for epoch in range(8)]):
        assert len({training[key]["image"].shape for key in keys}) == 2  # each draws anew
    plain = DataLoader(training, 4, sampler=EpochSampler(len(training), seed=1), collate_fn=collator)
    assert len(next(iter(plain))["labels"]) == 4


def test_evaluation_batches_are_the_processors(scenes):
    data = read_coco(scenes / "annotations.json", scenes / "images")
    loader = DataLoader(EvaluationDetections(data), 5, collate_fn=DetectionCollator(PROCESSOR, masks=True))
    ids = []
    for index, batch in enumerate(loader):
        images = [Image.open(record.stored) for record in data.records[5 * index : 5 * index + 5]]
        targets = [data.target(place) for place in range(5 * index, 5 * index + len(images))]
        expected = PROCESSOR(images, annotations=targets, return_segmentation_masks=True, return_tensors="pt")
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        for label, wanted in zip(batch["labels"], expected["labels"], strict=True):
            assert all(torch.equal(label[name], wanted[name]) for name in wanted)
            ids.append(int(label["image_id"]))
    assert ids == [record.image_id for record in data.records]


def test_labels_come_back_as_detections(scenes):
    """Labels of the resized images, read as a detector's outputs, are the annotations of the original ones."""
    data = read_coco(scenes / "annotations.json", scenes / "images")
    results = {}
    for batch in DataLoader(EvaluationDetections(data), 5, collate_fn=DetectionCollator(PROCESSOR)):
        most = max(len(label["boxes"]) for label in batch["labels"])
        logits, boxes = torch.zeros(len(batch["labels"]), most, 11), torch.full((len(batch["labels"]), most, 4), 0.5)
        logits[..., 10] = 50
        for index, label in enumerate(batch["labels"]):
            count = len(label["boxes"])
            boxes[index, :count] = label["boxes"]
            logits[index, range(count), label["class_labels"]] = 100
        outputs = DetrObjectDetectionOutput(logits=logits, pred_boxes=boxes)
        sizes = [label["orig_size"].tolist() for label in batch["labels"]]
        found = PROCESSOR.post_process_object_detection(outputs, 0.5, sizes)
        results |= coco_results(found, [int(label["image_id"]) for label in batch["labels"]], data.category_ids)
    metrics = coco_metrics(results, data.ground_truth())
    assert metrics["AP"] == pytest.approx(1) and metrics["AR100"] == pytest.approx(1)


def test_masks_survive_encoding():
    mask = np.random.default_rng(0).random((37, 51)) > 0.6
    encoded = json.loads(json.dumps(encode_mask(mask)))
    np.testing.assert_array_equal(rasterize(encoded, (37, 51)), mask)
