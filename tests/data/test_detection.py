"""Where the objects of images come from, how bad files are told, and batches of them."""

import copy
import dataclasses
import json
import math
import re

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
from pvt_hf.data.class_names import ClassNameError
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
        (lambda content: content["images"][1].update(id=7), r"`images` with the same ids: \[7\]"),
        (lambda content: content["images"][1].update(id="b"), r"number 1 of `images` \(id 'b'\) has `id` 'b', it must"),
        (lambda content: content["images"][1].update(id=[1]), r"has `id` \[1\], it must be an integer"),
        (lambda content: content["categories"][0].update(id=4), r"`categories` with the same ids: \[4\]"),
        (lambda content: content["categories"][0].update(name=None), r"`categories` \(id 90\) has `name` None, it"),
        (lambda content: content["images"].append(None), "number 2 of `images` is no object: None"),
        (lambda content: content["annotations"].append([1]), r"number 3 of `annotations` is no object: \[1\]"),
        (lambda content: content["images"][0].update(file_name=3), r"\(id 7\) has `file_name` 3, it must be a string"),
        (lambda content: content["images"][0].update(width=60.0), r"has `width` 60.0, it must be a positive integer"),
        (lambda content: content["images"][0].update(height="40"), "has `height` '40', it must be a positive integer"),
        (lambda content: content["images"][0].update(height=0), "has `height` 0, it must be a positive integer"),
        (lambda content: content["annotations"][0].update(image_id="3"), r"\(id 1\) has `image_id` '3', it must be an"),
        (lambda content: content["annotations"][0].update(category_id=None), "has `category_id` None, it must be an"),
        (lambda content: content["annotations"][0].update(bbox=None), r"b\.png: Annotation 1 of image 3 has `bbox` N"),
        (lambda content: content["annotations"][0].update(bbox=["1", 2, 3, 4]), r"has `bbox` \['1', 2, 3, 4\], it"),
        (lambda content: content["annotations"][0].update(bbox={"x": 1}), "has `bbox` {'x': 1}, it must be four"),
        (lambda content: content["annotations"][0].update(bbox=[1, 2, 3, 10**400]), "it must be four finite numbers"),
        (lambda content: content["annotations"][0].update(bbox=[1, 2, 3, math.nan]), "nan.*it must be four finite"),
        (lambda content: content["annotations"][0].update(area="1200"), "has `area` '1200', it must be a finite"),
        (lambda content: content["annotations"][0].update(iscrowd="0"), "has `iscrowd` '0', it must be 0 or 1"),
    ],
)  # fmt: skip
def test_malformed_coco_json_is_an_error_that_says_where(coco_json, change, message):
    with pytest.raises(AnnotationError, match=rf"annotations\.json.*{message}"):
        read_coco(*coco_json(change))


def test_file_that_is_not_json_is_an_error(tmp_path):
    contents = {"x": "{", "deep": "[" * 100_000, "twice": '{"images": [], "images": [1]}', "digits": "1" * 5000}
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(content)
    (tmp_path / "latin.json").write_bytes(b'{"images": "\xe9"}')
    for name in (*contents, "latin", "missing"):
        with pytest.raises(AnnotationError, match=rf"{name}\.json cannot be read"):
            read_coco(tmp_path / f"{name}.json", tmp_path)
    with pytest.raises(AnnotationError, match=r"an object has keys twice: \['images'\]"):
        read_coco(tmp_path / "twice.json", tmp_path)


ODD = [None, True, -1, 0, 0.5, math.nan, math.inf, 10**30, "", "7", "\0", [], [[]], [None] * 4, ["1"] * 6, {}]
ODD += [{"size": [40, 60], "counts": value} for value in ("", "x", "\xe9", [-1], [1.5], ["1"], [10**12], None)]
ODD += [[[math.nan] * 6], [["1"] * 6], [[1] * 7], [[1, 1] * 2], {"size": [40, 60]}, {"counts": [2400]}]


def test_no_value_of_any_field_ends_in_a_traceback(coco_json):
    """Each is read, or an error that names the file."""
    refused = 0
    fields = {"images": ("id", "file_name", "width", "height"), "categories": ("id", "name", "supercategory")}
    fields["annotations"] = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "segmentation")
    for part, names in fields.items():
        for name in names:
            for value in ODD:

                def change(content, entry=(part, name, value)):
                    content[entry[0]][0][entry[1]] = entry[2]

                files = coco_json(change)
                try:
                    data = read_coco(*files)
                except AnnotationError as error:
                    assert str(files[0]) in str(error)
                    refused += 1
                    continue
                for check in (data.for_training, data.for_evaluation, data.ground_truth):
                    try:
                        check(masks=True)
                    except AnnotationError as error:
                        refused += 1
                        assert re.search("Annotation .* of image 3 |No annotation of ", str(error))
    assert refused > 300


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
        content["annotations"].append({"id": 6, "image_id": 3, "category_id": 11, "bbox": [1, 1, 9, 9]})

    data = read_coco(*coco_json(change))
    assert [record.image_id for record in data.for_training().records] == [7, 3]
    assert "skips 2 of 4 images: 1 have a side of less than 32 pixels, 1 others have no annotations" in caplog.text
    assert "skips 2 of 5 annotations: {'it is a crowd': 1, 'its image has a side of less than 32" in caplog.text
    assert [record.image_id for record in data.for_training(empty=True).records] == [7, 3, 8]
    data.records[1].annotations[0]["bbox"] = [1, 2, math.nan, 4]
    with pytest.raises(AnnotationError, match="Annotation 1 of image 3 has `bbox` .*four finite numbers"):
        data.for_training()


CROWD, NO_AREA = "'it is a crowd': ", "'its area is not positive': "


def update_annotations(**fields):
    return lambda content: [annotation.update(fields) for annotation in content["annotations"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (update_annotations(area=0), f"of any class.*'dog': {{{NO_AREA}1}}, 'emu': {{{NO_AREA}1}}, 'cat': {{{NO_AREA}"),
        (update_annotations(iscrowd=1), rf"No annotation of any class can be trained on.*'dog': {{{CROWD}1}}"),
        (lambda content: content["images"][1].update(width=31), "of 2 of 3 classes.*'cat': {'its image has a side of"),
        (lambda content: None, f"No annotation of 1 of 3 classes can be trained on.*: {{'emu': {{{CROWD}1}}}}"),
        (lambda content: content["annotations"].clear(), "No image of 2 is left to train on"),
    ],
)  # fmt: skip
def test_training_on_nothing_is_an_error(coco_json, change, message, caplog):
    """Also of one class, unless that is allowed: what is left out is counted by class and reason."""
    data = read_coco(*coco_json(change))
    with pytest.raises(AnnotationError, match=message) as error:
        data.for_training()
    if "--allow_missing_classes" in str(error.value):  # what is left is trained on
        assert data.for_training(allow_missing=True).label_names == ["dog", "emu", "cat"]
        assert re.search(message, caplog.text)
    else:
        with pytest.raises(AnnotationError, match=message):
            data.for_training(allow_missing=True)


def test_evaluation_without_objects_is_an_error(coco_json, caplog):
    for change, count in ((update_annotations(iscrowd=1), 3), (lambda content: content["annotations"].clear(), 0)):
        with pytest.raises(AnnotationError, match=f"nothing to measure: 2 images have {count} annotations"):
            read_coco(*coco_json(change)).for_evaluation()
    read_coco(*coco_json(update_annotations(area=0))).for_evaluation()
    assert "Of 2 objects to find, training would skip 2: {'its area is not positive': 2}" in caplog.text


FORMATS = {
    "voc": lambda x, y, w, h, width, height: [x, y, x + w, y + h],
    "yolo": lambda x, y, w, h, width, height: [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height],
    "albumentations": lambda x, y, w, h, width, height: [x / width, y / height, (x + w) / width, (y + h) / height],
}


@pytest.mark.parametrize("name", FORMATS)
def test_boxes_of_another_format_are_recognised_by_their_values(coco_json, name):
    """They are refused with the guess, and read where they are said to have it."""

    def change(content):
        content["annotations"][0]["bbox"] = [15, 30, 30, 40]  # reaches out where its corner is taken for its size
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        for annotation in content["annotations"]:
            annotation["bbox"] = FORMATS[name](*annotation["bbox"], *sizes[annotation["image_id"]])

    files = coco_json(change)
    with pytest.raises(AnnotationError, match=rf"annotations\.json: only .* of the 3 boxes.*`{name}` .*--bbox_format"):
        read_coco(*files)
    data = read_coco(*files, bbox_format=name)
    boxes = [entry["bbox"] for record in data.records for entry in record.annotations]
    np.testing.assert_allclose(boxes, [[5, 5, 20, 20], [0, 0, 9, 9], [15, 30, 30, 40]], atol=1e-12)
    if name != "voc":  # for whose corners these boxes may be taken
        with pytest.raises(AnnotationError, match=r"They look like `coco` \(x, y, width, height in pixels\)"):
            read_coco(*coco_json(), bbox_format=name)


def test_relative_sizes_are_recognised_though_no_format_has_them(coco_json):
    """Also beside a format that they might have too; a few tiny boxes are not taken for them."""
    for box, guess in (([0.7, 0.1, 0.3, 0.8], "like x"), ([0.5, 0.5, 0.4, 0.3], r"like `yolo` \([a-z, ]*\) or x")):

        def change(content, box=box):
            for annotation in content["annotations"]:
                annotation["bbox"] = box

        with pytest.raises(AnnotationError, match=f"{guess}, y, width, height relative to the image .* multiply them"):
            read_coco(*coco_json(change))
    read_coco(*coco_json(lambda content: content["annotations"][0].update(bbox=[0.5, 0.5, 0.4, 0.3])))


def test_errors_in_masks_name_the_file(coco_json):
    """And the image and the annotation, as all others do."""
    data = read_coco(*coco_json(lambda content: content["annotations"][0].update(segmentation=["1,2,3,4,5,6"])))
    for check in (data.for_training, data.for_evaluation):
        with pytest.raises(AnnotationError, match=r"annotations\.json, b\.png: Annotation 1 of image 3 has `segm"):
            check(masks=True)


def test_files_are_checked_before_training(coco_json, caplog):
    """All that is wrong is told at once, or left out and listed; truncated images are found where they are left out."""
    file, folder = coco_json(lambda content: content["images"][0].update(width=61))
    data = read_coco(file, folder)
    (folder / "b.png").unlink()
    with pytest.raises(
        ImageError, match=r"(?s)2 of 2 images of the training set cannot be used:.*61.*b\.png \(image 3\)"
    ):
        data.check_images("the training set")
    data = read_coco(*coco_json())
    with pytest.raises(ImageError, match=r"(?s)1 of 2 images.*b\.png \(image 3\): .*FileNotFoundError.*--skip_corrupt"):
        data.check_images("the training set")
    kept = data.check_images("the training set", skip_corrupt=True)
    assert [record.name for record in kept.records] == ["a.png"] and "b.png (image 3)" in kept.left_out[0]
    assert "1 of 2 images of the training set cannot be used" in caplog.text
    Image.effect_noise((50, 70), 90).save(folder / "b.png")
    assert data.check_images("the training set", skip_corrupt=True) is data
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:2000])
    assert data.check_images("the training set") is data
    assert len(data.check_images("the training set", skip_corrupt=True)) == 1
    (folder / "a.png").unlink()
    with pytest.raises(ImageError, match="2 of 2 images"):
        data.check_images("the training set", skip_corrupt=True)


def test_annotations_without_a_mask_are_counted(coco_json, caplog):
    """They train their box, or are left out; masks of another size are found, and those to measure are crowds."""
    polygon = [5, 5, 25, 5, 25, 25]

    def change(content):
        content["annotations"][0]["segmentation"] = []
        content["annotations"][1]["segmentation"] = [[1, 1, 2, 2], polygon]
        content["annotations"][2] |= {"segmentation": [[1, 1, 2, 2]], "iscrowd": 0}

    data = read_coco(*coco_json(change))
    assert len(data.for_training(masks=True)) == 2
    assert "2 of 3 annotations have no mask: they train their box only" in caplog.text
    with pytest.raises(AnnotationError, match="2 of 3 classes.*'emu': {'it has no mask': 1}"):
        data.for_training(masks=True, skip_without_mask=True)
    for record in data.records:
        for annotation in record.annotations:
            annotation["category_id"] = 0
    assert len(data.for_training(skip_without_mask=True)) == 2  # boxes need no masks
    kept = data.for_training(masks=True, skip_without_mask=True)
    assert [[entry["id"] for entry in record.annotations] for record in kept.records] == [[2]]
    data.for_evaluation(masks=True)
    assert "2 of 3 objects to find have no mask" in caplog.text
    truth = data.ground_truth(masks=True)["annotations"]
    assert [(entry["iscrowd"], entry["segmentation"]) for entry in truth] == [
        (0, [polygon]), (1, [[0, 0, 9, 0, 9, 9, 0, 9]]), (1, [[1, 2, 31, 2, 31, 42, 1, 42]])
    ]  # fmt: skip
    assert [entry["iscrowd"] for entry in data.ground_truth()["annotations"]] == [0, 0, 0]
    data.records[0].annotations[0].pop("segmentation")
    for check in (data.for_training, data.for_evaluation):
        with pytest.raises(AnnotationError, match=r"No annotation of any class has a mask \(3 have none\)"):
            check(masks=True)
        check()
    data.records[0].annotations[0]["segmentation"] = {"size": [9, 9], "counts": [81]}
    for check in (data.for_training, data.for_evaluation):
        with pytest.raises(AnnotationError, match=r"Annotation 2 of image 7 has a mask of \(height, width\) \[9, 9\]"):
            check(masks=True)


def test_more_objects_than_can_be_found_are_told(coco_json, caplog):
    data = read_coco(*coco_json())
    data.warn_of_limit(2, "the training set")
    assert not caplog.text
    data.warn_of_limit(1, "the training set")
    assert "1 images of the training set have more than 1 objects, a.png has 2" in caplog.text
    assert data.summary() == "2 images, 3 objects of 3 classes (1 to 1 of a class), at most 2 in an image (a.png)"


def test_classes_are_put_in_the_order_of_others(coco_json):
    """Annotations, names and ids go together."""
    data = read_coco(*coco_json()).reorder(["cat", "dog", "emu"], ("The model", "the data"))
    assert data.label_names == ["cat", "dog", "emu"] and data.category_ids == [90, 4, 11]
    assert [entry["category_id"] for record in data.records for entry in record.annotations] == [1, 2, 0]
    assert [annotation["category_id"] for annotation in data.ground_truth()["annotations"]] == [4, 11, 90]
    with pytest.raises(ClassNameError, match=r"The model has the classes \['cat'\], the data \['cat', 'dog', 'emu'\]"):
        data.reorder(["cat"], ("The model", "the data"))


def test_classes_that_data_lack_have_ids_of_their_own(coco_json):
    """COCO's numbers leave them out, and so does a card."""
    names, owners = ["yak", "cat", "dog", "owl", "emu"], ("The training set", "the validation set")
    data = read_coco(*coco_json())
    with pytest.raises(ClassNameError, match=r"only the first has \['yak', 'owl'\], only the second \[\]. Allow it."):
        data.reorder(names, owners, advice="Allow it.")
    larger = data.reorder(names, owners, subset=True)
    assert larger.label_names == names and larger.category_ids == [91, 90, 4, 92, 11]
    truth, expected = larger.ground_truth(), data.ground_truth()
    assert [entry["category_id"] for entry in truth["annotations"]] == [
        entry["category_id"] for entry in expected["annotations"]
    ]
    results = {7: [], 3: [{"image_id": 3, "category_id": 90, "bbox": [1, 2, 30, 40], "score": 0.9}]}
    assert coco_metrics(results, truth) == coco_metrics(results, expected)
    assert data.reorder([*data.label_names, "owl"], owners, subset=True).category_ids == [4, 11, 90, 91]


def test_part_of_the_training_set_is_the_validation_set(scenes):
    """By the seed, no image in both; what was left out is listed once."""
    data = dataclasses.replace(read_coco(scenes / "annotations.json", scenes / "images"), left_out=["gone"])
    train, validation = data.split(0.25, seed=1)
    names = [{record.image_id for record in part.records} for part in (train, validation, data)]
    assert len(validation) == 6 and not names[0] & names[1] and names[0] | names[1] == names[2]
    assert data.split(0.25, seed=1) == (train, validation) and data.split(0.25, seed=2)[1] != validation
    assert (train.left_out, validation.left_out) == (["gone"], [])
    with pytest.raises(ValueError, match="A share of 0.99 of 24 images leaves none of them"):
        data.split(0.99, seed=1)


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


def build_objects(tmp_path, category, categories, **fields):
    """A data set of 100 x 80 images, one for each list of categories; `None` is an image whose `objects` is null."""
    Image.new("RGB", (100, 80)).save(tmp_path / "image.png")
    rows = []
    for labels in categories:
        objects = labels if labels is None else {"bbox": [[10, 10, 30, 20]] * len(labels), "category": labels} | fields
        rows.append({"image": str(tmp_path / "image.png"), "objects": objects})
    lists = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(category)}
    lists |= dict.fromkeys(fields, datasets.List(datasets.Value("string")))
    return datasets.Dataset.from_list(rows, datasets.Features({"image": datasets.Image(), "objects": lists}))


def test_categories_are_names_or_integers(tmp_path):
    """A validation set that lacks some has the classes of the training set."""

    def labels(data):
        return [[entry["category_id"] for entry in record.annotations] for record in data.records]

    names = build_objects(tmp_path, datasets.Value("string"), [["dog", "cat"], None, [], ["emu"]])
    data = read_detection_dataset(names)
    assert data.label_names == ["cat", "dog", "emu"] and labels(data) == [[1, 0], [], [], [2]]
    some = build_objects(tmp_path, datasets.Value("string"), [["emu"]])
    assert labels(read_detection_dataset(some, data.label_names)) == [[2]]
    assert labels(read_detection_dataset(some, ["emu", "cat", "dog"])) == [[0]]
    with pytest.raises(AnnotationError, match="row 0: an object of image 0 has `category` 'emu', the classes are 0"):
        read_detection_dataset(some, ["cat", "dog"])
    integers = build_objects(tmp_path, datasets.Value("int32"), [[0], [1]])
    assert read_detection_dataset(integers, ["a", "b", "c"]).label_names == ["a", "b", "c"]
    nothing = build_objects(tmp_path, datasets.Value("string"), [[None]])
    with pytest.raises(AnnotationError, match="has `category` None"):
        read_detection_dataset(nothing)
    with pytest.raises(AnnotationError, match="`category` must hold class labels, integers or names, got float32"):
        read_detection_dataset(build_objects(tmp_path, datasets.Value("float32"), [[1.0]]))
    crowds = build_objects(tmp_path, datasets.Value("int32"), [[0]], iscrowd=["0"])
    with pytest.raises(AnnotationError, match="row 0: Annotation number 0 of image 0 has `iscrowd` '0', it must be 0"):
        read_detection_dataset(crowds)


def test_boxes_and_columns_of_the_hub_may_be_called_otherwise(tmp_path):
    rows = build_objects(tmp_path, datasets.Value("int32"), [[0]]).rename_column("objects", "things")
    with pytest.raises(AnnotationError, match=r"columns `image` and `objects`, got \['image', 'things'\]. `--image"):
        read_detection_dataset(rows)
    data = read_detection_dataset(rows, objects_column="things", bbox_format="voc")
    assert data.records[0].annotations[0]["bbox"] == [10, 10, 20, 10] and data.records[0].size == (80, 100)


def test_rows_that_cannot_be_opened_are_told_at_once(tmp_path):
    rows = build_objects(tmp_path, datasets.Value("int32"), [[0], [1]])
    cells = rows.cast_column("image", datasets.Image(decode=False)).to_list()
    cells[1]["image"] = {"bytes": b"no image", "path": None}
    rows = datasets.Dataset.from_list(cells, features=rows.features)
    with pytest.raises(ImageError, match=r"(?s)1 of 2 images.*row 1: row 1 cannot be read.*`--skip_corrupt`"):
        read_detection_dataset(rows)
    data = read_detection_dataset(rows, skip_corrupt=True)
    assert [record.name for record in data.records] == ["row 0"] and "row 1" in data.left_out[0]
    assert data.check_images("the training set").image(0).shape == (3, 80, 100)


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
