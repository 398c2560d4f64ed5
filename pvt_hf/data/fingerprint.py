"""What a data set is, in a few checksums: a run belongs to its data, and does not resume with others.

They are of the listing and of the annotations, and cost little for a million images: no image is opened.
"""

from __future__ import annotations

import marshal
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset, IterableDataset

from .classification import EvaluationImages, StreamedImages, TrainingImages
from .detection import EvaluationDetections, TrainingDetections
from .detection_records import DetectionData
from .segmentation import EvaluationMaps, SegmentationData, TrainingMaps

if TYPE_CHECKING:
    import datasets

# The name of a file, its size in bytes, and what is known about it.
Entry = tuple[str, int, bytes]


def fingerprint(dataset: Dataset | None) -> dict[str, Any]:
    """What a data set is.

    Args:
        dataset: For training or evaluation; `None` is none.

    Returns:
        `kind`, its class, and, where they are known, `images`, their number, and checksums in the order of the images:
        `names` of files (of a path of this machine its last part), their `sizes` in bytes, and `annotations`: labels,
        boxes with all that annotations say, how maps are read. Of label maps also names and sizes count. Of a stream,
        names and sizes are those of its shards, and `images` is missing. Of a class that is none of pvt_hf `kind` and
        `images` are all.
    """
    if dataset is None:
        return {}
    found: dict[str, Any] = {"kind": type(dataset).__name__}
    if hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset):
        found["images"] = len(dataset)
    if (entries := _list_entries(dataset)) is None:
        return found
    names, sizes, annotations = zip(*entries, strict=True) if entries else ((), (), ())
    return found | {
        "names": _checksum(name.encode(errors="surrogatepass") for name in names),
        "sizes": _checksum(str(size).encode() for size in sizes),
        "annotations": _checksum(annotations),
    }


def _checksum(values: Iterable[bytes]) -> str:
    import xxhash

    checksum = xxhash.xxh3_128()
    for value in values:
        checksum.update(len(value).to_bytes(8, "little"))
        checksum.update(value)
    return checksum.hexdigest()


def _list_entries(dataset: Any) -> list[Entry] | None:
    if isinstance(dataset, StreamedImages):
        return list(_list_shards(_find_shards(dataset.data)))
    if isinstance(dataset, TrainingImages | EvaluationImages):
        return list(_list_images(dataset.data, dataset.label_column, list(dataset.places)))
    if isinstance(dataset, TrainingDetections | EvaluationDetections):
        return list(_list_detections(dataset.data))
    if isinstance(dataset, TrainingMaps | EvaluationMaps):
        return list(_list_maps(dataset.data))
    return None


def _list_images(rows: Any, label_column: str, places: Sequence[int]) -> Iterator[Entry]:
    labels = _read_column(rows, label_column)
    for (name, size), label in zip(_read_files(rows, "image"), labels, strict=True):
        is_class = type(label) is int and 0 <= label < len(places)
        yield name, size, repr(places[label] if is_class else label).encode()


def _list_detections(data: DetectionData) -> Iterator[Entry]:
    yield "", 0, repr((data.label_names, data.category_ids)).encode()
    files = list(_read_files(data.rows, "image")) if data.rows is not None else []
    for record in data.records:
        name, size = files[int(record.stored)] if files else _describe_path(record.stored)
        # Version 2 has no references: equal values are equal bytes. (json takes as long as reading the annotations.)
        yield name, size, marshal.dumps((record.image_id, record.size, record.annotations), 2)


def _list_maps(data: SegmentationData) -> Iterator[Entry]:
    palette = sorted(data.palette.items()) if data.palette is not None else None
    yield "", 0, repr((data.num_labels, data.reduce_labels, data.binary_masks, palette)).encode()
    for column in ("image", "label_map"):
        for name, size in _read_files(data.rows, column):
            yield name, size, b""


def _find_shards(data: datasets.IterableDataset) -> Iterator[Any]:
    """What the functions are called with that read a stream: paths among it, or data sets in memory."""
    examples = data._ex_iterable
    while hasattr(examples, "ex_iterable"):
        examples = examples.ex_iterable
    yield from getattr(examples, "kwargs", {}).values()


def _list_shards(shards: Iterable[Any]) -> Iterator[Entry]:
    for shard in shards:
        if isinstance(shard, str):
            yield *_describe_path(shard), b""
        elif isinstance(shard, list | tuple):
            yield from _list_shards(shard)
        elif hasattr(shard, "column_names") and "image" in shard.column_names:
            others = [name for name in shard.column_names if name != "image"]
            annotations = zip(*(_read_column(shard, name) for name in others), strict=True)
            for (name, size), values in zip(_read_files(shard, "image"), annotations, strict=True):
                yield name, size, repr(values).encode()


def _is_table(rows: Any) -> bool:
    """Whether rows are a data set of the library `datasets`."""
    return hasattr(rows, "_indices")


def _read_column(rows: Any, column: str) -> list[Any]:
    """The values of a column, without those of others, which would be read from the disk."""
    if not _is_table(rows):
        return [rows[index][column] for index in range(len(rows))]
    return _select(rows, rows.data.column(column).to_pylist())


def _read_files(rows: Any, column: str) -> Iterator[tuple[str, int]]:
    """Names and sizes of a column of images that are not decoded. Of a table, sizes are differences of offsets."""
    if not _is_table(rows):
        stored = [image or {} for image in _read_column(rows, column)]
        paths = [image.get("path") for image in stored]
        sizes = [None if image.get("bytes") is None else len(image["bytes"]) for image in stored]
    else:
        import pyarrow.compute as pc

        images = rows.data.column(column)
        paths = _select(rows, pc.struct_field(images, "path").to_pylist())
        sizes = _select(rows, pc.binary_length(pc.struct_field(images, "bytes")).to_pylist())
    for path, size in zip(paths, sizes, strict=True):
        name, size_on_disk = _describe_path(path or "", is_there=size is None)
        yield name, size_on_disk if size is None else size


def _select(rows: datasets.Dataset, values: list[Any]) -> list[Any]:
    """Of the values of a table, those of its rows that a data set has, in its order."""
    if rows._indices is None:
        return values
    return [values[index] for index in rows._indices.column(0).to_pylist()]


def _describe_path(path: Any, is_there: bool = True) -> tuple[str, int]:
    """The name of a file and its size in bytes: -1 where it is not on this machine."""
    name = str(path)
    if "://" in name:
        return name, -1
    try:
        return os.path.basename(name), os.stat(name).st_size if is_there and name else -1
    except (OSError, ValueError):
        return os.path.basename(name), -1
