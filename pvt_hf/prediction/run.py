"""Predictions of files: into memory, or as pictures, label maps and json into a folder."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from PIL import Image
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..data.checks import check_images, refuse_problems
from ..data.images import ImageError, decode
from ..evaluation.metrics import coco_results
from ..writing.files import atomic_file, why_unwritable
from .drawing import draw
from .loading import load_predictor, read_task
from .predictions import Detections, Prediction, Segmentation
from .predictor import Predictor, find_task
from .sources import ImageFile, find_images

# One or several of: files, folders and patterns; or also PIL images.
Sources: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"
Images: TypeAlias = "Sources | Image.Image | Sequence[str | os.PathLike[str] | Image.Image]"


# In the folder of the results. Maps by whether they are of 0 and 255.
_PICTURES = "pictures"
_MAPS = {False: "label_maps", True: "masks"}


class Written(NamedTuple):
    """What was written.

    Attributes:
        rows: Of each image what `predictions.json` says.
        problems: Of each corrupt image that was skipped what is wrong with it.
    """

    rows: list[dict[str, Any]]
    problems: list[str]


def predict(
    model: str | os.PathLike[str] | Predictor, images: Images, batch_size: int = 1, **settings: Any
) -> list[Prediction]:
    """Predicts what is in images.

    Args:
        model: A folder, a repository of the Hub, the name of a variant, or a [`Predictor`], which
            [`~pvt_hf.prediction.loading.load_predictor`] makes of them.
        images: One or several of: files, folders, patterns (`photos/*.jpg`), PIL images.
        batch_size: How many images are computed at a time (default: 1).
        **settings: Of [`~pvt_hf.prediction.loading.load_predictor`], such as `device` and `threshold`; for a
            [`Predictor`] only its own.

    Returns:
        For each image a [`Classification`], [`Detections`] or a [`Segmentation`], in the order of `images`, those of a
        folder or a pattern by their names.

    Raises:
        ImageError: If an image is not there or cannot be read.
        ModelError: If there is no such model, it predicts nothing, or tensors of it would be at random.
        ValueError: If a setting is wrong.
    """
    _check_batch_size(batch_size)
    found: list[Any] = []
    for image in _list(images):
        found += [image] if isinstance(image, Image.Image) else [file.path for file in find_images([image])]
    predictor = _get_predictor(model, settings)
    starts = range(0, len(found), batch_size)
    return [prediction for start in starts for prediction in predictor(found[start : start + batch_size])]


def predict_to_folder(
    model: str | os.PathLike[str] | Predictor,
    images: Sources,
    output_dir: str | os.PathLike[str],
    batch_size: int = 1,
    pictures: bool = True,
    binary_masks: bool = False,
    skip_corrupt: bool = False,
    report: Callable[[str], None] | None = None,
    **settings: Any,
) -> Written:
    """Predicts what is in images, and writes it: what `pvt-hf predict` does.

    Args:
        model: As [`predict`] takes it.
        images: One or several files, folders and patterns (`photos/*.jpg`). In `output_dir` none are looked for.
        output_dir: Gets `predictions.json`, a picture of each image in `pictures`, of segmenters a label map of each in
            `label_maps` (PNG, of the size of the image as it is seen), and of detectors `coco_results.json`.
        batch_size: How many images are computed at a time (default: 1).
        pictures: Whether pictures are written (default: `True`).
        binary_masks: Of segmenters of two classes: write maps of 0 and 255, into `masks` (default: `False`).
        skip_corrupt: Whether corrupt images are skipped (default: `False`, an error).
        report: Is called with a line about each image (default: nothing is).
        **settings: As [`predict`] takes them.

    Raises:
        ImageError: If an image is not there, cannot be read, or would be replaced by a result; or if the results of two
            would have one name.
        ModelError: As [`predict`] does.
        ValueError: If a setting is wrong, or `output_dir` cannot be written.
    """
    _check_batch_size(batch_size)
    config = model.model.config if isinstance(model, Predictor) else read_task(os.fspath(model))[0]
    if binary_masks:
        _check_two_classes(config)
    if getattr(config, "use_masks", False) or find_task(config).models == "universal segmenter":
        import faster_coco_eval  # noqa: F401 - which COCO's masks need, before any work is done
    files, folder = find_images(_list(images), output_dir), Path(output_dir)
    _check_outputs(files, folder)
    checked = [result.problem for result in check_images([file.path for file in files])]
    problems = [problem for problem in checked if problem]
    refuse_problems(problems, len(files), "images", skip_corrupt)
    files = [file for file, problem in zip(files, checked, strict=True) if not problem]
    predictor, writer = _get_predictor(model, settings), _Writer(folder, pictures, binary_masks, _number(files))
    with logging.tqdm(total=len(files), desc="predicting", delay=2) as bar:
        for file, image, prediction in _predict_files(predictor, files, batch_size, skip_corrupt):
            bar.update()
            if isinstance(prediction, ImageError):
                problems.append(str(prediction))
                continue
            writer.add(file, image, prediction)
            if report:
                bar.clear()
                report(f"{file.name}: {prediction.describe()}")
    if not writer.rows:
        raise ImageError(f"None of {len(problems)} images can be used: {problems[0]}")
    writer.finish()
    return Written(writer.rows, problems)


def _list(images: Any) -> list[Any]:
    return [images] if isinstance(images, str | os.PathLike | Image.Image) else list(images)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")


def _get_predictor(model: str | os.PathLike[str] | Predictor, settings: dict[str, Any]) -> Predictor:
    if isinstance(model, Predictor):
        return dataclasses.replace(model, **settings)
    return load_predictor(os.fspath(model), **settings)


def _check_two_classes(config: PreTrainedConfig) -> None:
    models, count = find_task(config).models, config.num_labels
    if models != "segmenter" or count != 2:
        raise ValueError(f"`binary_masks` is for a segmenter of two classes, got a {models} of {count}.")


def _check_outputs(files: Sequence[ImageFile], folder: Path) -> None:
    """Raises an error if the folder cannot be written, or an image is where a result would be."""
    if reason := why_unwritable(folder / _PICTURES):
        raise ValueError(f"`output_dir` {folder} cannot be written: {reason}.")
    known = {os.path.realpath(file.path): file for file in files}
    for file in files:
        for result in (f"{_PICTURES}/{file.stem}.jpg", *(f"{maps}/{file.stem}.png" for maps in _MAPS.values())):
            if (other := known.get(os.path.realpath(folder / result))) is not None:
                raise ImageError(f"{other.path} would be replaced by a result: choose another `output_dir`.")


def _number(files: Sequence[ImageFile]) -> dict[ImageFile, int]:
    """The id of each image: the number that its name is, as those of COCO's; from 1 where not all are such."""
    stems = [Path(file.name).stem for file in files]
    numbers = [int(stem) for stem in stems if stem.isascii() and stem.isdigit()]
    return dict(zip(files, numbers if len(set(numbers)) == len(files) else range(1, len(files) + 1), strict=True))


def _predict_files(
    predictor: Predictor, files: Sequence[ImageFile], batch_size: int, skip_corrupt: bool
) -> Iterator[tuple[ImageFile, Any, Prediction | ImageError]]:
    """Each file with its image and its prediction, or with what is wrong with it."""
    for start in range(0, len(files), batch_size):
        read = []
        for file in files[start : start + batch_size]:
            try:
                read.append((file, decode({"path": file.path}, file.path)))
            except ImageError as error:
                if not skip_corrupt:
                    raise
                yield file, None, error
        for (file, image), prediction in zip(read, _predict_batch(predictor, read, skip_corrupt), strict=True):
            yield file, image, prediction


def _predict_batch(
    predictor: Predictor, batch: Sequence[tuple[ImageFile, Image.Image]], skip_corrupt: bool
) -> list[Prediction | ImageError]:
    try:
        return list(predictor([image for _, image in batch], [file.path for file, _ in batch]))
    except ImageError as error:  # the image processor refuses one of them
        if not skip_corrupt:
            raise
        if len(batch) == 1:
            return [error]
        return [found for image in batch for found in _predict_batch(predictor, [image], skip_corrupt)]


@dataclass
class _Writer:
    """Writes what is predicted.

    Args:
        folder: Where to.
        pictures: Whether pictures are written.
        binary_masks: Whether label maps are of 0 and 255.
        image_ids: Of the images.
    """

    folder: Path
    pictures: bool
    binary_masks: bool
    image_ids: dict[ImageFile, int]

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.coco: list[dict[str, Any]] | None = None  # of detectors

    def add(self, file: ImageFile, image: Image.Image, prediction: Prediction) -> None:
        row = {"file_name": file.name, "width": image.width, "height": image.height}
        row |= {"summary": prediction.describe(), "predictions": prediction.to_list()}
        if self.pictures:
            row["picture"] = f"{_PICTURES}/{file.stem}.jpg"
            self._save(draw(image, prediction), row["picture"], quality=92)
        if isinstance(prediction, Segmentation):
            row["label_map"] = f"{_MAPS[self.binary_masks]}/{file.stem}.png"
            self._save(prediction.to_image(self.binary_masks), row["label_map"])
        if isinstance(prediction, Detections):
            self.coco = self.coco or []
            self.coco += _list_results(prediction, file.name, self.image_ids[file])
        self.rows.append(row)

    def _save(self, image: Image.Image, name: str, **options: Any) -> None:
        with atomic_file(self.folder / name) as partial:
            image.save(partial, **options)

    def finish(self) -> None:
        """Writes what is there of all images together."""
        files = {"predictions.json": self.rows} | ({} if self.coco is None else {"coco_results.json": self.coco})
        for name, content in files.items():
            with atomic_file(self.folder / name) as partial:
                partial.write_text(json.dumps(content, indent=1))


def _list_results(prediction: Detections, file_name: str, image_id: int) -> list[dict[str, Any]]:
    """COCO's results of an image, with the names of file and classes."""
    fields = {"scores": prediction.scores, "labels": prediction.labels, "boxes": prediction.boxes}
    if prediction.masks is not None:
        fields["masks"] = prediction.masks
    results = coco_results([fields], [image_id], range(len(prediction.label_names)))[image_id]
    names = prediction.label_names
    return [result | {"file_name": file_name, "category": names[result["category_id"]]} for result in results]
