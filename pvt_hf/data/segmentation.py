"""Images with label maps for semantic segmentation: folders of files, or a data set of the Hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from ..models.image_processing_segmentation import IGNORE_INDEX, check_label_map, read_label_map, reduce_labels
from .images import IMAGE_ENDINGS, ImageError, decode, decode_to_fit, drop_skipped, prepare
from .label_maps import Palette, is_jpeg, label_colors, read_binary_mask, read_color_codes
from .samplers import split_by_chance
from .user_transforms import Transform, transform_map

if TYPE_CHECKING:
    import datasets

    from ..models.image_processing_segmentation import PvtSegmentationImageProcessor

    Augment: TypeAlias = Callable[[torch.Tensor, torch.Tensor, np.random.Generator], tuple[torch.Tensor, torch.Tensor]]

logger = logging.get_logger(__name__)

_MAP_ENDINGS = IMAGE_ENDINGS - {".webp"}


@dataclass(frozen=True)
class SegmentationData:
    """Images with a class label for every pixel.

    Args:
        rows: With `image` and `label_map`, each `{"bytes": ..., "path": ...}`, not decoded.
        num_labels: Number of classes, other labels are an error (default: `None`, not known).
        reduce_labels: Whether label 0 is no class, and the others count from 0, as ADE20K's (default: `False`).
        binary_masks: Whether maps are masks of 0 and 255, of two classes: values from 128 on have the label 1, others
            0, none is ignored, and masks may be JPEG (default: `False`).
        palette: The label of each colour (red, green, blue) of the maps, as
            [`~pvt_hf.data.label_maps.read_palette`] reads it (default: `None`, the maps hold labels).

    Raises:
        ValueError: If these settings contradict each other.
    """

    rows: Sequence[Mapping[str, Any]] | datasets.Dataset
    num_labels: int | None = None
    reduce_labels: bool = False
    binary_masks: bool = False
    palette: Palette | None = None

    def __post_init__(self) -> None:
        if self.binary_masks and self.num_labels not in (None, 2):
            raise ValueError(f"`binary_masks` are of two classes, `num_labels` is {self.num_labels}.")
        if self.binary_masks + self.reduce_labels + (self.palette is not None) > 1:
            raise ValueError("Only one of `binary_masks`, `reduce_labels` and `palette` can say how maps are read.")

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> SegmentationData:
        """Some of the images.

        Args:
            indices: Of their rows.
        """
        rows = self.rows
        chosen = rows.select(indices) if hasattr(rows, "select") else [rows[index] for index in indices]
        return replace(self, rows=chosen)

    def split(self, share: float, seed: int) -> tuple[SegmentationData, SegmentationData]:
        """The images in two parts by chance, each in their order.

        Args:
            share: Of the second part, at least one image, in (0, 1).
            seed: Decides which.

        Raises:
            ValueError: If nothing would be left for the first part.
        """
        first, second = split_by_chance(len(self), share, seed)
        return self.select(first), self.select(second)

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
        labels = self.read_labels(index)
        image = decode_to_fit(row["image"], name, tuple(labels.shape))
        if labels.shape != image.shape[1:]:
            raise ValueError(
                f"{self.map_name(index)} has (height, width) {list(labels.shape)}, the image {list(image.shape[1:])} "
                "(neither turned as its EXIF says nor as it is stored does it fit)."
            )
        return image, labels

    def map_name(self, index: int) -> str:
        """What messages call a label map.

        Args:
            index: Of its row.
        """
        row = self.rows[index]
        path, image = ((row[column] or {}).get("path") for column in ("label_map", "image"))
        return (
            f"The label map {path or ''} of {image or f'image {index}'}"
            if image or not path
            else f"The label map {path}"
        )

    def read_labels(self, index: int) -> torch.Tensor:
        """Reads a label map.

        Args:
            index: Of its row.

        Returns:
            int64 `(height, width)`, 255 where ignored.

        Raises:
            ImageError: If it cannot be read; it names the file.
            ValueError: If the map is of colours, or has labels that are not classes.
        """
        return self.to_labels(self.read_values(index), self.map_name(index))

    def read_values(self, index: int) -> torch.Tensor:
        """Reads what a label map's file has.

        Args:
            index: Of its row.

        Returns:
            int64 `(height, width)`: labels, or with a palette colours as integers `0xRRGGBB`.

        Raises:
            ImageError: As `read_labels`.
            ValueError: As `read_labels`, but for labels that are not classes.
        """
        name, stored = self.map_name(index), self.rows[index]["label_map"]
        given = decode(stored, name, mode=None)
        if self.binary_masks:
            return read_binary_mask(given, name)
        if is_jpeg(stored):
            raise ValueError(
                f"{name} is a JPEG, whose compression changes labels and colours: store maps as PNG, TIFF or BMP. "
                "Masks of 0 and 255 can be read: set `binary_masks` (`--binary_masks`)."
            )
        if self.palette is not None:
            return read_color_codes(given)
        try:
            return read_label_map(given, name)
        except ValueError as error:
            if len(given.getbands()) == 1:
                raise
            raise ValueError(
                f"{error} A table of colours does so, `palette` (`--palette`); for masks of 0 and 255 set "
                "`binary_masks` (`--binary_masks`)."
            ) from error

    def to_labels(self, values: torch.Tensor, name: str) -> torch.Tensor:
        """The labels that a map's values stand for, int64, 255 where ignored.

        Args:
            values: Of `read_values`, of any shape.
            name: Of the map, for the error.

        Raises:
            ValueError: If there are values that are not classes; they are listed.
        """
        if self.palette is not None:
            values = label_colors(values, self.palette, name)
        labels = reduce_labels(values) if self.reduce_labels else values
        check_label_map(labels, self.num_labels, name, self._advise())
        return labels

    def _advise(self) -> str:
        """What may be wrong where values are not classes."""
        if self.binary_masks or self.reduce_labels or self.palette is not None:
            return ""
        binary = " If values from 128 on stand for class 1, set `binary_masks` (`--binary_masks`)."
        return "If 0 stands for no class, set `reduce_labels` (`--reduce_labels`)." + binary * (self.num_labels == 2)


def read_segmentation_folders(image_folder: str | Path, map_folder: str | Path, **settings: Any) -> SegmentationData:
    """Finds images and label maps that have the same names but for their endings. Maps are PNG, TIFF or BMP; with
    `binary_masks` also JPEG.

    Args:
        image_folder: With the images, in folders or not.
        map_folder: With the maps, in the same folders.
        **settings: The other fields of [`SegmentationData`].

    Raises:
        ImageError: If there are no images, if an image has no map or a map no image, or if two files of a folder differ
            in their endings only; it names some of them.
    """
    images, maps = _find_files(image_folder, IMAGE_ENDINGS), _find_files(map_folder, _MAP_ENDINGS)
    if not images or images.keys() != maps.keys():
        bare, alone = sorted(images.keys() - maps.keys()), sorted(maps.keys() - images.keys())
        raise ImageError(
            f"{image_folder} has {len(images)} images{_list_endings(image_folder, images)} and {map_folder} "
            f"{len(maps)} maps{_list_endings(map_folder, maps)}: {len(bare)} images are without a map ({bare[:3]}), "
            f"{len(alone)} maps without an image ({alone[:3]}). Maps must be PNG, TIFF or BMP, or with `binary_masks` "
            "(`--binary_masks`) JPEG, and have the names of their images."
        )
    rows = [
        {"image": {"path": str(path), "bytes": None}, "label_map": {"path": str(maps[name]), "bytes": None}}
        for name, path in images.items()
    ]
    return SegmentationData(rows, **settings)


def _find_files(folder: str | Path, endings: set[str]) -> dict[str, Path]:
    """The files with these endings, by their paths in the folder without them."""
    found: dict[str, Path] = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix.lower() in endings and not path.name.startswith("."):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                raise ImageError(f"{found[name]} and {path} differ in their endings only: which one is meant?")
            found[name] = path
    return found


def _list_endings(folder: str | Path, found: dict[str, Path]) -> str:
    """The endings of a folder's files, where none of them is of use."""
    counts = Counter(path.suffix.lower() or "no ending" for path in Path(folder).rglob("*") if path.is_file())
    return f" (but {', '.join(f'{count} {ending}' for ending, count in counts.items())})" * (not found and bool(counts))


def read_segmentation_dataset(
    data: datasets.Dataset, map_column: str | None = None, image_column: str | None = None, **settings: Any
) -> SegmentationData:
    """Reads a data set of the Hub with two columns of images, such as `image` and `annotation` (`scene_parse_150`) or
    `pixel_values` and `label` (`segments/sidewalk-semantic`).

    Args:
        data: One split.
        map_column: The column with the maps (default: the other one of two columns of images).
        image_column: The column with the images (default: `image`, or else `pixel_values`).
        **settings: The other fields of [`SegmentationData`].

    Raises:
        ImageError: If there are no such columns.
    """
    import datasets

    columns = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
    image_column = image_column or ("pixel_values" if "image" not in columns and "pixel_values" in columns else "image")
    others = [name for name in columns if name != image_column]
    map_column = map_column or (others[0] if len(others) == 1 else None)
    if image_column not in columns or map_column not in others:
        raise ImageError(
            f"The data set must have a column of images `{image_column}` and one of label maps"
            f"{f' `{map_column}`' if map_column else ''}, its columns of images are {columns}. "
            "`--image_column` and `--map_column` name others."
        )
    data = data.select_columns([image_column, map_column])
    for column in (image_column, map_column):
        data = data.cast_column(column, datasets.Image(decode=False))
    return SegmentationData(data.rename_columns({image_column: "image", map_column: "label_map"}), **settings)


class TrainingMaps(Dataset):
    """Augmented images with their label maps.

    Items are asked for with `(index, *seed)`, as [`~pvt_hf.data.samplers.EpochSampler`] gives them, and depend on
    nothing else.

    Args:
        data: From [`read_segmentation_folders`] or [`read_segmentation_dataset`].
        augment: From an image (uint8 `(3, height, width)`), its labels (int64 `(height, width)`) and a generator to
            both, such as a [`~pvt_hf.data.augmentation.SegmentationAugmentation`].
        skip_corrupt: Whether a corrupt image is skipped (and counted) instead of being an error (default: `False`).
        transform: Of `torchvision.transforms.v2`, before `augment`: see
            [`~pvt_hf.data.user_transforms.transform_map`] (default: none).
    """

    def __init__(
        self,
        data: SegmentationData,
        augment: Augment,
        skip_corrupt: bool = False,
        transform: Transform | None = None,
    ):
        self.data, self.augment, self.skip_corrupt, self.transform = data, augment, skip_corrupt, transform

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
        generator = np.random.default_rng(seed)
        if self.transform is not None:
            image, labels = transform_map(self.transform, image, labels, generator)
        image, labels = self.augment(image, labels, generator)
        return {"image": image, "labels": labels, "names": self.data.name(index)}


class EvaluationMaps(Dataset):
    """All images as the image processor prepares them, in their order, with the labels at their original size, where
    predictions are compared with them. Images may differ in size: for batches of one.

    Args:
        data: From [`read_segmentation_folders`] or [`read_segmentation_dataset`].
        image_processor: Of the model.
        scales: Factors of the image processor's size at which images are prepared too (default: none).
    """

    def __init__(
        self, data: SegmentationData, image_processor: PvtSegmentationImageProcessor, scales: Sequence[float] = ()
    ):
        self.data, self.image_processor, self.scales = data, image_processor, scales

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, labels = self.data.read(index)
        first, *scaled = prepare_scales(image, self.image_processor, (1, *self.scales), self.data.name(index))
        return {"pixel_values": first, "labels": labels} | ({"scaled": scaled} if scaled else {})


def prepare_scales(
    image: torch.Tensor, image_processor: PvtSegmentationImageProcessor, scales: Sequence[float], name: str
) -> list[torch.Tensor]:
    """An image as the network gets it, at several scales.

    Args:
        image: uint8 `(3, height, width)`, RGB.
        image_processor: Of the model.
        scales: Factors of its size.
        name: For the message of an error.

    Returns:
        float32 `(3, height, width)` each.

    Raises:
        ImageError: If the processor refuses the image; the message has `name`.
    """
    size = {side: pixels for side, pixels in dict(image_processor.size).items() if pixels}
    sizes = [{side: round(scale * pixels) for side, pixels in size.items()} for scale in scales]
    return [prepare(image, image_processor, name, size=scaled) for scaled in sizes]


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
