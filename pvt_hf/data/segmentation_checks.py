"""What is looked at before a segmenter is trained or measured: every label map, and the size of every image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.utils import logging

from ..models.image_processing_segmentation import IGNORE_INDEX
from ..writing.text import escape_control
from .checks import Checked, check_all, check_images, describe_problems
from .images import ImageError
from .segmentation import SegmentationData

logger = logging.get_logger(__name__)

# A map with more different values is a photograph.
_MAX_VALUES = 4096
_MAX_COUNTED = 1 << 16


@dataclass(frozen=True)
class LabelSurvey:
    """What the label maps of a split hold.

    Args:
        pixels: Of each class, over all maps.
        maps: How many of them have each class.
        ignored: Pixels without a class.
        sizes: (height, width) of each map in pixels.
        left_out: What was wrong with the images that were left out.
    """

    pixels: list[int]
    maps: list[int]
    ignored: int
    sizes: list[tuple[int, int]]
    left_out: list[str] = field(default_factory=list)

    def describe(self, names: Sequence[str]) -> str:
        """Pixels and maps of each class, in words.

        Args:
            names: Of the classes.
        """
        classes = (
            f"{escape_control(name)} {pixels:,} pixels in {maps:,} maps"
            for name, pixels, maps in zip(names, self.pixels, self.maps, strict=True)
        )
        return f"{'; '.join(classes)}; {self.ignored:,} pixels are ignored"

    def missing(self, names: Sequence[str]) -> list[str]:
        """The classes that no pixel has.

        Args:
            names: Of the classes.
        """
        return [name for name, pixels in zip(names, self.pixels, strict=True) if not pixels]


@dataclass(frozen=True)
class _MapCheck:
    """Facts about a label map, a file or the one of a row, that hold whatever the classes are: `size`, (height, width)
    in pixels, and `values`, pairs of a value and its pixels."""

    data: SegmentationData

    def __call__(self, item: str | int) -> dict[str, Any]:
        if isinstance(item, int):
            data, index = self.data, item
        else:
            row = {"image": None, "label_map": {"path": item, "bytes": None}}
            data, index = replace(self.data, rows=[row]), 0
        values = data.read_values(index)
        found, counts = _count(values)
        if len(found) > _MAX_VALUES:
            raise ValueError(f"{data.map_name(index)} has {len(found)} different values: it is not a map of classes.")
        return {"size": list(values.shape), "values": list(zip(found.tolist(), counts.tolist(), strict=True))}


def _count(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The different values and their pixels."""
    if values.max() < _MAX_COUNTED:  # without sorting all pixels
        counts = values.flatten().bincount()
        return counts.nonzero()[:, 0], counts[counts > 0]
    return values.unique(return_counts=True)


def survey_maps(
    data: SegmentationData, subject: str, workers: int = 0, skip_corrupt: bool = False
) -> tuple[SegmentationData, LabelSurvey]:
    """Reads all label maps of a split, and the sizes of its images.

    Args:
        data: With `num_labels`.
        subject: What messages call the split.
        workers: Processes that read (default: 0, this one).
        skip_corrupt: Whether images and maps that cannot be read are left out, and listed, instead of being an error
            (default: `False`). All images are decoded for it, so that none fails later.

    Returns:
        The split (without those), and what its maps hold.

    Raises:
        ImageError: If images or maps cannot be used; it counts them and lists the first ones.
        ValueError: If all maps have only the values 0 and 255, and 255 would be ignored.
    """
    images, maps = _check_rows(data, workers, decoded=skip_corrupt)
    problems = [image.problem or label_map.problem for image, label_map in zip(images, maps, strict=True)]
    left_out = list(filter(None, problems)) if skip_corrupt else []
    if left_out:
        kept = [index for index, problem in enumerate(problems) if problem is None]
        logger.warning(f"{describe_problems(left_out, len(data), f'images of {subject}')}\nThey are left out.")
        data, problems = data.select(kept), [None] * len(kept)
        images, maps = ([values[index] for index in kept] for values in (images, maps))
    if not problems:
        raise ImageError(f"There are no images in {subject}.")
    counts = [
        None if problem else _count_classes(data, index, images[index].value, maps[index].value)
        for index, problem in enumerate(problems)
    ]
    found = [count if isinstance(count, str) else problem for count, problem in zip(counts, problems, strict=True)]
    if any(found):
        raise ImageError(describe_problems(list(filter(None, found)), len(data), f"images of {subject}"))
    _check_binary(data, maps, subject)
    survey = _add_up(data, torch.stack(counts), [tuple(label_map.value["size"]) for label_map in maps])
    return data, replace(survey, left_out=left_out)


def _check_rows(data: SegmentationData, workers: int, decoded: bool) -> tuple[list[Checked], list[Checked]]:
    """The facts about all images, `decoded` or not, and all maps; of files they are kept."""
    kind = "binary masks" if data.binary_masks else "label maps" if data.palette is None else "maps of colours"
    check, description = _MapCheck(data), f"values of {kind}"
    if hasattr(data.rows, "select"):  # a data set of the Hub
        return check_images(data.rows, decoded, workers), check_all(check, range(len(data)), description, workers)
    paths = [row["image"]["path"] for row in data.rows]
    return check_images(paths, decoded, workers), check_all(
        check, [row["label_map"]["path"] for row in data.rows], description, workers
    )


def _count_classes(
    data: SegmentationData, index: int, image: Mapping[str, Any], label_map: Mapping[str, Any]
) -> torch.Tensor | str:
    """Pixels by label of a map, int64 `(256 or more,)`, or what is wrong with it."""
    size = [image["height"], image["width"]]
    if label_map["size"] not in ([size, size[::-1]] if image["turned"] else [size]):
        turned = f", or {size[::-1]} turned as its EXIF says" if image["turned"] else ""
        return f"{data.map_name(index)} has (height, width) {label_map['size']}, the image {size}{turned}."
    values, counts = torch.tensor(label_map["values"]).T
    try:
        labels = data.to_labels(values, data.map_name(index))
    except ValueError as error:
        return str(error)
    length = max(IGNORE_INDEX + 1, data.num_labels or 0)
    return torch.zeros(length, dtype=torch.int64).index_add(0, labels, counts)


def _check_binary(data: SegmentationData, maps: Sequence[Checked], subject: str) -> None:
    """Raises an error if masks of 0 and 255 are taken for labels."""
    values = {value for label_map in maps for value, _ in label_map.value["values"]}
    if values == {0, IGNORE_INDEX} and not data.binary_masks and data.palette is None:
        raise ValueError(
            f"The label maps of {subject} have the values 0 and {IGNORE_INDEX} only, and {IGNORE_INDEX} is ignored. If "
            f"{IGNORE_INDEX} stands for the second of two classes, set `binary_masks` (`--binary_masks`)."
        )


def _add_up(data: SegmentationData, counts: torch.Tensor, sizes: list[tuple[int, int]]) -> LabelSurvey:
    """Of the counts `(maps, 256 or more)`."""
    pixels, maps, num_labels = counts.sum(dim=0).tolist(), (counts > 0).sum(dim=0).tolist(), data.num_labels
    return LabelSurvey(pixels[:num_labels], maps[:num_labels], pixels[IGNORE_INDEX], sizes)


def check_classes(
    train: LabelSurvey | None, validation: LabelSurvey, names: Sequence[str], allow_missing: bool = False
) -> None:
    """Says what is wrong with the classes of the splits: those that no validation map has are a warning.

    Args:
        train: Of the training set, where there is one.
        validation: Of the validation set.
        names: Of the classes.
        allow_missing: Whether a class that is in no map of the training set is a warning (default: `False`, an error).

    Raises:
        ValueError: If a class is in no map of the training set, or the validation set has no pixel of any class; it
            lists the counts.
    """
    if train is not None and (missing := train.missing(names)):
        what = f"No label map of the training set has the classes {missing}: {train.describe(names)}."
        if not allow_missing or len(missing) == len(names):
            raise ValueError(
                f"{what} Leave classes that do not occur out of `class_names` (`--class_names`), set `allow_missing` "
                "(`--allow_missing_classes`) to train without them, or look at how the maps are read: masks of 0 and 1 "
                "are labels as they are, without `binary_masks` (`--binary_masks`)."
            )
        logger.warning(what)
    missing = validation.missing(names)
    if len(missing) == len(names):
        raise ValueError(f"The validation set has no pixel of any class: {validation.describe(names)}.")
    if missing:
        logger.warning(f"No label map of the validation set has the classes {missing}: their IoU says nothing.")
