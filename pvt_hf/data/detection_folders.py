"""Folders of images with objects as YOLO, Pascal VOC and Roboflow lay them out."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from transformers.utils import logging

from ..models.annotations import AnnotationError
from ..untrusted import UntrustedFileError, check_regular_file, read_text
from .checks import check_images, refuse_problems
from .class_names import parse_yaml, read_class_names
from .detection import read_coco
from .detection_records import DetectionData, ImageRecord, check_records
from .images import IMAGE_ENDINGS

logger = logging.get_logger(__name__)

# What a split may be called.
_SPLITS = (("train", "training"), ("validation", "valid", "val"), ("test",))
_COCO_FILE = "_annotations.coco.json"


def find_layout(folder: str | Path) -> str | None:
    """How a folder is laid out: `coco` (Roboflow's), `yolo`, `voc`, or `None` for anything else.

    Args:
        folder: Of all splits, or the `data.yaml` of YOLO, whatever it is called.
    """
    folder = Path(folder)
    if folder.suffix.lower() in (".yaml", ".yml") and folder.is_file():
        return "yolo"
    marks = {
        "coco": [f"*/{_COCO_FILE}"],
        "yolo": ["data.yaml", "labels/**/*.txt", "*/labels/*.txt"],
        "voc": ["Annotations/*.xml", "*/*.xml"],
    }
    found = (name for name, patterns in marks.items() if any(next(folder.glob(mark), None) for mark in patterns))
    return next(found, None) if folder.is_dir() else None


def read_detection_folder(
    folder: str | Path,
    split: str,
    label_names: Sequence[str] | None = None,
    skip_corrupt: bool = False,
    allow_outside: bool = False,
    workers: int = 0,
) -> DetectionData:
    """Reads a split of a folder in one of three layouts.

    - Roboflow's COCO: `train/_annotations.coco.json` beside its images.
    - YOLO: `data.yaml` with `names` and where each split is (folders, or text files that list images), or without it
      `images/train` or `train/images`; the labels of `images/.../a.jpg` are in `labels/.../a.txt`. Lines of polygons
      become masks. Without `names` in `data.yaml`, they are those of `classes.txt` or `label_names`.
    - Pascal VOC: `train/a.xml` beside the images, or `Annotations`, `JPEGImages` and `ImageSets/Main/train.txt`. The
      corners are pixels that belong to the box, counted from 1. What is `difficult` is not trained on, and is not to be
      found either.

    Args:
        folder: Of all splits, or the `data.yaml` of YOLO, whatever it is called.
        split: `train`, `validation` (also where the folder says `valid` or `val`) or `test`.
        label_names: Names of the classes in their order (default: those of the folder, of Pascal VOC in the order of
            the alphabet). Of a validation set: those of the training set.

        skip_corrupt: Whether images that cannot be opened are left out, where their sizes are needed (default: `False`,
            an error).
        allow_outside: Whether files may name images outside of the folder (default: `False`, since images of it appear
            in pictures that may be published).

        workers: Processes that read sizes (default: 0, this one).

    Raises:
        AnnotationError: If the folder has another layout or no such split, or an annotation cannot be used; the message
            names file and line.
        ClassNameError: If the names of the classes cannot be read.
        ImageError: If an image is missing or cannot be opened.
    """
    layout = find_layout(folder)
    if layout is None:
        raise AnnotationError(
            f"{folder} has none of the known layouts: {_COCO_FILE} in a folder of each split (COCO), data.yaml or "
            "labels (YOLO), xml files in a folder of each split or in Annotations (Pascal VOC)."
        )
    aliases = next((names for names in _SPLITS if split in names), (split,))
    path = Path(folder)
    folder, data_yaml = (path.parent, path) if path.is_file() else (path, path / "data.yaml")
    options = _Options(aliases, label_names, skip_corrupt, allow_outside, workers, data_yaml)
    return _READERS[layout](folder, options)


class _Options(NamedTuple):
    """See [`read_detection_folder`]; `aliases` is what the split may be called."""

    aliases: Sequence[str]
    label_names: Sequence[str] | None
    skip_corrupt: bool
    allow_outside: bool
    workers: int
    data_yaml: Path


def _read_roboflow(folder: Path, options: _Options) -> DetectionData:
    part = _find(folder, [f"{name}/{_COCO_FILE}" for name in options.aliases]).parent
    return read_coco(part / _COCO_FILE, part, options.allow_outside)


def _find(folder: Path, candidates: Sequence[str], allow_outside: bool = False) -> Path:
    """The first of these paths that is there, and in the folder unless others are allowed."""
    paths = [Path(os.path.normpath(folder / name)) for name in candidates]
    for path in paths:
        if os.path.exists(path) and (allow_outside or path.is_relative_to(os.path.normpath(folder))):
            return path
    if outside := next(filter(os.path.exists, paths), None):
        raise AnnotationError(f"{outside} is outside of {folder}: set `allow_outside` (`--allow_outside`) to read it.")
    raise AnnotationError(f"{folder} has none of {list(dict.fromkeys(candidates))}.")


def _read(file: Path) -> str:
    try:
        return read_text(file)
    except UntrustedFileError as error:
        raise AnnotationError(f"{file} {error}") from error


def _list_images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)


def _read_yolo(folder: Path, options: _Options) -> DetectionData:
    content = _read_data_yaml(options.data_yaml)
    if "kpt_shape" in content:
        raise AnnotationError(f"{options.data_yaml} is of poses (`kpt_shape`): their labels are not boxes.")
    names = _name_yolo_classes(folder, options, content)
    images = [
        path
        for place in _find_yolo_images(folder, options, content)
        for path in (_read_image_list(place, folder, options) if place.is_file() else _list_images(place))
    ]
    labels = [_label_file(path) for path in images]
    if not any(map(Path.is_file, labels)):
        raise AnnotationError(f"None of {len(images)} images has labels, the first would have {[*labels, None][0]}.")
    if bare := sum(not path.is_file() for path in labels):
        logger.warning(f"{bare} of {len(images)} images have no file of labels: they are taken for empty.")
    sizes, left_out = _measure(images, options)
    records = [
        ImageRecord(number, str(path.relative_to(folder)), size, _read_yolo_labels(label, size, len(names)), str(path))
        for number, (path, label, size) in enumerate(zip(images, labels, sizes, strict=True))
        if size
    ]
    data = DetectionData(list(names), list(range(len(names))), records, left_out=left_out)
    return check_records(data, str(folder), "yolo")


def _name_yolo_classes(folder: Path, options: _Options, content: dict[str, Any]) -> Sequence[str]:
    text_file = folder / "classes.txt"
    names_file = options.data_yaml if "names" in content else text_file if text_file.exists() else None
    names = read_class_names(names_file) if names_file else options.label_names
    if names is None:
        raise AnnotationError(
            f"{folder} has neither data.yaml with `names` nor classes.txt: pass the names of its classes "
            "(`--class_names`)."
        )
    if content.get("nc", len(names)) != len(names):
        raise AnnotationError(f"{options.data_yaml} says `nc` {content['nc']!r}, but there are {len(names)} names.")
    return names


def _read_data_yaml(file: Path) -> dict[str, Any]:
    text = _read(file) if file.exists() else "{}"
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise AnnotationError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise AnnotationError(f"{file} must hold names and values, got {type(content).__name__}.")
    return content


def _find_yolo_images(folder: Path, options: _Options, content: dict[str, Any]) -> list[Path]:
    """The folders with the images of a split, or files that list them, where data.yaml says, or else where they usually
    are."""
    given = next((content[name] for name in options.aliases if content.get(name)), None)
    if given is None:
        return [_find(folder, [place for name in options.aliases for place in (f"images/{name}", f"{name}/images")])]
    places = given if isinstance(given, list) else [given]
    if not all(isinstance(place, str) for place in places):
        raise AnnotationError(
            f"{options.data_yaml}: `{options.aliases[0]}` must be a folder or a list of them, got {given!r}."
        )
    # Roboflow writes "../train/images" for train/images, and `path` is that of the machine that wrote it.
    root = str(content.get("path") or ".")

    return [
        _find(folder, [f"{root}/{place}", place, re.sub(r"^(\.\.?/)+", "", place)], options.allow_outside)
        for place in places
    ]


def _read_image_list(file: Path, folder: Path, options: _Options) -> list[Path]:
    """The images that a file names, a line each, relative to itself or to the folder."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise AnnotationError(f"{file} cannot be read: {error}") from error
    return [_find(folder, [str(file.absolute().parent / line), line], options.allow_outside) for line in lines if line]


def _label_file(image: Path) -> Path:
    """`labels/.../a.txt` of `images/.../a.jpg`; beside the image where none of its folders is `images`."""
    parts = list(image.with_suffix(".txt").parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts)


def _measure(images: Sequence[Path], options: _Options) -> tuple[list[tuple[int, int] | None], list[str]]:
    """(height, width) of each image as it is shown, `None` for those that are left out, and their problems."""
    checked = check_images([str(path) for path in images], workers=options.workers)
    problems = [found.problem for found in checked if found.problem]
    refuse_problems(problems, len(images), "images", options.skip_corrupt)
    sizes = []
    for found in checked:
        size = found.value and (found.value["height"], found.value["width"])
        sizes.append(size[::-1] if size and found.value["turned"] else size)
    return sizes, problems


def _read_yolo_labels(file: Path, size: tuple[int, int], num_labels: int) -> list[dict[str, Any]]:
    """The lines of a file of labels: a class and a box, or a class and a polygon, relative to the image."""
    lines = _read(file).splitlines() if file.exists() else []
    annotations = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        label, values = _parse_yolo_line(line, f"{file}, line {number}", num_labels)
        annotation: dict[str, Any] = {"id": number, "category_id": label, "bbox": values}
        if len(values) > 4:
            x, y = values[::2], values[1::2]
            width, height = max(x) - min(x), max(y) - min(y)
            annotation["bbox"] = [min(x) + width / 2, min(y) + height / 2, width, height]
            points = zip(x, y, strict=True)
            annotation["segmentation"] = [[c for px, py in points for c in (px * size[1], py * size[0])]]
        annotations.append(annotation)
    return annotations


def _parse_yolo_line(line: str, name: str, num_labels: int) -> tuple[int, list[float]]:
    try:
        label, *values = map(float, line.split())
    except ValueError:
        raise AnnotationError(f"{name} must have numbers only, got {line!r:.200}.") from None
    if not all(map(math.isfinite, values)):
        raise AnnotationError(f"{name} has numbers that are not finite: {line!r:.200}.")
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise AnnotationError(
            f"{name} has {len(values) + 1} numbers, it must have 5 (class, centre, width, height) or a class and a "
            f"polygon of three or more points: {line!r:.200}."
        )
    if label not in range(num_labels):
        raise AnnotationError(f"{name} has the class {label:g}, the classes are 0 to {num_labels - 1}.")
    return int(label), values


def _read_voc(folder: Path, options: _Options) -> DetectionData:
    files, image_folder = _list_voc_files(folder, options.aliases)
    roots = [_parse_xml(file) for file in files]
    found = {
        _read_text(item, "name", file) for root, file in zip(roots, files, strict=True) for item in root.iter("object")
    }
    names = sorted(found) if options.label_names is None else list(options.label_names)
    labels = {name: label for label, name in enumerate(names)}
    by_stem = {path.stem: path for path in _list_images(image_folder)}

    images = [by_stem.get(file.stem, image_folder / f"{file.stem}.jpg") for file in files]
    sizes = [_read_voc_size(root, file) for root, file in zip(roots, files, strict=True)]
    unknown = [place for place, size in enumerate(sizes) if size is None]
    measured, left_out = _measure([images[place] for place in unknown], options)
    sizes = [size or measured[unknown.index(place)] for place, size in enumerate(sizes)]
    records = [
        ImageRecord(
            number, image.name, size, [_read_voc_object(item, labels, file) for item in root.iter("object")], str(image)
        )
        for number, (image, size, root, file) in enumerate(zip(images, sizes, roots, files, strict=True))
        if size
    ]

    if bare := len(by_stem.keys() - {file.stem for file in files}):
        logger.warning(f"{bare} of {len(by_stem)} images in {image_folder} have no xml file in this split: not used.")
    return check_records(DetectionData(names, list(range(len(names))), records, left_out=left_out), str(folder))


def _list_voc_files(folder: Path, aliases: Sequence[str]) -> tuple[list[Path], Path]:
    """The xml files of a split, and the folder of their images."""
    if not (folder / "Annotations").is_dir():
        part = _find(folder, aliases)
        return sorted(part.glob("*.xml")), part
    split = _find(folder, [f"ImageSets/Main/{name}.txt" for name in aliases])
    stems = [line.strip() for line in _read(split).splitlines() if line.strip()]
    if outside := [stem for stem in stems if os.path.isabs(stem) or ".." in Path(stem).parts]:
        raise AnnotationError(f"{split} names files outside of {folder / 'Annotations'}: {outside[:5]}.")
    files = [folder / "Annotations" / f"{stem}.xml" for stem in stems]
    if missing := [str(file) for file in files if not os.path.isfile(file)]:
        raise AnnotationError(f"{len(missing)} of {len(files)} xml files are missing: {missing[:5]}.")
    return files, _find(folder, ["JPEGImages"])


def _parse_xml(file: Path) -> ElementTree.Element:
    try:
        check_regular_file(file)
        return ElementTree.parse(file).getroot()
    except UntrustedFileError as error:
        raise AnnotationError(f"{file} {error}") from error
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        raise AnnotationError(f"{file} cannot be read: {error}") from error


def _read_text(element: ElementTree.Element, path: str, file: Path) -> str:
    text = (element.findtext(path) or "").strip()
    if not text:
        raise AnnotationError(f"{file}: <{element.tag}> has no <{path}>.")
    return text


def _read_number(element: ElementTree.Element, path: str, file: Path) -> int | float:
    text = _read_text(element, path, file)
    try:
        value = float(text)
    except ValueError:
        raise AnnotationError(f"{file}: <{element.tag}> has <{path}> {text!r}, it must be a number.") from None
    return int(value) if value.is_integer() else value


def _read_voc_size(root: ElementTree.Element, file: Path) -> tuple[int, int] | None:
    """(height, width), or `None` where they are missing or 0, as some programs write them."""
    if not all((root.findtext(f"size/{side}") or "").strip(" 0") for side in ("height", "width")):
        return None
    height, width = (_read_number(root, f"size/{side}", file) for side in ("height", "width"))
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise AnnotationError(f"{file} has (height, width) {(height, width)}, they must be positive integers.")
    return height, width


def _read_voc_object(item: ElementTree.Element, labels: dict[str, int], file: Path) -> dict[str, Any]:
    name = _read_text(item, "name", file)
    if name not in labels:
        raise AnnotationError(f"{file}: an object is a {name!r}, the classes are {list(labels)}.")
    x0, y0, x1, y1 = (_read_number(item, f"bndbox/{side}", file) for side in ("xmin", "ymin", "xmax", "ymax"))
    x0, y0 = max(x0 - 1, 0), max(y0 - 1, 0)
    difficult = int((item.findtext("difficult") or "0").strip() == "1")
    return {"category_id": labels[name], "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": difficult, "ignore": difficult}


_READERS: dict[str, Callable[..., DetectionData]] = {"coco": _read_roboflow, "yolo": _read_yolo, "voc": _read_voc}
