"""Videos: counted without decoding, read frame by frame, and written, by PyAV, which is FFmpeg."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from ..data.images import ImageError, check_source
from ..writing.files import atomic_file

# Of the files that are taken for videos, and what they may be, by FFmpeg's names: of others, such as playlists, the
# content says which files and addresses are opened.
VIDEO_ENDINGS = {".asf", ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
_FORMATS = "mov,matroska,avi,mpeg,mpegvideo,mpegts,asf"
_CODECS = ("libx264", "mpeg4")  # which is written: the first that there is
# What a container's display matrix makes of x and of y, each as (x, y), by the signs of its numbers.
_TURNS: dict[tuple[int, ...], Image.Transpose] = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # clockwise, as telephones that are held upright
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}

# Adds a picture to a video: the picture, and its number, from 0.
AddPicture: TypeAlias = Callable[[Image.Image, int], None]


class Frame(NamedTuple):
    """Which frame of a video an image is.

    Attributes:
        number: From 0.
        time: In seconds from the first frame.
        rate: Frames of the video in a second, on average.
    """

    number: int
    time: float
    rate: Fraction

    def __str__(self) -> str:
        return f"frame {self.number} ({self.time:.2f} s)"


def count_frames(path: str) -> int:
    """How many frames a video has: about, since nothing is decoded.

    Args:
        path: Of the file.

    Raises:
        ImageError: If it is no video that can be decoded, has no frames, or is truncated.
    """
    with _open(path) as (container, stream):
        count, cut, end = 0, False, 0.0
        for packet in container.demux():
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == stream.index and packet.size and not packet.is_discard:
                count, cut = count + 1, packet.is_corrupt
        # In seconds: only Matroska and WebM do not say that a packet is cut, but how long they are.
        length = (container.duration or 0) / 1e6 if container.format.name.startswith("matroska") else end
    if not count:
        raise ImageError(f"{path} has no frames.")
    if cut or length - end > max(1, 0.05 * length):
        raise ImageError(f"{path} is truncated: it ends after {end:.2f} s, in frame {count - 1} or after it.")
    return count


def read_frames(path: str, interval: int = 1) -> Iterator[tuple[Frame, Image.Image | ImageError]]:
    """Reads a video frame by frame.

    Args:
        path: Of the file.
        interval: Every how many frames one is taken, beginning with the first (default: 1, all).

    Returns:
        Each frame in the order in which they are shown, RGB, turned as the container says; or, also of those between,
        what is wrong with one.

    Raises:
        ImageError: If the file is no video that can be decoded, or cannot be read any further.
    """
    with _open(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        start = frame = None
        for number, (time, found) in enumerate(_decode(container, stream)):
            start = time if start is None else start
            frame = Frame(number, float(number / rate) if time is None else round(time - (start or 0), 6), rate)
            if isinstance(found, Exception) or found.is_corrupt:
                reason = _explain(found) if isinstance(found, Exception) else "parts of it are missing"
                yield frame, ImageError(f"{path}, {frame} cannot be decoded: {reason}.")
            elif number % interval == 0:
                yield frame, _turn(found)
    if frame is None:
        raise ImageError(f"{path} has no frame that can be decoded.")


@contextmanager
def _open(path: str) -> Iterator[tuple[Any, Any]]:
    """A container and its video. What goes wrong with it is an error that names it."""
    import av

    try:
        with av.open(check_source(path), options={"format_whitelist": _FORMATS}) as container:
            yield container, _find_stream(container, path)
    except (OSError, av.error.FFmpegError) as error:
        raise ImageError(f"{path} cannot be read: {_explain(error)}.") from error


def _explain(error: Exception) -> str:
    """What PyAV or the system says, without the number and the path."""
    return getattr(error, "strerror", None) or str(error)


def _find_stream(container: Any, path: str) -> Any:
    from av.stream import Disposition

    stream = container.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:  # the cover of a record
        kinds = ", ".join(sorted({other.type for other in container.streams} - {"video"}))
        raise ImageError(f"{path} has no video{f', only {kinds}' if kinds else ''}.")
    if stream.codec_context is None:
        raise ImageError(f"{path} has a video of a codec that PyAV cannot decode.")
    return stream


def _decode(container: Any, stream: Any) -> Iterator[tuple[float | None, Any]]:
    """The time in seconds of each frame, and the frame or an error in its place, in the order of their times."""
    import av

    failed: list[tuple[float, Exception]] = []
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            # Packets come before others that are shown earlier, and frames some packets later.
            stamp = packet.dts if packet.pts is None else packet.pts
            failed.append((float((stamp or 0) * packet.time_base), error))
            failed.sort(key=lambda failure: failure[0])
            continue
        for frame in frames:
            while failed and (frame.time is None or failed[0][0] < frame.time):
                yield failed.pop(0)
            yield frame.time, frame
    yield from failed


def _turn(frame: Any) -> Image.Image:
    """A frame as it is seen."""
    image = frame.to_image()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32) / 2**16
    turn = _TURNS.get(tuple(round(float(number)) for number in (a, b, c, d)))
    return image if turn is None else image.transpose(turn)


@contextmanager
def write_video(path: Path, rate: Fraction) -> Iterator[AddPicture]:
    """Writes an mp4, H.264 if there is an encoder, else MPEG-4. It is there when it is complete.

    Args:
        path: Of the file.
        rate: Pictures in a second.

    Returns:
        A function that adds a picture at its number, in their order. All of them get the size of the first.
    """
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    codec = next(name for name in _CODECS if name in av.codecs_available)
    step = (1 / rate).limit_denominator(65535)  # seconds; MPEG-4 has no finer ones
    options, size = {"movflags": "faststart"}, None  # for players that read from the beginning
    with atomic_file(path) as partial, av.open(str(partial), "w", "mp4", options=options) as container:
        stream = container.add_stream(codec, rate=1 / step)
        stream.pix_fmt = "yuv420p"  # which every player knows
        # Where a file does not say how its colours are meant, players guess.
        encoder = stream.codec_context
        encoder.colorspace, encoder.color_range = Colorspace.ITU709, ColorRange.MPEG
        encoder.color_primaries, encoder.color_trc = ColorPrimaries.BT709, ColorTrc.BT709

        def add(picture: Image.Image, number: int) -> None:
            nonlocal size
            if size is None:
                size = picture.size
                stream.width, stream.height = (side + side % 2 for side in size)  # of yuv420p they are even
            fitting = picture if picture.size == size else ImageOps.pad(picture, size)
            frame = av.VideoFrame.from_image(fitting.crop((0, 0, stream.width, stream.height)))
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace=Colorspace.ITU709)
            frame.pts, frame.time_base = number, step
            container.mux(stream.encode(frame))

        yield add
        container.mux(stream.encode(None))
