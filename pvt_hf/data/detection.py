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

from ..models.annotations import AnnotationError, iter_annotations, read_objects
from .images import ImageError, decode, decode_to_fit, drop_skipped

if TYPE_CHECKING:
    import datasets

    from ..models.annotations import Objects
    from ..models.image_processing_detection import PvtDetectionImageProcessor

    Augment: TypeAlias = Callable[[torch.Tensor, Objects, np.random.Generator], tuple[torch.Tensor, Objects]]

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ImageRecord:
    """An image without its pixels.

    Args:
        image_id: As in the annotations; results name it.
        name: For messages: the file, or the place in the data set.
        size: (height, width) in pixels.
        annotations: In COCO's format (`bbox` is absolute xywh), with `category_id` already a class label in 0..n-1.
        stored: Where the pixels are: a path, or the number of a row of a data set.
    """

    image_id: int
    name: str
    size: tuple[int, int]
    annotations: list[dict[str, Any]]
    stored: str | int


@dataclass(frozen=True)
class DetectionData:
    """Images with boxes, masks and classes.

    Args:
        label_names: The name of each class label.
        category_ids: The id of each class label in the annotations, ascending.
        records: Of the images.
        rows: The data set of the Hub that has the pixels (default: `None`, they are in files).
    """

    label_names: list[str]
    category_ids: list[int]
    records: list[ImageRecord]
    rows: datasets.Dataset | None = None

    def __len__(self) -> int:
        return len(self.records)

    def image(self, index: int) -> torch.Tensor:
        """Reads an image, turned as its EXIF orientation says unless the record has the size of the stored pixels.

        Args:
            index: Of its record.

        Returns:
            uint8 `(3, height, width)`, RGB.

        Raises:
            ImageError: If the image cannot be read or has another size than its record; it names file and id.
        """
        record = self.records[index]
        name = f"{record.name} (image {record.image_id})"
        stored = self.rows[record.stored]["image"] if self.rows is not None else {"path": record.stored}
        image = decode_to_fit(stored, name, record.size)
        if image.shape[1:] != record.size:
            raise ImageError(
                f"{name} has (height, width) {tuple(image.shape[1:])}, turned as its EXIF says if it has one, but "
                f"{record.size} according to its annotations."
            )
        return image

    def target(self, index: int) -> dict[str, Any]:
        """What the image processor takes as annotations of an image.

        Args:
            index: Of its record.
        """
        return {"image_id": self.records[index].image_id, "annotations": self.records[index].annotations}

    def for_training(self, min_side: int = 32, empty: bool = False) -> DetectionData:
        """The images on which mmdetection trains: those with annotations and with sides of at least 32 pixels. How many
        others there are is logged, and how many annotations will not be used.

        Args:
            min_side: Least height and width in pixels (default: 32).
            empty: Whether images without annotations are kept (default: `False`).

        Raises:
            AnnotationError: If no image is left, or an annotation cannot be used; it names image and annotation.
        """
        large = [record for record in self.records if min(record.size) >= min_side]
        kept = [record for record in large if record.annotations or empty]
        if len(kept) < len(self):
            logger.warning(
                f"Training skips {len(self) - len(kept)} of {len(self)} images: {len(self) - len(large)} have a "
                f"side of less than {min_side} pixels, {len(large) - len(kept)} others have no annotations."
            )
        if not kept:
            raise AnnotationError(f"No image of {len(self)} is left to train on.")
        reasons = Counter(
            reason
            for record in kept
            for *_, reason in iter_annotations(record.annotations, record.image_id, record.size, len(self.label_names))
        )
        if skipped := {reason: count for reason, count in reasons.items() if reason}:
            logger.warning(f"Training skips {sum(skipped.values())} of {reasons.total()} annotations: {skipped}.")
        return replace(self, records=kept)

    def ground_truth(self) -> dict[str, list[dict[str, Any]]]:
        """The annotations as one COCO json, with their category ids again, for the evaluation."""
        annotations = [
            {"area": float(np.prod(annotation["bbox"][2:])), "iscrowd": 0}
            | {name: value for name, value in annotation.items() if value is not None}
            | {"image_id": record.image_id, "category_id": self.category_ids[annotation["category_id"]]}
            for record in self.records
            for annotation in record.annotations
        ]
        return {
            "images": [
                {"id": record.image_id, "file_name": record.name, "height": record.size[0], "width": record.size[1]}
                for record in self.records
            ],
            # Numbered from 1: COCO's own code takes an annotation with the id 0 for none.
            "annotations": [annotation | {"id": number} for number, annotation in enumerate(annotations, start=1)],
            "categories": [
                {"id": category_id, "name": name}
                for category_id, name in zip(self.category_ids, self.label_names, strict=True)
            ],
        }


# Lists of COCO json, and the fields that each of their entries must have.
_COCO_FIELDS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


def read_coco(annotation_file: str | Path, image_folder: str | Path, allow_outside: bool = False) -> DetectionData:
    """Reads and checks a COCO json. Class labels are the positions of the categories in the order of their ids.

    Args:
        annotation_file: The json, with `images`, `annotations` and `categories`.
        image_folder: With the files that it names.
        allow_outside: Whether a `file_name` may be absolute or lead out of `image_folder` (default: `False`, since
            images of it appear in pictures that may be published).

    Raises:
        AnnotationError: If the file is not COCO json, an annotation is of an image or a category that it does not list,
            or a `file_name` leads out of the folder; the message names the file and the ids.
    """
    content = _load_coco(annotation_file)
    for image in content["images"]:
        name = PurePath(str(image["file_name"]))
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
    return DetectionData([category["name"] for category in categories], sorted(labels), records)


def _load_coco(annotation_file: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The content of a COCO json in which each entry has the fields that are needed, and ids are different integers."""
    try:
        content = json.loads(Path(annotation_file).read_text())
    except (OSError, ValueError) as error:
        raise AnnotationError(f"{annotation_file} cannot be read: {error}") from error
    lists = content if isinstance(content, dict) else {}
    if missing := [part for part in _COCO_FIELDS if not isinstance(lists.get(part), list)]:
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise AnnotationError(f"{annotation_file} is not COCO json: it has no list {missing}, but {found}.")
    for part, fields in _COCO_FIELDS.items():
        for number, entry in enumerate(content[part]):
            if lacking := [field for field in fields if field not in entry]:
                raise AnnotationError(f"{annotation_file}: number {number} of `{part}` has no {lacking}: {entry}.")
        if "id" in fields:
            counts = Counter(entry["id"] for entry in content[part])
            if wrong := [entry for entry, count in counts.items() if count > 1 or not isinstance(entry, int)]:
                raise AnnotationError(
                    f"{annotation_file} has `{part}` whose ids are not different integers: {wrong[:5]}."
                )
    return content


def read_detection_dataset(data: datasets.Dataset) -> DetectionData:
    """Reads a data set with the columns `image` and `objects`, as those of the Hub for object detection (`cppe-5`).

    `objects` has for each image lists `bbox` (absolute xywh) and `category` (or `category_id`, `label`), and optionally
    `id`, `area`, `iscrowd`, `segmentation`. Columns `image_id`, `height` and `width` are used where they exist.

    Args:
        data: One split.

    Raises:
        AnnotationError: If there are no such columns, if the lists of an image differ in length, or if a category is
            not a class; the message names the image.
    """
    import datasets

    if not {"image", "objects"} <= data.features.keys():
        raise AnnotationError(f"The data set must have columns `image` and `objects`, got {list(data.features)}.")
    features = _unwrap_list(data.features["objects"])
    column = next((name for name in ("category", "category_id", "label") if name in features), None)
    if column is None or "bbox" not in features:
        raise AnnotationError(f"`objects` must have `bbox` and `category`, got {list(features)}.")
    rows = data.cast_column("image", datasets.Image(decode=False))
    used = [name for name in ("objects", "image_id", "height", "width") if name in data.features]
    records = []
    for index, row in enumerate(rows.select_columns(used)):
        image_id = row["image_id"] if isinstance(row.get("image_id"), int) else index
        size = (row.get("height"), row.get("width"))
        size = size if None not in size else _read_size(rows, index)
        annotations = _list_annotations(row["objects"], features, column, image_id)
        records.append(ImageRecord(image_id, f"row {index}", size, annotations, stored=index))
    if len({record.image_id for record in records}) < len(records):
        logger.warning("The column `image_id` has numbers twice: images are numbered in their order instead.")
        records = [replace(record, image_id=index) for index, record in enumerate(records)]
    names = _name_classes(_unwrap_list(features[column]), records)
    for record in records:
        for annotation in record.annotations:
            if not 0 <= annotation["category_id"] < len(names):
                raise AnnotationError(
                    f"An object of image {record.image_id} has `{column}` {annotation['category_id']}, the classes are "
                    f"0 to {len(names) - 1}."
                )
    return DetectionData(names, list(range(len(names))), records, rows)


def _unwrap_list(feature: Any) -> Any:
    """What a list of `datasets` holds, however it is written; anything else as it is."""
    return getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)


def _list_annotations(objects: Any, features: Mapping[str, Any], column: str, image_id: int) -> list[dict[str, Any]]:
    """The objects of an image, a list of dictionaries or a dictionary of lists, as annotations in COCO's format."""
    if not isinstance(objects, Mapping):
        objects = {name: [entry[name] for entry in objects] for name in features}
    objects = {name: values for name, values in objects.items() if values is not None}
    lengths = {name: len(values) for name, values in objects.items()}
    if len(set(lengths.values())) > 1:
        raise AnnotationError(f"`objects` of image {image_id} has lists of different lengths: {lengths}.")
    annotations = [dict(zip(objects, values, strict=True)) for values in zip(*objects.values(), strict=True)]
    return [annotation | {"category_id": annotation[column]} for annotation in annotations]


def _name_classes(feature: Any, records: Sequence[ImageRecord]) -> list[str]:
    """The names that the data set has for its classes, or else their numbers."""
    if hasattr(feature, "names"):
        return list(feature.names)
    labels = [annotation["category_id"] for record in records for annotation in record.annotations]
    return [str(label) for label in range(max(labels, default=-1) + 1)]


def _read_size(rows: datasets.Dataset, index: int) -> tuple[int, int]:
    image = decode(rows[index]["image"], f"row {index}")
    return image.height, image.width


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
    """

    def __init__(self, data: DetectionData, augment: Augment, masks: bool = False, skip_corrupt: bool = False):
        self.data, self.augment, self.masks, self.skip_corrupt = data, augment, masks, skip_corrupt

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
        image, objects = self.augment(image, objects, np.random.default_rng(seed))
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
