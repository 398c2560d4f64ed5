"""Images with a class each: loaded, augmented, and in an order that a resumed run repeats."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from .checks import check_images, refuse_problems
from .digits import load_digits_dataset
from .images import ImageError, decode, drop_skipped, load_split, prepare, seed_random_state
from .streams import ShardedStream

if TYPE_CHECKING:
    import datasets
    from PIL import Image
    from transformers import BaseImageProcessor


logger = logging.get_logger(__name__)


def load_images(
    source: str | None,
    split: str,
    config_name: str | None = None,
    streaming: bool = False,
    image_column: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Loads images from wherever they are.

    Args:
        source: A data set of the Hub; a folder with one of images per class, or of such folders per split; or a pattern
            of parquet files or WebDataset shards (`data/train-*.parquet`, `shards/{0000..0146}.tar`, as `datasets`
            expands it). `None` is the bundled data: scikit-learn's digits, four fifths in `train` and the others in
            every other split.
        split: For example `train` or `validation`.
        config_name: Of a data set of the Hub (default: its only one).
        streaming: Whether images are read when they are needed instead of being prepared first (default: `False`).
        image_column: The column of images (default: the only one).

    Returns:
        The split, with a column `image` that is not decoded yet: see [`TrainingImages`].

    Raises:
        ImageError: If there is no such data, with what `datasets` says about it.
    """
    import datasets

    data = _load_split(source, split, config_name, streaming)
    if data.features is None:
        data = data._resolve_features()
    image_columns = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]

    if image_column is not None:
        image_columns = [name for name in image_columns if name == image_column]
    if len(image_columns) != 1:
        raise ImageError(
            f"{source!r} must have one column of images{f' {image_column!r}' if image_column else ''}, got "
            f"{image_columns} of {data.features}. `image_column` (`--image_column`) chooses one."
        )

    if streaming and isinstance(data, datasets.Dataset):
        length = datasets.SplitInfo(split, num_examples=len(data))
        data = data.to_iterable_dataset(num_shards=min(8, len(data)))
        data.info.splits = datasets.SplitDict({split: length})

    if image_columns != ["image"]:
        if "image" in data.features:
            data = data.remove_columns("image")
        data = data.rename_column(image_columns[0], "image")
    return data.cast_column("image", datasets.Image(decode=False))


def _load_split(
    source: str | None, split: str, config_name: str | None, streaming: bool
) -> datasets.Dataset | datasets.IterableDataset:
    if source is None:
        return load_digits_dataset(split)
    if Path(source).is_dir() and not any(Path(source).rglob("*.parquet")):
        return load_split(source, split, "imagefolder", data_dir=source, streaming=streaming)
    if source.endswith((".parquet", ".tar")):
        builder = "parquet" if source.endswith(".parquet") else "webdataset"
        # The files are the split, whatever they are called.
        return load_split(source, split, builder, data_files={split: source}, streaming=streaming)
    return load_split(source, split, name=config_name, streaming=streaming)


def cache_stream(stream: datasets.IterableDataset) -> datasets.Dataset:
    """Writes a stream to the cache of `datasets`: for evaluation, where loading a split without streaming would prepare
    all the others too.

    Args:
        stream: From [`load_images`].

    Returns:
        The same rows as a data set with a length.
    """
    import datasets

    def rows(stream: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
        yield from stream

    return datasets.Dataset.from_generator(rows, features=stream.features, gen_kwargs={"stream": stream})


def count_images(stream: datasets.IterableDataset, split: str) -> int | None:
    """The number of images of a stream, or `None` where its data set does not say it.

    Args:
        stream: From [`load_images`].
        split: The one that it was loaded from.
    """
    splits = getattr(stream.info, "splits", None) or {}
    count = splits[split].num_examples if split in splits else None
    return count if count and math.isfinite(count) and count > 0 else None


def find_labels(
    data: datasets.Dataset | datasets.IterableDataset,
    column: str | None = None,
    num_labels: int | None = None,
    names: Sequence[str] | None = None,
) -> tuple[str, list[str]]:
    """Finds the column of labels, and the names of the classes.

    Args:
        data: From [`load_images`].
        column: Its name (default: the only column of class labels, or of integers).
        num_labels: Number of classes, for labels without names that are not all at hand (streams).
        names: Of labels that have none in the data (default: their numbers).

    Returns:
        The name of the column, and the name of each class.

    Raises:
        ValueError: If there is no such column, or more than one, or its values are not class indices.
    """
    import datasets

    classes = [name for name, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)]
    integers = [name for name, feature in data.features.items() if "int" in str(getattr(feature, "dtype", ""))]
    found = [column] if column else classes or integers
    if len(found) != 1 or found[0] not in data.features:
        raise ValueError(
            f"`label_column` must be one of the columns {list(data.features)}, got {column}. Found: {found}."
        )
    feature = data.features[found[0]]
    if isinstance(feature, datasets.ClassLabel):
        if num_labels not in (None, len(feature.names)):
            raise ValueError(f"`num_labels` is {num_labels}, but {found[0]!r} names {len(feature.names)} classes.")
        return found[0], feature.names
    if "int" not in str(getattr(feature, "dtype", "")):
        raise ValueError(
            f"`label_column` must hold class indices, but {found[0]!r} holds {feature}. "
            "`datasets.Dataset.class_encode_column` turns names into them."
        )
    if names is not None:
        if num_labels not in (None, len(names)):
            raise ValueError(f"`num_labels` is {num_labels}, but there are {len(names)} names of classes.")
        return found[0], list(names)
    if num_labels is None and isinstance(data, datasets.IterableDataset):
        raise ValueError(f"The labels in {found[0]!r} have no names: give their number with `num_labels`.")
    return found[0], [str(label) for label in range(num_labels or max(data.unique(found[0])) + 1)]


def encode_names(
    data: datasets.Dataset | datasets.IterableDataset, column: str | None
) -> datasets.Dataset | datasets.IterableDataset:
    """The data with class labels, in the order of the alphabet, in place of the names in a column.

    Args:
        data: From [`load_images`]; a stream, whose names are not all at hand, stays as it is.
        column: Of names; with any other column, or `None`, the data stay as they are.
    """
    import datasets

    dtype = str(getattr(data.features.get(column), "dtype", ""))
    if not isinstance(data, datasets.Dataset) or dtype not in ("string", "large_string"):
        return data
    return data.class_encode_column(column)


def check_images_and_labels(
    data: datasets.Dataset, label_column: str, num_labels: int, name: str, skip_corrupt: bool = False, workers: int = 0
) -> tuple[datasets.Dataset, list[str]]:
    """Checks that every image can be opened and every label is a class.

    Args:
        data: From [`load_images`].
        label_column: From [`find_labels`].
        num_labels: Number of classes.
        name: Of the images, for messages: "the training set".
        skip_corrupt: Whether images that cannot be decoded are left out instead of being an error (default: `False`).
        workers: Processes that check (default: 0, this one).

    Returns:
        The data, without what was left out, and the problems of that.

    Raises:
        ImageError: If images fail, with their number and the first of them, if all do, or if labels are not classes,
            with their counts.
    """
    counts = Counter(data[label_column])
    if wrong := {label: count for label, count in counts.items() if label not in range(num_labels)}:
        raise ImageError(
            f"{sum(wrong.values())} of {len(data)} labels of {name} (column {label_column!r}) are not classes in [0, "
            f"{num_labels}): {wrong} (label: images)."
        )
    checked = check_images(data, decoded=skip_corrupt, workers=workers)
    problems = [found.problem for found in checked if found.problem]
    refuse_problems(problems, len(data), f"images of {name}", skip_corrupt)
    if not problems:
        return data, []
    return data.select([index for index, found in enumerate(checked) if not found.problem]), problems


def summarize_labels(data: datasets.Dataset, label_column: str, label_names: Sequence[str]) -> str:
    """How many images and classes there are, in a line.

    Args:
        data: From [`load_images`].
        label_column: From [`find_labels`].
        label_names: From [`find_labels`].
    """
    counts = Counter(data[label_column])
    numbers = [counts[label] for label in range(len(label_names))]
    missing = [name for name, count in zip(label_names, numbers, strict=True) if not count]
    listed = f"; none of {missing[:20]}{' ...' if len(missing) > 20 else ''}" if missing else ""
    return f"{len(data)} images of {len(numbers)} classes ({min(numbers)} to {max(numbers)} of a class){listed}"


def check_class_index(label: Any, num_labels: int, name: str) -> int:
    """The label itself, if it is a class.

    Args:
        label: Of an image.
        num_labels: Number of classes.
        name: Of the image, for the message of an error.

    Raises:
        ImageError: If the label is not an integer in [0, `num_labels`).
    """
    if not isinstance(label, int) or not 0 <= label < num_labels:
        raise ImageError(f"The label of {name} must be a class in [0, {num_labels}), got {label!r}.")
    return label


class _AugmentedImages:
    """What [`TrainingImages`] and [`StreamedImages`] share: a row becomes an augmented image, or is skipped."""

    label_column: str
    num_labels: int
    transform: Callable[[Image.Image], torch.Tensor]
    skip_corrupt: bool
    places: Sequence[int]

    def augment(self, row: Mapping[str, Any], seed: Sequence[int], position: int) -> dict[str, Any] | None:
        """`pixel_values`, `labels` and `names` of a row, or `None` where its image is corrupt and skipped."""
        name = (row["image"] or {}).get("path") or row.get("__key__") or f"image {position}"
        try:
            image = decode(row["image"], name)
        except ImageError as error:
            if not self.skip_corrupt:
                raise
            logger.warning(f"{error} It is skipped.")
            return None
        label = check_class_index(row[self.label_column], self.num_labels, name)
        with seed_random_state(*seed):
            return {"pixel_values": self.transform(image), "labels": self.places[label], "names": name}


class TrainingImages(_AugmentedImages, Dataset):
    """Augmented images of a data set that is on the disk.

    Items are asked for with `(index, *seed)`, as [`~pvt_hf.data.samplers.EpochSampler`] gives them. The augmentation
    depends on nothing else.

    Args:
        data: From [`load_images`].
        label_column: From [`find_labels`].
        num_labels: Number of classes.
        transform: From a PIL image in RGB to a tensor `(3, height, width)`: that of
            [`~pvt_hf.data.augmentation.build_training_transform`], your own of `torchvision.transforms.v2`, or both in
            a `v2.Compose`.
        skip_corrupt: Whether a corrupt image is skipped (and counted) instead of being an error (default: `False`).
        places: The label of each class of the data in the model (default: the same).
    """

    def __init__(
        self,
        data: datasets.Dataset | Sequence[Mapping[str, Any]],
        label_column: str,
        num_labels: int,
        transform: Callable[[Image.Image], torch.Tensor],
        skip_corrupt: bool = False,
        places: Sequence[int] | None = None,
    ):
        self.data, self.label_column, self.num_labels = data, label_column, num_labels
        self.transform, self.skip_corrupt = transform, skip_corrupt
        self.places = range(num_labels) if places is None else places

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, ...]) -> dict[str, Any] | None:
        index, *seed = key
        return self.augment(self.data[index], seed, index)


class StreamedImages(_AugmentedImages, ShardedStream):
    """Augmented images of a stream, in epochs of a fixed length, dealt to processes and workers, and shuffled by shard
    and in blocks: see [`~pvt_hf.data.streams.ShardedStream`].

    Order and augmentation depend on seed, epoch and the numbers of processes and workers only. A resumed run has the
    same images, without reading what it has seen.

    Args:
        data: A streamed data set from [`load_images`].
        label_column: From [`find_labels`].
        num_labels: Number of classes.
        transform: From a PIL image in RGB to a tensor `(3, height, width)`: that of
            [`~pvt_hf.data.augmentation.build_training_transform`], your own of `torchvision.transforms.v2`, or both in
            a `v2.Compose`.
        samples_per_epoch: Images of an epoch, over all processes.
        seed: Of the run.
        rank: Number of the process, from 0 (default: 0).
        world_size: Number of processes (default: 1).
        buffer_size: How many images each worker shuffles at a time, encoded as they are stored (default: 10,000).
        skip_corrupt: Whether a corrupt image is skipped (and counted) instead of being an error (default: `False`).
        places: The label of each class of the data in the model (default: the same).

    Raises:
        ValueError: If `buffer_size` is not positive.
        ImageError: While iterating, if a shard cannot be read, or there are fewer images than workers.
    """

    def __init__(
        self,
        data: datasets.IterableDataset,
        label_column: str,
        num_labels: int,
        transform: Callable[[Image.Image], torch.Tensor],
        samples_per_epoch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        buffer_size: int = 10_000,
        skip_corrupt: bool = False,
        places: Sequence[int] | None = None,
    ):
        ShardedStream.__init__(self, data, samples_per_epoch, seed, rank, world_size, buffer_size)
        self.label_column, self.num_labels = label_column, num_labels
        self.transform, self.skip_corrupt = transform, skip_corrupt
        self.places = range(num_labels) if places is None else places


def collate(rows: Iterable[dict[str, Any] | None]) -> dict[str, Any]:
    """Makes a batch.

    Args:
        rows: Of [`TrainingImages`], [`StreamedImages`] or [`EvaluationImages`].

    Returns:
        `pixel_values` `(batch, 3, height, width)` and `labels` `(batch,)` int64; of images for training also `names`,
        and `skipped`, the number of corrupt ones that the batch lacks.

    Raises:
        ImageError: If all of them are corrupt.
    """
    kept, skipped = drop_skipped(rows)
    batch = {
        "pixel_values": torch.stack([row["pixel_values"] for row in kept]),
        "labels": torch.tensor([row["labels"] for row in kept]),
    }
    if "names" in kept[0]:
        batch |= {"names": [row["names"] for row in kept], "skipped": skipped}
    return batch


class EvaluationImages(Dataset):
    """Images as an image processor prepares them, in their order; a corrupt one is an error.

    Args:
        data: From [`load_images`].
        label_column: From [`find_labels`].
        num_labels: Number of classes of the data.
        image_processor: Of the model.
        places: The label of each of these classes in the model (default: the same).
    """

    def __init__(
        self,
        data: datasets.Dataset | Sequence[Mapping[str, Any]],
        label_column: str,
        num_labels: int,
        image_processor: BaseImageProcessor,
        places: Sequence[int] | None = None,
    ):
        self.data, self.label_column, self.num_labels = data, label_column, num_labels
        self.image_processor, self.places = image_processor, range(num_labels) if places is None else places

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label, name = self.read(index)
        return {"pixel_values": prepare(image, self.image_processor, name), "labels": label}

    def read(self, index: int) -> tuple[Image.Image, int, str]:
        """An image, its label in the model, and its name.

        Args:
            index: Of the image, from 0.
        """
        row = self.data[index]
        name = (row["image"] or {}).get("path") or f"image {index}"
        label = check_class_index(row[self.label_column], self.num_labels, name)
        return decode(row["image"], name), self.places[label], name
