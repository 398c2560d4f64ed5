"""Small videos whose frames can be told apart."""

from fractions import Fraction

import av
import numpy as np
from PIL import Image

RATE, SIZE = 25, (64, 48)


def draw_frame(number, size=SIZE):
    """From red to green, with a blue square in the upper left corner."""
    image = Image.new("RGB", size, (30 * number, 240 - 30 * number, 20))
    image.paste((0, 0, 255), (0, 0, 16, 16))
    return image


def find_number(image):
    """The number of a frame of [`draw_frame`], from the corner at the lower right."""
    red, green, _ = np.array(image, dtype=int)[-8:, -8:].mean(axis=(0, 1))
    assert abs(red + green - 240) < 20
    return round((red + 240 - green) / 60)


def write_clip(file, count=8, codec="libx264", rate=RATE, movflags="", **codec_options):
    with av.open(str(file), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream(codec, rate=Fraction(rate), options=codec_options)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for number in range(count):
            container.mux(stream.encode(av.VideoFrame.from_image(draw_frame(number))))
        container.mux(stream.encode(None))
    return file


def write_audio(file):
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))


def spoil_packet(file, number):
    """Overwrites the packet of the frame that is shown as this one."""
    with av.open(str(file)) as container:
        packets = sorted((packet.pts, packet.pos, packet.size) for packet in container.demux() if packet.size)
    _, start, size = packets[number]
    content = bytearray(file.read_bytes())
    content[start + 8 : start + size] = bytes(size - 8)
    file.write_bytes(content)
