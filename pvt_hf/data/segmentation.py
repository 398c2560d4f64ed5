"""Images with label maps for semantic segmentation: folders of files, or a data set of the Hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from ..models.image_processing_segmentation import IGNORE_INDEX, check_label_map, read_label_map, reduce_labels
from .images import ImageError, decode, decode_to_fit, drop_skipped, prepare

if TYPE_CHECKING:
    import datasets

    from ..models.image_processing_segmentation import PvtSegmentationImageProcessor

    Augment: TypeAlias = Callable[[torch.Tensor, torch.Tensor, np.random.Generator], tuple[torch.Tensor, torch.Tensor]]

logger = logging.get_logger(__name__)

_IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class SegmentationData:
    """Images with a class label for every pixel.

    Args:
        rows: With `image` and `label_map`, each `{"bytes": ..., "path": ...}`, not decoded.
        num_labels: Number of classes, other labels are an error (default: `None`, not known).
        reduce_labels: Whether label 0 is no class, and the others count from 0, as ADE20K's (default: `False`).
    """

    rows: Sequence[Mapping[str, Any]] | datasets.Dataset
    num_labels: int | None = None
    reduce_labels: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """What messages call an image: its path, or its place.

        Args:
            index: Of its row.
        """
        return (self.rows[index]["image"] or {}).get("path") or f"image {index}"

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads an image, turned as its EXIF orientation says unless the map has the size of the stored pixels, and its
        label map.

        Args:
            index: Of its row.

        Returns:
            The image, uint8 `(3, height, width)` RGB, and its labels, int64 `(height, width)`, 255 where ignored.

        Raises:
            ImageError: If either cannot be read; it names the file.
            ValueError: If the map is of colours, of another size, or has labels that are not classes.
        """
        row, name = self.rows[index], self.name(index)
        map_name = f"The label map {(row['label_map'] or {}).get('path') or ''} of {name}"
        given = decode(row["label_map"], map_name, mode=None)
        labels = read_label_map(given, map_name)
        image = decode_to_fit(row["image"], name, tuple(labels.shape))
        if labels.shape != image.shape[1:]:
            raise ValueError(
                f"{map_name} has (height, width) {list(labels.shape)}, the image {list(image.shape[1:])} (neither "
                "turned as its EXIF says nor as it is stored does it fit)."
            )
        labels = reduce_labels(labels) if self.reduce_labels else labels
        check_label_map(labels, self.num_labels, map_name)
        return image, labels


def read_segmentation_folders(image_folder: str | Path, map_folder: str | Path, **settings: Any) -> SegmentationData:
    """Finds images and PNG maps that have the same names but for their endings.

    Args:
        image_folder: With the images, in folders or not.
        map_folder: With the maps, in the same folders.
        **settings: `num_labels` and `reduce_labels` of [`SegmentationData`].

    Raises:
        ImageError: If there are no images, or if an image has no map or a map no image; it names some of them.
    """
    image_folder, map_folder = Path(image_folder), Path(map_folder)
    images, maps = (
        {
            path.relative_to(folder).with_suffix("").as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in endings
        }
        for folder, endings in ((image_folder, _IMAGE_ENDINGS), (map_folder, {".png"}))
    )
    if not images or images.keys() != maps.keys():
        bare, alone = sorted(images.keys() - maps.keys()), sorted(maps.keys() - images.keys())
        raise ImageError(
            f"{image_folder} has {len(images)} images and {map_folder} {len(maps)} maps: {len(bare)} images are "
            f"without a map ({bare[:3]}), {len(alone)} maps without an image ({alone[:3]})."
        )
    rows = [
        {"image": {"path": str(path), "bytes": None}, "label_map": {"path": str(maps[name]), "bytes": None}}
        for name, path in images.items()
    ]
    return SegmentationData(rows, **settings)


def read_segmentation_dataset(
    data: datasets.Dataset, map_column: str | None = None, **settings: Any
) -> SegmentationData:
    """Reads a data set of the Hub with two columns of images, such as `image` and `annotation` (`scene_parse_150`).

    Args:
        data: One split.
        map_column: The column with the maps (default: the other one of two columns of images).
        **settings: `num_labels` and `reduce_labels` of [`SegmentationData`].

    Raises:
        ImageError: If there are no such columns.
    """
    import datasets

    columns = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
    others = [name for name in columns if name != "image"]
    map_column = map_column or (others[0] if len(others) == 1 else None)
    if "image" not in columns or map_column not in others:
        raise ImageError(f"The data set must have columns of images `image` and `map_column`, it has {columns}.")
    data = data.select_columns(["image", map_column])
    for column in ("image", map_column):
        data = data.cast_column(column, datasets.Image(decode=False))
    return SegmentationData(data.rename_column(map_column, "label_map"), **settings)


class TrainingMaps(Dataset):
    """Augmented images with their label maps.

    Items are asked for with `(index, *seed)`, as [`~pvt_hf.data.samplers.EpochSampler`] gives them, and depend on
    nothing else.

    Args:
        data: From [`read_segmentation_folders`] or [`read_segmentation_dataset`].
        augment: From an image (uint8 `(3, height, width)`), its labels (int64 `(height, width)`) and a generator to
            both, such as a [`~pvt_hf.data.augmentation.SegmentationAugmentation`].
        skip_corrupt: Whether a corrupt image is skipped (and counted) instead of being an error (default: `False`).
    """

    def __init__(self, data: SegmentationData, augment: Augment, skip_corrupt: bool = False):
        self.data, self.augment, self.skip_corrupt = data, augment, skip_corrupt

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, ...]) -> dict[str, Any] | None:
        index, *seed = key
        try:
            image, labels = self.data.read(index)
        except ImageError as error:
            if not self.skip_corrupt:
                raise
            logger.warning(f"{error} It is skipped.")
            return None
        image, labels = self.augment(image, labels, np.random.default_rng(seed))
        return {"image": image, "labels": labels, "names": self.data.name(index)}


class EvaluationMaps(Dataset):
    """All images as the image processor prepares them, in their order, with the labels at their original size, where
    predictions are compared with them. Images may differ in size: for batches of one.

    Args:
        data: From [`read_segmentation_folders`] or [`read_segmentation_dataset`].
        image_processor: Of the model.
    """

    def __init__(self, data: SegmentationData, image_processor: PvtSegmentationImageProcessor):
        self.data, self.image_processor = data, image_processor

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, labels = self.data.read(index)
        return {"pixel_values": prepare(image, self.image_processor, self.data.name(index)), "labels": labels}


@dataclass(frozen=True)
class MapCollator:
    """Makes batches of rows of [`TrainingMaps`]: `pixel_values` `(batch, 3, *size)`, `labels` `(batch, *size)`,
    `names` and `skipped`, the number of corrupt images that the batch lacks.

    Args:
        image_processor: Normalises and pads.
        size: (height, width) of the crops in pixels, to which smaller images are padded.
        ignore_index: The label of ignored pixels in the batch (default: 255, their label in the rows).
    """

    image_processor: PvtSegmentationImageProcessor
    size: tuple[int, int]
    ignore_index: int = IGNORE_INDEX

    def __call__(self, rows: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
        kept, skipped = drop_skipped(rows)
        batch = self.image_processor.batch([row["image"] for row in kept], [row["labels"] for row in kept], self.size)
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == IGNORE_INDEX, self.ignore_index)
        return dict(batch) | {"names": [row["names"] for row in kept], "skipped": skipped}
