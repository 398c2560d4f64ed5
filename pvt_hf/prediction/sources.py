"""The images that somebody names: files, folders and patterns, each with a name for what is written about it."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..data.images import IMAGE_ENDINGS, ImageError

_ENDINGS = ", ".join(sorted(IMAGE_ENDINGS))
_FRAMES = "make images of its frames first, for example with ffmpeg -i clip.mp4 frames/%06d.jpg"
_VIDEO_ENDINGS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"}


class ImageFile(NamedTuple):
    """An image on the disk.

    Attributes:
        path: Of the file.
        name: Its path in the folder that all images have in common, with `/`.
    """

    path: str
    name: str

    @property
    def stem(self) -> str:
        """The name without its ending, to which what is written about the image adds another."""
        return Path(self.name).with_suffix("").as_posix()


def find_images(
    sources: Sequence[str | os.PathLike[str]], skipped: str | os.PathLike[str] | None = None
) -> list[ImageFile]:
    """Finds the images that are named, each once.

    Args:
        sources: Files; folders, in which all files count whose names end as those of images; and patterns
            (`photos/*.jpg`, `photos/**/*.png`), of which files count in the same way.
        skipped: A folder in which nothing is looked for: that of the results (default: none).

    Returns:
        The images in the order of the sources, those of a folder or pattern by their names.

    Raises:
        ImageError: If a source is not there, is a video, or has no image, or if two images differ in their endings
            only.
    """
    found: dict[str, None] = {}
    roots = []
    for source in (os.fspath(given) for given in sources):
        root, paths = _search(source)
        if skipped is not None and not os.path.isfile(source):
            paths = [path for path in paths if not Path(path).resolve().is_relative_to(Path(skipped).resolve())]
        if not paths:
            raise ImageError(f"There are no images in {source}: their names end with {_ENDINGS}")
        found |= dict.fromkeys(map(os.path.abspath, paths))
        roots.append(os.path.abspath(root))
    if not found:
        raise ImageError("There are no images: files, folders or patterns are needed.")
    base = os.path.commonpath(roots)
    images = [ImageFile(path, Path(os.path.relpath(path, base)).as_posix()) for path in found]
    _check_stems(images)
    return images


def _search(source: str) -> tuple[str, list[str]]:
    """The folder of a source, and the images that it names."""
    if os.path.isdir(source):
        return source, _select(Path(source).rglob("*"))
    if os.path.lexists(source):
        if Path(source).suffix.lower() in _VIDEO_ENDINGS:
            raise ImageError(f"{source} is a video: {_FRAMES}")
        return os.path.dirname(source) or ".", [source]
    if glob.has_magic(source):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(source).parts))
        matches = list(map(Path, glob.glob(source, recursive=True)))
        inside = [path for match in matches if match.is_dir() for path in match.rglob("*")]
        return str(root), _select([*matches, *inside])
    raise ImageError(f"{source} is not there: images are files, folders or patterns such as 'photos/*.jpg'.")


def _select(paths: Iterable[Path]) -> list[str]:
    """Those that are named as images are, and not hidden."""
    chosen = {str(path) for path in paths if path.suffix.lower() in IMAGE_ENDINGS and path.name[0] != "."}
    return sorted(chosen)


def _check_stems(images: Sequence[ImageFile]) -> None:
    """Raises an error if what is written about one image would replace what is written about another."""
    known: dict[str, ImageFile] = {}
    for image in images:
        other = known.setdefault(image.stem.casefold(), image)  # not all file systems tell a from A
        if other is not image:
            raise ImageError(
                f"{other.name} and {image.name} differ in their endings only: the results of one would replace those "
                "of the other. Rename one, or predict them into folders of their own."
            )
