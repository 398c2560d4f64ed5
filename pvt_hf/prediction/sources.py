"""The images and videos that somebody names: files, folders and patterns, each with a name for what is written."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data.checks import Checked, check_all, check_images
from ..data.images import IMAGE_ENDINGS, ImageError, decode
from .videos import VIDEO_ENDINGS, Frame, count_frames, read_frames

_ENDINGS = ", ".join(sorted(IMAGE_ENDINGS))
_ONE_NAME = (
    "the results of one would replace those of the other. Rename one, or predict them into folders of their own."
)


class ImageFile(NamedTuple):
    """An image or a video on the disk.

    Attributes:
        path: Of the file.
        name: Its path in the folder that all of them have in common, with `/`.
    """

    path: str
    name: str

    @property
    def stem(self) -> str:
        """The name without its ending, to which what is written about it adds another."""
        return Path(self.name).with_suffix("").as_posix()

    @property
    def is_video(self) -> bool:
        """Whether it has frames."""
        return _is_video(self.path)

    @property
    def results(self) -> tuple[str, str]:
        """What is written about it: picture and map of an image; of a video the video and the folder of its frames."""
        return (f"{self.stem}.mp4", self.stem) if self.is_video else (f"{self.stem}.jpg", f"{self.stem}.png")


class ReadImage(NamedTuple):
    """An image of a file, or a frame of a video.

    Attributes:
        file: Where it is.
        image: PIL, RGB, as it is seen; or an `ImageError`, what is wrong with it.
        frame: Of a video, which one it is (default: `None`, of an image).
    """

    file: ImageFile
    image: Any
    frame: Frame | None = None

    @property
    def stem(self) -> str:
        """To which what is written about it adds an ending: `clip/000012` of a frame."""
        return f"{self.file.stem}/{self.frame.number:06}" if self.frame else self.file.stem

    def add_frame(self, name: str) -> str:
        """The name or the path of the file, with the frame behind it."""
        return f"{name}, {self.frame}" if self.frame else name


def find_images(
    sources: Sequence[str | os.PathLike[str]],
    skipped: str | os.PathLike[str] | None = None,
    videos: bool = False,
) -> list[ImageFile]:
    """Finds the images that are named, each once.

    Args:
        sources: Files; folders, in which all files count whose names end as those of images; and patterns
            (`photos/*.jpg`, `photos/**/*.png`), of which files count in the same way.
        skipped: A folder in which nothing is looked for: that of the results (default: none).
        videos: Whether videos count that are named, and those of patterns that end as they do, `clips/*.mp4` (default:
            `False`, they are an error).

    Returns:
        The images in the order of the sources, those of a folder or pattern by their names.

    Raises:
        ImageError: If a source is not there, has no image, or is a video where they do not count, or if the results of
            two would have one name.
    """
    found: dict[str, None] = {}
    roots = []
    for source in (os.fspath(given) for given in sources):
        root, paths = _search(source)
        if skipped is not None and not os.path.isfile(source):
            paths = [path for path in paths if not Path(path).resolve().is_relative_to(Path(skipped).resolve())]
        _check_found(source, paths, videos)
        found |= dict.fromkeys(map(os.path.abspath, paths))
        roots.append(os.path.abspath(root))
    if not found:
        raise ImageError("There are no images: files, folders or patterns are needed.")
    base = os.path.commonpath(roots)
    images = [ImageFile(path, Path(os.path.relpath(path, base)).as_posix()) for path in found]
    _check_stems(images)
    return images


def check_sources(files: Sequence[ImageFile]) -> list[Checked]:
    """Checks that images can be opened and videos be read to their ends. Nothing is decoded.

    Args:
        files: As [`find_images`] finds them.

    Returns:
        Of each its problem, or how many images it is, of a video about.
    """
    videos = iter(check_all(count_frames, [file.path for file in files if file.is_video], "frames of videos"))
    images = iter(check_images([file.path for file in files if not file.is_video]))
    return [next(videos) if file.is_video else next(images)._replace(value=1) for file in files]


def read_images(files: Iterable[ImageFile], frame_interval: int = 1) -> Iterator[ReadImage]:
    """Reads one image after the other.

    Args:
        files: As [`find_images`] finds them.
        frame_interval: Of videos: every how many frames one is taken (default: 1, all).
    """
    for file in files:
        try:
            if file.is_video:
                for frame, image in read_frames(file.path, frame_interval):
                    yield ReadImage(file, image, frame)
            else:
                yield ReadImage(file, decode({"path": file.path}, file.path))
        except ImageError as error:
            yield ReadImage(file, error)


def names_frame(name: str) -> bool:
    """Whether a frame of a video may be called so.

    Args:
        name: Without an ending.
    """
    return re.fullmatch("[0-9]{6}|[1-9][0-9]{6,}", name) is not None


def _is_video(path: str) -> bool:
    return Path(path).suffix.lower() in VIDEO_ENDINGS


def _search(source: str) -> tuple[str, list[str]]:
    """The folder of a source, and the images that it names."""
    if os.path.isdir(source):
        return source, _select(Path(source).rglob("*"), IMAGE_ENDINGS)
    if os.path.lexists(source):
        return os.path.dirname(source) or ".", [source]
    if glob.has_magic(source):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(source).parts))
        matches = list(map(Path, glob.glob(source, recursive=True)))
        inside = [path for match in matches if match.is_dir() for path in match.rglob("*")]
        return str(root), _select([*matches, *inside], VIDEO_ENDINGS if _is_video(source) else IMAGE_ENDINGS)
    raise ImageError(f"{source} is not there: images are files, folders or patterns such as 'photos/*.jpg'.")


def _select(paths: Iterable[Path], endings: set[str]) -> list[str]:
    """Those whose names end so, and are not hidden."""
    chosen = {str(path) for path in paths if path.suffix.lower() in endings and path.name[0] != "."}
    return sorted(chosen)


def _check_found(source: str, paths: Sequence[str], videos: bool) -> None:
    """Raises an error if a source has nothing that counts."""
    if not videos and (named := next(filter(_is_video, paths), None)):
        raise ImageError(f"{named} is a video: images are needed.")
    if paths:
        return
    hint = ""
    if videos:
        others = Path(source).rglob("*") if os.path.isdir(source) else map(Path, glob.glob(source, recursive=True))
        for video in map(Path, _select(others, VIDEO_ENDINGS)[:1]):
            hint = f". Videos have to be named, as {video} or as '{video.parent}/*{video.suffix}'"
    raise ImageError(f"There are no images in {source}: their names end with {_ENDINGS}{hint}")


def _check_stems(images: Sequence[ImageFile]) -> None:
    """Raises an error if what is written about one image would replace what is written about another."""
    known: dict[str, ImageFile] = {}
    for image in images:
        for result in image.results:
            other = known.setdefault(result.casefold(), image)  # not all file systems tell a from A
            if other is not image:
                raise ImageError(f"{other.name} and {image.name} differ in their endings only: {_ONE_NAME}")
    for image in images:
        folder, _, name = image.stem.casefold().rpartition("/")
        if names_frame(name) and folder in known:
            raise ImageError(f"{image.name} is called as the frames of {known[folder].name} are: {_ONE_NAME}")
