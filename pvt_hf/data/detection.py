"""Images with objects (boxes, masks, classes): COCO json with a folder of images, or a data set of the Hub."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from ..models.annotations import AnnotationError, is_integer, read_objects
from ..untrusted import UntrustedFileError, read_text
from .checks import check_images, refuse_problems
from .class_names import is_name
from .detection_records import DetectionData, ImageRecord, check_records
from .images import ImageError, drop_skipped
from .user_transforms import Transform, transform_objects

if TYPE_CHECKING:
    import datasets

    from ..models.annotations import Objects
    from ..models.image_processing_detection import PvtDetectionImageProcessor

    Augment: TypeAlias = Callable[[torch.Tensor, Objects, np.random.Generator], tuple[torch.Tensor, Objects]]

logger = logging.get_logger(__name__)


# Lists of COCO json, and what the fields that each of their entries must have are.
_INTEGER = (lambda value: type(value) is int, "an integer")
_SIDE = (lambda value: type(value) is int and 0 < value < 10**6, "a positive integer, in pixels")
_FILE = (lambda value: isinstance(value, str) and value.strip() != "", "a string that is not empty")
_NAME = (is_name, "a string in UTF-8 that is not empty")
_COCO_FIELDS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "images": {"id": _INTEGER, "file_name": _FILE, "height": _SIDE, "width": _SIDE},
    "annotations": {"image_id": _INTEGER, "category_id": _INTEGER, "bbox": (lambda value: True, "")},
    "categories": {"id": _INTEGER, "name": _NAME},
}


def read_coco(
    annotation_file: str | Path,
    image_folder: str | Path,
    allow_outside: bool = False,
    bbox_format: str = "coco",
) -> DetectionData:
    """Reads and checks a COCO json. Class labels are the positions of the categories in the order of their ids.

    Args:
        annotation_file: The json, with `images`, `annotations` and `categories`.
        image_folder: With the files that it names.
        allow_outside: Whether a `file_name` may be absolute or lead out of `image_folder` (default: `False`, since
            images of it appear in pictures that may be published).
        bbox_format: What the boxes really are, one of [`~pvt_hf.data.box_formats.BBOX_FORMATS`] (default: `"coco"`,
            absolute xywh).

    Raises:
        AnnotationError: If the file is not COCO json, a field is missing or of another type, an annotation is of an
            image or a category that it does not list, or a `file_name` leads out of the folder; the message names the
            file, the ids and the field. Also if the boxes are in another format.
    """
    content = _load_coco(annotation_file)
    for image in content["images"]:
        name = PurePath(image["file_name"])
        if not allow_outside and (name.is_absolute() or ".." in name.parts):
            raise AnnotationError(
                f"{annotation_file}: image {image['id']} has `file_name` {str(name)!r}, which is outside of "
                f"{image_folder}. If you trust the file, set `allow_outside` (`--allow_outside`)."
            )
    categories = sorted(content["categories"], key=lambda category: category["id"])
    labels = {category["id"]: label for label, category in enumerate(categories)}
    by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        for known, field in ((by_image, "image_id"), (labels, "category_id")):
            if annotation[field] not in known:
                raise AnnotationError(
                    f"{annotation_file}: annotation {annotation.get('id')} of image {annotation['image_id']} has "
                    f"`{field}` {annotation[field]}, which the file does not list."
                )
        by_image[annotation["image_id"]].append(annotation | {"category_id": labels[annotation["category_id"]]})
    records = [
        ImageRecord(
            image_id=image["id"],
            name=image["file_name"],
            size=(image["height"], image["width"]),
            annotations=by_image[image["id"]],
            stored=str(Path(image_folder) / image["file_name"]),
        )
        for image in content["images"]
    ]
    data = DetectionData([category["name"] for category in categories], sorted(labels), records)
    return check_records(data, str(annotation_file), bbox_format)


def _load_coco(annotation_file: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The content of a COCO json in which each entry has the fields that are needed, and ids are different integers."""
    try:
        content = json.loads(read_text(Path(annotation_file)), object_pairs_hook=_make_object)
    except UntrustedFileError as error:
        raise AnnotationError(f"{annotation_file} {error}") from error
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{annotation_file} cannot be read: {error}") from error
    lists = content if isinstance(content, dict) else {}
    if missing := [part for part in _COCO_FIELDS if not isinstance(lists.get(part), list)]:
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise AnnotationError(f"{annotation_file} is not COCO json: it has no list {missing}, but {found}.")
    for part, fields in _COCO_FIELDS.items():
        for number, entry in enumerate(content[part]):
            _check_entry(entry, fields, f"{annotation_file}: number {number} of `{part}`")
        if "id" in fields:
            counts = Counter(entry["id"] for entry in content[part])
            if twice := [entry for entry, count in counts.items() if count > 1]:
                raise AnnotationError(f"{annotation_file} has `{part}` with the same ids: {twice[:5]}.")
    return content


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of json, in which no key may be twice: the first value would be lost."""
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"an object has keys twice: {[key for key, count in counts.items() if count > 1]}")
    return content


def _check_entry(entry: Any, fields: Mapping[str, tuple[Callable[[Any], bool], str]], name: str) -> None:
    if not isinstance(entry, dict):
        raise AnnotationError(f"{name} is no object: {entry!r:.200}.")
    if lacking := [field for field in fields if field not in entry]:
        raise AnnotationError(f"{name} has no {lacking}: {entry!r:.200}.")
    for field, (is_valid, wanted) in fields.items():
        if not is_valid(entry[field]):
            name += f" (id {entry['id']!r:.80})" if "id" in entry else ""
            raise AnnotationError(f"{name} has `{field}` {entry[field]!r:.200}, it must be {wanted}.")


# What the columns of `objects` are called.
_BOX_COLUMNS = ("bbox", "bboxes", "boxes")
_CLASS_COLUMNS = ("category", "category_id", "label", "labels", "categories", "class", "class_id")


def read_detection_dataset(
    data: datasets.Dataset,
    label_names: Sequence[str] | None = None,
    objects_column: str = "objects",
    bbox_format: str = "coco",
    skip_corrupt: bool = False,
    workers: int = 0,
) -> DetectionData:
    """Reads a data set with the columns `image` and `objects`, as those of the Hub for object detection (`cppe-5`).

    `objects` has for each image lists `bbox` and `category` (or `category_id`, `label`), and optionally `id`, `area`,
    `iscrowd`, `segmentation`; an image without it has no objects. Categories are class labels, integers or names.
    Columns `image_id`, `height` and `width` are used where they exist.

    Args:
        data: One split.
        label_names: The name of each class, where the data set does not say them (default: names in the order of the
            alphabet, and of integers the integers up to the largest). Of a validation set: those of the training set.
        objects_column: The column of the objects (default: `"objects"`).
        bbox_format: What the boxes are, one of [`~pvt_hf.data.box_formats.BBOX_FORMATS`] (default: `"coco"`, absolute
            xywh).
        skip_corrupt: Whether images that cannot be opened are left out, where their sizes are not columns (default:
            `False`, an error).
        workers: Processes that read sizes (default: 0, this one).

    Raises:
        AnnotationError: If there are no such columns, if the lists of an image differ in length, if a category is not a
            class, or as [`read_coco`]; the message names the image.
        ImageError: If an image cannot be opened.
    """
    import datasets

    if not {"image", objects_column} <= data.features.keys():
        raise AnnotationError(
            f"The data set must have columns `image` and `{objects_column}`, got {list(data.features)}. "
            "`--image_column` and `--objects_column` name others."
        )
    features = _unwrap_list(data.features[objects_column])
    names = features if isinstance(features, Mapping) else {}
    columns = [next((name for name in known if name in names), None) for known in (_BOX_COLUMNS, _CLASS_COLUMNS)]
    if None in columns:
        raise AnnotationError(f"`{objects_column}` must have `bbox` and `category`, got {list(names) or features}.")
    rows = data.cast_column("image", datasets.Image(decode=False))
    used = [name for name in (objects_column, "image_id", "height", "width") if name in data.features]
    records = []
    for index, row in enumerate(rows.select_columns(used)):
        image_id = row["image_id"] if type(row.get("image_id")) is int else index
        annotations = _list_annotations(row[objects_column], names, columns, f"image {image_id}")
        size = row.get("height"), row.get("width")
        records.append(ImageRecord(image_id, f"row {index}", size, annotations, stored=index))
    if len({record.image_id for record in records}) < len(records):
        logger.warning("The column `image_id` has numbers twice: images are numbered in their order instead.")
        records = [replace(record, image_id=index) for index, record in enumerate(records)]
    records, label_names = _label_objects(records, _unwrap_list(names[columns[1]]), label_names, columns[1])
    records, left_out = _read_sizes(records, rows, skip_corrupt, workers)
    found = DetectionData(label_names, list(range(len(label_names))), records, rows, left_out)
    source = f"The split {data.split} of the data set" if data.split else "The data set"
    return check_records(found, source, bbox_format)


def _unwrap_list(feature: Any) -> Any:
    """What a list of `datasets` holds, however it is written; anything else as it is."""
    return getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)


def _list_annotations(
    objects: Any, features: Mapping[str, Any], columns: Sequence[str | None], image: str
) -> list[dict[str, Any]]:
    """The objects of an image, a list of dictionaries or a dictionary of lists or nothing, as annotations in COCO's
    format, but for the classes."""
    if not isinstance(objects, Mapping):
        objects = {name: [(entry or {}).get(name) for entry in objects or ()] for name in features}
    objects = {name: values for name, values in objects.items() if values is not None}
    lengths = {name: len(values) for name, values in objects.items()}
    if len(set(lengths.values())) > 1:
        raise AnnotationError(f"`objects` of {image} has lists of different lengths: {lengths}.")
    annotations = [dict(zip(objects, values, strict=True)) for values in zip(*objects.values(), strict=True)]
    for annotation in annotations:
        for given, name in zip(columns, ("bbox", "category_id"), strict=True):
            annotation[name] = annotation.get(given)
    return annotations


def _label_objects(
    records: Sequence[ImageRecord], feature: Any, label_names: Sequence[str] | None, column: str | None
) -> tuple[list[ImageRecord], list[str]]:
    """Records with class labels for what the data set has, and the names of the classes."""

    kind = str(getattr(feature, "dtype", feature))
    if not hasattr(feature, "names") and not kind.strip("u").startswith(("int", "string", "large_string")):
        raise AnnotationError(f"`{column}` must hold class labels, integers or names, got {kind}.")
    given = {annotation["category_id"] for record in records for annotation in record.annotations}
    if hasattr(feature, "names"):
        label_names = feature.names
    elif label_names is None:
        is_named = any(isinstance(value, str) for value in given)
        largest = max((value for value in given if is_integer(value)), default=-1)
        label_names = sorted(map(str, given - {None})) if is_named else list(map(str, range(largest + 1)))
    labels = {key: label for label, name in enumerate(label_names) for key in (name, label)}
    for record in records:
        for annotation in record.annotations:
            value = annotation["category_id"]
            if value not in labels:
                raise AnnotationError(
                    f"{record.name}: an object of image {record.image_id} has `{column}` {value!r}, the classes are 0 "
                    f"to {len(label_names) - 1}: {list(label_names)}."
                )
            annotation["category_id"] = labels[value]
    return list(records), list(label_names)


def _read_sizes(
    records: Sequence[ImageRecord], rows: datasets.Dataset, skip_corrupt: bool, workers: int
) -> tuple[list[ImageRecord], list[str]]:
    """Records with the sizes that are not columns, and the problems of images that cannot be opened."""

    for record in records:
        if not all(side is None or (is_integer(side) and side > 0) for side in record.size):
            raise AnnotationError(
                f"{record.name} has `height` and `width` {record.size}, they must be positive integers."
            )
    unknown = [index for index, record in enumerate(records) if None in record.size]
    checked = dict(zip(unknown, check_images(rows.select(unknown), workers=workers), strict=True)) if unknown else {}
    problems = [f"{records[index].name}: {found.problem}" for index, found in checked.items() if found.problem]
    refuse_problems(problems, len(records), "images", skip_corrupt)
    kept = []
    for index, record in enumerate(records):
        found = checked.get(index)
        if found is None:
            kept.append(record)
        elif found.value:
            size = found.value["height"], found.value["width"]
            kept.append(replace(record, size=size[::-1] if found.value["turned"] else size))
    return kept, problems


class TrainingDetections(Dataset):
    """Augmented images with their objects.

    Items are asked for with `(index, *seed)`, as [`~pvt_hf.data.samplers.AspectRatioSampler`] and
    [`~pvt_hf.data.samplers.EpochSampler`] give them, and depend on nothing else.

    Args:
        data: Usually of [`~DetectionData.for_training`].
        augment: From an image (uint8 `(3, height, width)`), its objects and a generator to both, such as a
            [`~pvt_hf.data.augmentation.DetectionAugmentation`].
        masks: Whether the objects have masks (default: `False`).
        skip_corrupt: Whether a corrupt image is skipped (and counted) instead of being an error (default: `False`).
        transform: Of `torchvision.transforms.v2`, before `augment`: see
            [`~pvt_hf.data.user_transforms.transform_objects`] (default: none).
    """

    def __init__(
        self,
        data: DetectionData,
        augment: Augment,
        masks: bool = False,
        skip_corrupt: bool = False,
        transform: Transform | None = None,
    ):
        self.data, self.augment, self.masks, self.skip_corrupt = data, augment, masks, skip_corrupt
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, ...]) -> dict[str, Any] | None:
        index, *seed = key
        record = self.data.records[index]
        try:
            image = self.data.image(index)
        except ImageError as error:
            if not self.skip_corrupt:
                raise
            logger.warning(f"{error} It is skipped.")
            return None
        objects = read_objects(self.data.target(index), record.size, self.masks, len(self.data.label_names))
        generator = np.random.default_rng(seed)
        if self.transform is not None:
            image, objects = transform_objects(self.transform, image, objects, generator)
        image, objects = self.augment(image, objects, generator)
        return {
            "image": image,
            "target": {"objects": objects, "image_id": record.image_id, "orig_size": record.size},
            "names": record.name,
        }


class EvaluationDetections(Dataset):
    """All images as they are, in their order, with their annotations; a corrupt one is an error.

    Args:
        data: From [`read_coco`] or [`read_detection_dataset`].
    """

    def __init__(self, data: DetectionData):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.data.image(index), "annotations": self.data.target(index)}


@dataclass(frozen=True)
class DetectionCollator:
    """Makes batches of what the detectors take.

    Rows of [`TrainingDetections`] or [`EvaluationDetections`] become `pixel_values` `(batch, 3, height, width)`,
    `pixel_mask` `(batch, height, width)` and `labels`; for training also `names`, and `skipped`, the number of corrupt
    images that the batch lacks.

    Args:
        image_processor: Resizes images for evaluation, normalises and pads all of them.
        masks: Whether labels for evaluation have masks (default: `False`).
    """

    image_processor: PvtDetectionImageProcessor
    masks: bool = False

    def __call__(self, rows: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
        kept, skipped = drop_skipped(rows)
        images = [row["image"] for row in kept]
        if "annotations" in kept[0]:
            annotations = [row["annotations"] for row in kept]
            options = {"return_segmentation_masks": self.masks, "return_tensors": "pt"}
            return dict(self.image_processor(images, annotations=annotations, **options))
        batch = self.image_processor.batch(images, [row["target"] for row in kept])
        return dict(batch) | {"names": [row["names"] for row in kept], "skipped": skipped}
