"""Predictions of files: into memory, or as pictures, videos, label maps and json into a folder."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from PIL import Image
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..data.checks import refuse_problems
from ..data.images import ImageError
from ..evaluation.metrics import coco_results
from ..writing.files import atomic_file, why_unwritable
from .drawing import draw
from .loading import load_predictor, read_task
from .predictions import Detections, Prediction, Segmentation
from .predictor import Predictor, find_task
from .sources import ImageFile, ReadImage, check_sources, find_images, names_frame, read_images
from .videos import AddPicture, write_video

# One or several of: images, videos, folders and patterns; or also PIL images.
Sources: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"
Images: TypeAlias = "Sources | Image.Image | Sequence[str | os.PathLike[str] | Image.Image]"


# In the folder of the results. Maps by whether they are of 0 and 255.
_PICTURES = "pictures"
_MAPS = {False: "label_maps", True: "masks"}


class Written(NamedTuple):
    """What was written.

    Attributes:
        rows: Of each image, and each frame of a video, what `predictions.json` says.
        problems: Of each corrupt image, video or frame that was skipped what is wrong with it.
    """

    rows: list[dict[str, Any]]
    problems: list[str]


def predict(
    model: str | os.PathLike[str] | Predictor,
    images: Images,
    batch_size: int = 1,
    frame_interval: int = 1,
    **settings: Any,
) -> list[Prediction]:
    """Predicts what is in images.

    Args:
        model: A folder, a repository of the Hub, the name of a variant, or a [`Predictor`], which
            [`~pvt_hf.prediction.loading.load_predictor`] makes of them.
        images: One or several of: files, folders, patterns (`photos/*.jpg`), PIL images. Videos are those that are
            named, and those of patterns that end as they do (`clips/*.mp4`); they need the extra `video`.
        batch_size: How many images are computed at a time (default: 1).
        frame_interval: Of videos: every how many frames one is predicted, beginning with the first (default: 1, all).
        **settings: Of [`~pvt_hf.prediction.loading.load_predictor`], such as `device` and `threshold`; for a
            [`Predictor`] only its own.

    Returns:
        For each image, and each frame of a video, a [`Classification`], [`Detections`] or a [`Segmentation`], in the
        order of `images`, those of a folder or a pattern by their names.

    Raises:
        ImageError: If an image is not there or cannot be read.
        ModelError: If there is no such model, it predicts nothing, or tensors of it would be at random.
        ValueError: If a setting is wrong.
    """
    _check_at_least_1(batch_size=batch_size, frame_interval=frame_interval)
    found: list[Any] = []
    for image in _list(images):
        found += [image] if isinstance(image, Image.Image) else find_images([image], videos=True)
    for checked in check_sources([image for image in found if isinstance(image, ImageFile)]):
        if checked.problem:
            raise ImageError(checked.problem)
    predictor, predictions = _get_predictor(model, settings), []
    named = _name_images(found, frame_interval)
    while batch := list(itertools.islice(named, batch_size)):
        predictions += predictor([image for image, _ in batch], [name for _, name in batch])
    return predictions


def _name_images(images: Iterable[Image.Image | ImageFile], frame_interval: int) -> Iterator[tuple[Image.Image, str]]:
    """The images with names for messages."""
    for number, image in enumerate(images):
        if isinstance(image, Image.Image):
            yield image, f"image {number}"
            continue
        for read in read_images([image], frame_interval):
            if isinstance(read.image, ImageError):
                raise read.image
            yield read.image, read.add_frame(image.path)


def predict_to_folder(
    model: str | os.PathLike[str] | Predictor,
    images: Sources,
    output_dir: str | os.PathLike[str],
    batch_size: int = 1,
    pictures: bool = True,
    binary_masks: bool = False,
    skip_corrupt: bool = False,
    report: Callable[[str], None] | None = None,
    frame_interval: int = 1,
    **settings: Any,
) -> Written:
    """Predicts what is in images, and writes it: what `pvt-hf predict` does.

    Args:
        model: As [`predict`] takes it.
        images: One or several files, folders and patterns (`photos/*.jpg`), and videos as [`predict`] takes them. In
            `output_dir` none are looked for.
        output_dir: Gets `predictions.json`, a picture of each image in `pictures`, of segmenters a label map of each in
            `label_maps` (PNG, of the size of the image as it is seen), and of detectors `coco_results.json`. Of a video
            `clip.mp4` it gets those of each frame, called `clip/000000` and so on, and the video with what was found,
            `pictures/clip.mp4`.
        batch_size: How many images are computed at a time (default: 1).
        pictures: Whether pictures and videos are written (default: `True`).
        binary_masks: Of segmenters of two classes: write maps of 0 and 255, into `masks` (default: `False`).
        skip_corrupt: Whether corrupt images, videos and frames are skipped (default: `False`, an error).
        report: Is called with a line about each image (default: nothing is).
        frame_interval: Of videos: every how many frames one is predicted, beginning with the first (default: 1, all).
        **settings: As [`predict`] takes them.

    Raises:
        ImageError: If an image is not there, cannot be read, or would be replaced by a result; or if the results of two
            would have one name.
        ModelError: As [`predict`] does.
        ValueError: If a setting is wrong, or `output_dir` cannot be written.
    """
    _check_at_least_1(batch_size=batch_size, frame_interval=frame_interval)
    config = model.model.config if isinstance(model, Predictor) else read_task(os.fspath(model))[0]
    if binary_masks:
        _check_two_classes(config)
    if getattr(config, "use_masks", False) or find_task(config).models == "universal segmenter":
        import faster_coco_eval  # noqa: F401 - which COCO's masks need, before any work is done
    files, folder = find_images(_list(images), output_dir, videos=True), Path(output_dir)
    _check_outputs(files, folder)
    checked = check_sources(files)
    problems = [result.problem for result in checked if result.problem]
    subject = "images and videos" if any(file.is_video for file in files) else "images"
    refuse_problems(problems, len(files), subject, skip_corrupt)
    counts = {file: result.value for file, result in zip(files, checked, strict=True) if not result.problem}
    read = read_images(counts, frame_interval)
    found = _predict_images(_get_predictor(model, settings), read, batch_size, skip_corrupt)
    total = sum(-(-count // frame_interval) for count in counts.values())
    with (
        _Writer(folder, pictures, binary_masks, frame_interval) as writer,
        logging.tqdm(total=total, desc="predicting", delay=2) as bar,
    ):
        for image_id, (image, prediction) in zip(_number(counts), found, strict=False):
            bar.update()
            if isinstance(prediction, ImageError):
                problems.append(str(prediction))
                continue
            writer.add(image_id, image, prediction)
            if report:
                bar.clear()
                report(f"{image.add_frame(image.file.name)}: {prediction.describe()}")
    if not writer.rows:
        raise ImageError(f"None of {len(problems)} images can be used: {problems[0]}")
    writer.finish()
    return Written(writer.rows, problems)


def _list(images: Any) -> list[Any]:
    return [images] if isinstance(images, str | os.PathLike | Image.Image) else list(images)


def _check_at_least_1(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


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
    kinds = {_PICTURES: ".jpg"} | dict.fromkeys(_MAPS.values(), ".png")
    stills, videos = ([file.stem for file in files if file.is_video == is_video] for is_video in (False, True))
    results = [f"{kind}/{stem}{ending}" for kind, ending in kinds.items() for stem in stills]
    results += [f"{_PICTURES}/{stem}.mp4" for stem in videos]
    replaced = {os.path.realpath(folder / result) for result in results}
    # Frames are not counted yet: the folder and the ending of any number of them.
    frames = {(os.path.realpath(folder / kind / stem), ending) for kind, ending in kinds.items() for stem in videos}
    for file in files:
        path = Path(os.path.realpath(file.path))
        if str(path) in replaced or (names_frame(path.stem) and (str(path.parent), path.suffix) in frames):
            raise ImageError(f"{file.path} would be replaced by a result: choose another `output_dir`.")


def _number(files: Iterable[ImageFile]) -> Iterable[int]:
    """The ids of images: the numbers that their names are, as those of COCO's; from 1 where not all are such, or some
    are frames."""
    stems = [Path("a video" if file.is_video else file.name).stem for file in files]
    numbers = [int(stem) for stem in stems if stem.isascii() and stem.isdigit()]
    return numbers if len(set(numbers)) == len(stems) else itertools.count(1)


def _predict_images(
    predictor: Predictor, images: Iterator[ReadImage], batch_size: int, skip_corrupt: bool
) -> Iterator[tuple[ReadImage, Prediction | ImageError]]:
    """Each image with its prediction, or with what is wrong with it."""
    while batch := list(itertools.islice(images, batch_size)):
        problems = [image.image for image in batch if isinstance(image.image, ImageError)]
        if problems and not skip_corrupt:
            raise problems[0]
        readable = [image for image in batch if not isinstance(image.image, ImageError)]
        found = iter(_predict_batch(predictor, readable, skip_corrupt))
        for image in batch:
            yield image, image.image if isinstance(image.image, ImageError) else next(found)


def _predict_batch(
    predictor: Predictor, batch: Sequence[ReadImage], skip_corrupt: bool
) -> list[Prediction | ImageError]:
    try:
        return list(predictor([image.image for image in batch], [image.add_frame(image.file.path) for image in batch]))
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
        pictures: Whether pictures and videos are written.
        binary_masks: Whether label maps are of 0 and 255.
        frame_interval: Every how many frames of a video one is written.
    """

    folder: Path
    pictures: bool
    binary_masks: bool
    frame_interval: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    coco: list[dict[str, Any]] | None = None  # of detectors
    # The video that is written, and of which file.
    video: ExitStack = field(default_factory=ExitStack)
    video_of: ImageFile | None = None
    add_picture: AddPicture | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: Any) -> None:
        self.video.__exit__(*error)  # which leaves no half video

    def add(self, image_id: int, image: ReadImage, prediction: Prediction) -> None:
        names: dict[str, Any] = {"file_name": image.file.name}
        if image.frame is not None:
            names |= {"frame": image.frame.number, "time": image.frame.time}
        row = names | {"width": image.image.width, "height": image.image.height}
        row |= {"summary": prediction.describe(), "predictions": prediction.to_list()}
        if self.pictures:
            row["picture"] = f"{_PICTURES}/{image.stem}.jpg"
            picture = draw(image.image, prediction, steady=image.frame is not None)
            self._save(picture, row["picture"], quality=92)
            self._add_to_video(image, picture)
        if isinstance(prediction, Segmentation):
            row["label_map"] = f"{_MAPS[self.binary_masks]}/{image.stem}.png"
            self._save(prediction.to_image(self.binary_masks), row["label_map"])
        if isinstance(prediction, Detections):
            self.coco = self.coco or []
            self.coco += _list_results(prediction, names, image_id)
        self.rows.append(row)

    def _add_to_video(self, image: ReadImage, picture: Image.Image) -> None:
        """Adds a frame to the video of its file, before which the one of another file is finished."""
        if self.video_of != image.file:
            self.video.close()
            self.video_of = image.file
            if image.frame is not None:
                file, rate = self.folder / _PICTURES / f"{image.file.stem}.mp4", image.frame.rate / self.frame_interval
                self.add_picture = self.video.enter_context(write_video(file, rate))
        if image.frame is not None and self.add_picture is not None:
            self.add_picture(picture, image.frame.number // self.frame_interval)

    def _save(self, image: Image.Image, name: str, **options: Any) -> None:
        with atomic_file(self.folder / name) as partial:
            image.save(partial, **options)

    def finish(self) -> None:
        """Writes what is there of all images together."""
        files = {"predictions.json": self.rows} | ({} if self.coco is None else {"coco_results.json": self.coco})
        for name, content in files.items():
            with atomic_file(self.folder / name) as partial:
                partial.write_text(json.dumps(content, indent=1))


def _list_results(prediction: Detections, names: dict[str, Any], image_id: int) -> list[dict[str, Any]]:
    """COCO's results of an image, with the names of file, frame and classes."""
    fields = {"scores": prediction.scores, "labels": prediction.labels, "boxes": prediction.boxes}
    if prediction.masks is not None:
        fields["masks"] = prediction.masks
    results = coco_results([fields], [image_id], range(len(prediction.label_names)))[image_id]
    labels = prediction.label_names
    return [result | names | {"category": labels[result["category_id"]]} for result in results]
