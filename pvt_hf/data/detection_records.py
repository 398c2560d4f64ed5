"""Images with objects (boxes, masks, classes) as they are read: records, what is checked of them, and their truth."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import torch
from transformers.utils import logging

from ..models.annotations import AnnotationError, has_mask, iter_annotations, rasterize, usable_polygons
from ..writing.text import escape_control
from .box_formats import check_bbox_format, to_xywh
from .checks import check_images, refuse_problems
from .class_names import match_class_names
from .images import ImageError, decode_to_fit
from .samplers import split_by_chance

if TYPE_CHECKING:
    import datasets

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


class _Use(NamedTuple):
    """An annotation's class, why it is not trained on, or `None`, and whether it has no mask where one is wanted."""

    label: int
    reason: str | None
    is_maskless: bool


@dataclass(frozen=True)
class DetectionData:
    """Images with boxes, masks and classes.

    Args:
        label_names: The name of each class label.
        category_ids: The id of each class label in the annotations.
        records: Of the images.
        rows: The data set of the Hub that has the pixels (default: `None`, they are in files).
        left_out: The problems of images that were left out (default: of none).
        source: The file or data set with the annotations, for messages (default: not known).
    """

    label_names: list[str]
    category_ids: list[int]
    records: list[ImageRecord]
    rows: datasets.Dataset | None = None
    left_out: list[str] = field(default_factory=list)
    source: str = ""

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
                f"{name} has (height, width) {tuple(image.shape[1:])}, but {record.size} according to its annotations "
                "(neither turned as its EXIF says nor as it is stored do they fit)."
            )
        return image

    def target(self, index: int) -> dict[str, Any]:
        """What the image processor takes as annotations of an image.

        Args:
            index: Of its record.
        """
        return {"image_id": self.records[index].image_id, "annotations": self.records[index].annotations}

    def split(self, share: float, seed: int) -> tuple[DetectionData, DetectionData]:
        """The images in two parts by chance, each in their order. What was left out is said of the first.

        Args:
            share: Of the second part, at least one image, in (0, 1).
            seed: Decides which.

        Raises:
            ValueError: If nothing would be left for the first part.
        """
        parts = split_by_chance(len(self), share, seed)
        first, second = ([self.records[index] for index in part] for part in parts)
        return replace(self, records=first), replace(self, records=second, left_out=[])

    def reorder(
        self, label_names: Sequence[str], owners: tuple[str, str], subset: bool = False, advice: str = ""
    ) -> DetectionData:
        """The same objects with the class labels of others that have the same classes.

        Args:
            label_names: The classes in their order, of a model or of the training set.
            owners: Who has them and who has these, for the message, as `("The model", "the data")`.
            subset: Whether these may lack classes (default: `False`).
            advice: Of the message, where these only lack classes (default: none).

        Raises:
            ClassNameError: If the classes are not the same, with both lists.
        """
        places = match_class_names(label_names, self.label_names, owners, subset, advice)
        if places == list(range(len(label_names))):
            return replace(self, label_names=list(label_names))
        if places != sorted(places):
            logger.warning(f"{' and '.join(owners)} have their classes in other orders: they are mapped by name.")
        records = [
            replace(
                record,
                annotations=[entry | {"category_id": places[entry["category_id"]]} for entry in record.annotations],
            )
            for record in self.records
        ]
        known, others = dict(zip(places, self.category_ids, strict=True)), itertools.count(max(self.category_ids) + 1)
        category_ids = [known[label] if label in known else next(others) for label in range(len(label_names))]
        return replace(self, label_names=list(label_names), category_ids=category_ids, records=records)

    def check_images(self, name: str, skip_corrupt: bool = False, workers: int = 0) -> DetectionData:
        """Checks that every image can be opened and has the size of its record.

        Args:
            name: Of the images, for messages: "the training set".
            skip_corrupt: Whether those that fail are left out instead of being an error (default: `False`). All
                are decoded for it, so that none fails later.
            workers: Processes that check (default: 0, this one).

        Raises:
            ImageError: If images fail, with their number and the first of them, or if all do.
        """
        stored: Any = [record.stored for record in self.records]
        images = stored if self.rows is None else self.rows.select(stored)
        checked = check_images(images, decoded=skip_corrupt, workers=workers)
        problems = [_find_problem(*pair) for pair in zip(self.records, checked, strict=True)]
        found = [problem for problem in problems if problem]
        refuse_problems(found, len(self), f"images of {name}", skip_corrupt)
        if not found:
            return self
        records = [record for record, problem in zip(self.records, problems, strict=True) if not problem]
        return replace(self, records=records, left_out=[*self.left_out, *found])

    def for_training(
        self,
        min_side: int = 32,
        empty: bool = False,
        masks: bool = False,
        skip_without_mask: bool = False,
        allow_missing: bool = False,
    ) -> DetectionData:
        """The images on which mmdetection trains: those with annotations and with sides of at least 32 pixels. How many
        others there are is logged, and how many annotations will not be used.

        Args:
            min_side: Least height and width in pixels (default: 32).
            empty: Whether images without annotations are kept (default: `False`).
            masks: Whether masks are trained too (default: `False`). They are read, and their errors found.
            skip_without_mask: Whether, with `masks`, annotations without one are left out; else they train their box
                only (default: `False`).
            allow_missing: Whether it is a warning if all annotations of a class are left out (default: `False`, an
                error).

        Raises:
            AnnotationError: If no image is left, if all annotations of a class or of all classes are left out (with
                their counts by reason), or if an annotation cannot be used; it names image and annotation.
        """
        uses = self._find_uses(min_side, masks)
        large = [record for record in self.records if min(record.size) >= min_side]
        if masks and skip_without_mask:
            uses = [use._replace(reason=use.reason or ("it has no mask" if use.is_maskless else None)) for use in uses]
            large = [replace(record, annotations=[*filter(_has_mask, record.annotations)]) for record in large]
        kept = [record for record in large if record.annotations or empty]
        if len(kept) < len(self):
            logger.warning(
                f"Training skips {len(self) - len(kept)} of {len(self)} images: {len(self) - len(large)} have a "
                f"side of less than {min_side} pixels, {len(large) - len(kept)} others have no annotations"
                + (" (`--keep_empty` trains on them too)." if len(kept) < len(large) else ".")
            )
        self._check_that_classes_are_left(uses, allow_missing)
        if not kept:
            self._refuse(f"No image of {len(self)} is left to train on.")
        if skipped := Counter(use.reason for use in uses if use.reason):
            logger.warning(f"Training skips {sum(skipped.values())} of {len(uses)} annotations: {dict(skipped)}.")
        bare, used = sum(use.is_maskless and not use.reason for use in uses), sum(not use.reason for use in uses)
        self._check_that_masks_are_left(bare, used)
        if bare:
            logger.warning(
                f"{bare} of {used} annotations have no mask: they train their box only (`--skip_without_mask` leaves "
                "them out)."
            )
        return replace(self, records=kept)

    def _find_uses(self, min_side: int = 0, masks: bool = False) -> list[_Use]:
        uses = []
        for record in self.records:
            is_small = min(record.size) < min_side
            for name, entry, reason in self.iter_annotations(record):
                reason = f"its image has a side of less than {min_side} pixels" if is_small else reason
                is_maskless = masks and not reason and not _check_mask(entry, record.size, name)
                uses.append(_Use(int(entry["category_id"]), reason, is_maskless))
        return uses

    def iter_annotations(self, record: ImageRecord) -> Iterator[tuple[str, dict[str, Any], str | None]]:
        """See [`~pvt_hf.models.annotations.iter_annotations`]; names and errors begin with the source and the image."""
        place = ", ".join(filter(None, (self.source, record.name)))
        found = iter_annotations(record.annotations, record.image_id, record.size, len(self.label_names))
        try:
            for name, entry, reason in found:
                yield f"{place}: {name}", entry, reason
        except AnnotationError as error:
            raise AnnotationError(f"{place}: {error}") from error

    def _refuse(self, problem: str) -> NoReturn:
        raise AnnotationError(f"{self.source}: {problem}" if self.source else problem)

    def _check_that_classes_are_left(self, uses: Sequence[_Use], allow_missing: bool) -> None:
        by_class: dict[int, Counter[str | None]] = {}
        for use in uses:
            by_class.setdefault(use.label, Counter())[use.reason] += 1
        lost = {self.label_names[label]: dict(counts) for label, counts in sorted(by_class.items()) if not counts[None]}
        if not lost:
            return
        if len(lost) == len(by_class):
            self._refuse(f"No annotation of any class can be trained on. Left out, by class and reason: {lost}.")
        what = f"No annotation of {len(lost)} of {len(by_class)} classes can be trained on."
        what = f"{what} Left out, by class and reason: {lost}."
        if not allow_missing:
            self._refuse(f"{what} To train without them, set `allow_missing` (`--allow_missing_classes`).")
        logger.warning(what)

    def _check_that_masks_are_left(self, bare: int, count: int) -> None:
        """`bare` of so many annotations have no mask."""
        if bare and bare == count:
            self._refuse(
                f"No annotation of any class has a mask ({bare} have none): choose a detector without masks, such as "
                "RetinaNet, or Mask R-CNN with `use_masks=False`."
            )

    def for_evaluation(self, masks: bool = False) -> DetectionData:
        """These images, after a check that there is something to measure.

        Args:
            masks: Whether masks are measured too (default: `False`). They are read, and their errors found.

        Raises:
            AnnotationError: If there is no object but crowds, or an annotation cannot be used; it names image and
                annotation.
        """
        reasons: Counter[str | None] = Counter()
        crowds = bare = 0
        for record in self.records:
            for name, entry, reason in self.iter_annotations(record):
                is_maskless = masks and not _check_mask(entry, record.size, name)
                crowds += bool(entry.get("iscrowd"))
                if not entry.get("iscrowd"):
                    bare += is_maskless
                    reasons[reason] += 1
        if not reasons:
            self._refuse(
                f"There is nothing to measure: {len(self)} images have {crowds} annotations, all of them crowds."
            )
        if odd := {reason: count for reason, count in reasons.items() if reason}:
            logger.warning(
                f"Of {reasons.total()} objects to find, training would skip {sum(odd.values())}: {odd}. COCO's numbers "
                "count them."
            )
        self._check_that_masks_are_left(bare, reasons.total())
        if bare:
            logger.warning(
                f"{bare} of {reasons.total()} objects to find have no mask: for the AP of masks their boxes count as "
                "crowds, where nothing has to be found."
            )
        return self

    def summary(self) -> str:
        """How many images, objects and classes there are, in a line."""
        objects = Counter(int(entry["category_id"]) for record in self.records for entry in record.annotations)
        counts = [objects[label] for label in range(len(self.label_names))]
        fullest = max(self.records, key=lambda record: len(record.annotations))
        missing = [name for name, count in zip(self.label_names, counts, strict=True) if not count]
        return (
            f"{len(self)} images, {sum(counts)} objects of {len(counts)} classes ({min(counts, default=0)} to "
            f"{max(counts, default=0)} of a class), at most {len(fullest.annotations)} in an image "
            f"({escape_control(fullest.name)})" + (f"; none of {missing}" if missing else "")
        )

    def warn_of_limit(self, limit: int, name: str, option: str = "`max_detections` (`--max_detections`)") -> None:
        """Logs a warning if an image has more objects than can be found.

        Args:
            limit: Of detections in an image.
            name: Of the images, for the message.
            option: What raises it.
        """
        above = [record for record in self.records if len(record.annotations) > limit]
        if above:
            fullest = max(above, key=lambda record: len(record.annotations))
            logger.warning(
                f"{len(above)} images of {name} have more than {limit} objects, {escape_control(fullest.name)} has "
                f"{len(fullest.annotations)}, but at most {limit} are found in an image and measured: raise {option}."
            )

    def ground_truth(self, masks: bool = False) -> dict[str, list[dict[str, Any]]]:
        """The annotations as one COCO json, with their category ids again, for the evaluation.

        Args:
            masks: Whether it is for masks (default: `False`). An annotation without one is a crowd in its box then,
                where detections do not count.
        """
        annotations = [
            {"area": float(np.prod(annotation["bbox"][2:])), "iscrowd": 0}
            | {name: value for name, value in annotation.items() if value is not None}
            | (_read_mask(annotation, f"Annotation {annotation.get('id')} of image {record.image_id}") if masks else {})
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


def _find_problem(record: ImageRecord, checked: Any) -> str | None:
    """Of an image, compared with its record."""
    name = f"{record.name} (image {record.image_id})"
    if checked.problem:
        return f"{name}: {checked.problem}"
    size = checked.value["height"], checked.value["width"]
    if record.size == size or (checked.value["turned"] and record.size == size[::-1]):
        return None
    return f"{name} has (height, width) {size}, but {record.size} according to its annotations."


def _has_mask(annotation: dict[str, Any]) -> bool:
    return has_mask(annotation.get("segmentation"))


def _check_mask(annotation: dict[str, Any], size: tuple[int, int], name: str) -> bool:
    """Whether there is a mask. RLE is decoded, which nothing less finds faults in."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        rasterize(segmentation, size, name)
    return has_mask(segmentation, name)


def _read_mask(annotation: dict[str, Any], name: str) -> dict[str, Any]:
    """The segmentation as COCO's code takes it: it reads a part of two points as a box."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return {}
    if polygons := usable_polygons(segmentation, name):
        return {"segmentation": polygons}
    x, y, width, height = annotation["bbox"]
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {"segmentation": [corners], "iscrowd": 1}


def check_records(data: DetectionData, source: str, bbox_format: str = "coco") -> DetectionData:
    """Checks every annotation, and makes the boxes absolute xywh.

    Args:
        data: As it was read, with boxes in the format.
        source: The file or data set, for messages.
        bbox_format: One of [`~pvt_hf.data.box_formats.BBOX_FORMATS`].

    Raises:
        AnnotationError: If an annotation lacks a field or has one of another type, or the boxes are in another format.
    """
    data = replace(data, source=source)
    entries: list[dict[str, Any]] = []
    sizes: list[tuple[int, int]] = []
    for record in data.records:
        entries += [entry for _, entry, _ in data.iter_annotations(record)]
        sizes += [record.size] * (len(entries) - len(sizes))
    boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
    of_images = np.array(sizes, dtype=np.float64).reshape(-1, 2)
    check_bbox_format(boxes, of_images, bbox_format, source)
    if bbox_format == "coco":
        return data
    converted = iter(to_xywh(boxes, of_images, bbox_format).tolist())
    # An area beside relative boxes is hardly in pixels: that of the box is taken, as where there is none.
    no_area = {} if bbox_format == "voc" else {"area": None}
    records = [
        replace(record, annotations=[entry | {"bbox": next(converted)} | no_area for entry in record.annotations])
        for record in data.records
    ]
    return replace(data, records=records)
