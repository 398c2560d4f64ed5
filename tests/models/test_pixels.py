"""Pixels of any type, range and layout: the same image by every processor, or an error or a warning."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image
from transformers.utils import logging

import pvt_hf

CROP = {"size": 18, "crop_size": 16, "do_resize": False}
PROCESSORS = [
    pvt_hf.PvtImageProcessor(**CROP),
    pvt_hf.PvtImageProcessorPil(**CROP),
    pvt_hf.PvtDetectionImageProcessor(do_resize=False),
    pvt_hf.PvtDetectionImageProcessorPil(do_resize=False),
    pvt_hf.PvtSegmentationImageProcessor(do_resize=False),
    pvt_hf.PvtSegmentationImageProcessorPil(do_resize=False),
]
BACKENDS = pytest.mark.parametrize("process", PROCESSORS, ids=lambda process: type(process).__name__)
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
GREY = COLOURS[..., 0]
ALPHA = np.random.default_rng(1).integers(0, 256, (16, 20, 1), dtype=np.uint8)


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy())


def palette(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels).convert("P")
    image.putpalette([level for level in range(256) for _ in range(3)])
    image.info["transparency"] = bytes(range(256))
    return image


# What COLOURS, and GREY, may look like.
COLOURED = {
    "turned BGR": COLOURS[..., ::-1].copy()[..., ::-1],
    "flipped": COLOURS[::-1, ::-1].copy()[::-1, ::-1],
    "channels first": COLOURS.transpose(2, 0, 1),
    "Fortran": np.asfortranarray(COLOURS),
    "read only": np.asarray(Image.fromarray(COLOURS)),
    "uint16": COLOURS.astype(np.uint16) * 256 + 77,
    "big-endian": (COLOURS.astype(np.uint16) * 256 + 77).astype(">u2"),
    "uint16 tensor": (tensor(COLOURS).int() * 256 + 77).to(torch.uint16),
    "int64": COLOURS.astype(np.int64),
    "uint32": COLOURS.astype(np.uint32),
    "float32": COLOURS.astype(np.float32),
    "float16": COLOURS.astype(np.float16),
    "bfloat16 tensor": tensor(COLOURS).bfloat16(),
    "tensor with gradient": tensor(COLOURS).permute(2, 0, 1).float().requires_grad_(),
    "alpha array": np.concatenate([COLOURS, ALPHA], axis=-1),
    "alpha": Image.fromarray(np.concatenate([COLOURS, ALPHA], axis=-1)),
}
GREYS = {
    "array": GREY,
    "tensor": tensor(GREY),
    "one channel": GREY[None],
    "one channel last": tensor(GREY)[..., None],
    "uint16": GREY.astype(np.uint16) * 256 + 77,
    "I;16": Image.fromarray(GREY.astype(np.uint16) * 256 + 77),
    "I": Image.fromarray(GREY.astype(np.int32) * 256 + 77),
    "LA": Image.fromarray(np.concatenate([GREY[..., None], ALPHA], axis=-1)),
    "P": palette(GREY),
    "CMYK": Image.fromarray(np.stack([255 - GREY, 255 - GREY, 255 - GREY, np.zeros_like(GREY)], -1), mode="CMYK"),
    "YCbCr": Image.fromarray(GREY).convert("YCbCr"),
}


@pytest.fixture
def warnings(caplog):
    logging.warning_once.cache_clear()
    return caplog


@pytest.mark.filterwarnings("error")
@BACKENDS
@pytest.mark.parametrize("pixels", [COLOURS, GREY], ids=["colours", "grey"])
def test_pixels_of_every_type_are_the_same_image(process, pixels, warnings):
    expected = process(Image.fromarray(pixels), return_tensors="pt").pixel_values
    given = COLOURED if pixels is COLOURS else GREYS
    for name, image in given.items():
        actual = process(image, return_tensors="pt").pixel_values
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    mixed = [
        *given.values(),
        [Image.fromarray(pixels)],
        np.stack([pixels[..., None] if pixels is GREY else pixels] * 2),
    ]
    batch = process(tuple(mixed), return_tensors="pt").pixel_values
    torch.testing.assert_close(batch, expected.expand(len(given) + 3, -1, -1, -1), rtol=0, atol=1e-6)
    assert not warnings.text


@BACKENDS
def test_bool_is_black_and_white(process):
    mask = GREY > 128
    expected = process(Image.fromarray(mask.astype(np.uint8) * 255), return_tensors="pt").pixel_values
    for given in (mask, tensor(mask), Image.fromarray(mask), mask[..., None]):
        assert torch.equal(process(given, return_tensors="pt").pixel_values, expected)
        assert torch.equal(process(given, return_tensors="pt", do_convert_rgb=True).pixel_values, expected)


@BACKENDS
def test_fractions_without_rescaling(process, warnings):
    """The same image, and a warning, once, where it would be divided by 255 again."""
    fractions = COLOURS.astype(np.float32) / 255
    expected = process(COLOURS, return_tensors="pt").pixel_values
    actual = process(fractions, do_rescale=False, return_tensors="pt").pixel_values
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert not warnings.text
    process([fractions, np.zeros_like(fractions)])
    process(fractions)
    assert warnings.text.count("in [0, 1], which `do_rescale` divides by 255 once more") == 1


WRONG = {
    "NaN": (np.full((9, 8, 3), np.nan), "has pixels that are NaN or infinite"),
    "infinite": (torch.full((3, 9, 8), torch.inf), "has pixels that are NaN or infinite"),
    "normalised": (COLOURS / 64 - 2, r"has values in \[-2, 1.98438\] .*must have them in \[0, 255\]"),
    "16 bits in float": (np.full((9, 8, 3), 65535.0), r"has values in \[65535, 65535\]"),
    "16 bits in int32": (np.full((9, 8, 3), 300, np.int32), r"has values in \[300, 300\] .*read from uint16"),
    "negative": (np.full((9, 8, 3), -1), r"has values in \[-1, -1\]"),
    "F": (Image.fromarray(GREY.astype(np.float32)), "has floating-point pixels .*mode 'F'"),
    "I": (Image.fromarray(np.full((9, 8), 70000, np.int32)), r"has values in \[70000, 70000\] \(PIL's mode 'I'\)"),
    "La": (Image.new("La", (9, 8)), "has PIL's mode 'La', which cannot become RGB"),
    "empty array": (np.zeros((0, 8, 3), np.uint8), r"has no pixels: its shape is \[0, 8, 3\]"),
    "empty image": (Image.new("RGB", (0, 8)), r"has no pixels: its size \(width x height\) is 0 x 8"),
    "complex": (np.zeros((9, 8, 3), complex), "has dtype complex128"),
    "two channels": (np.zeros((2, 9, 8), np.uint8), r"has shape \[2, 9, 8\]: .*`input_data_format`"),
    "one dimension": (np.zeros(9, np.uint8), r"has shape \[9\]: it must have two or three"),
    "None": (None, "must be a PIL image, an array or a tensor, got NoneType"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_pixels_are_refused_by_name(case):
    image, message = WRONG[case]
    for process in PROCESSORS:
        with pytest.raises((ValueError, TypeError), match=f"Image number 1 {message}"):
            process([COLOURS, image])
    with pytest.raises((ValueError, TypeError), match=f"Image 17 {message}"):
        PROCESSORS[2]([image], annotations={"image_id": 17, "annotations": []})


@BACKENDS
def test_channels_first_or_last(process, warnings):
    wide = np.random.default_rng(2).integers(0, 256, (3, 16, 3), dtype=np.uint8)
    last = process(wide, input_data_format="channels_last", return_tensors="pt").pixel_values
    assert torch.equal(last, process(Image.fromarray(wide), return_tensors="pt").pixel_values)
    assert not warnings.text
    first = process(wide, return_tensors="pt").pixel_values
    assert torch.equal(first, process(wide, input_data_format="channels_first", return_tensors="pt").pixel_values)
    assert warnings.text.count("of shape [3, 16, 3] may have its channels first or last") == 1
    with pytest.raises(ValueError, match=r"has 16 channels with `input_data_format` 'channels_first'"):
        process(COLOURS, input_data_format="channels_first")
    with pytest.raises(ValueError, match="`input_data_format` must be one of .*got 'last'"):
        process(COLOURS, input_data_format="last")
    with pytest.raises(ValueError, match="`images` must have at least one image"):
        process([])


def test_channels_are_kept_without_conversion():
    pixels = np.random.default_rng(3).integers(0, 256, (7, 16, 16), dtype=np.uint8)
    settings = {"do_convert_rgb": False, "image_mean": [0.5] * 7, "image_std": [0.5] * 7, "return_tensors": "pt"}
    for process in PROCESSORS[:2]:
        actual = process(pixels, input_data_format="channels_first", **settings).pixel_values[0]
        torch.testing.assert_close(actual, torch.from_numpy(pixels) / 127.5 - 1)


def test_16_bits_that_hold_fewer_are_told(warnings):
    for _ in range(2):
        PROCESSORS[0](GREY.astype(np.uint16) * 16)
    assert warnings.text.count("16 bits without a value over 4095") == 1
    PROCESSORS[0](np.zeros((16, 16), np.uint16))


@BACKENDS
def test_files_are_read_as_pipelines_read_them(process, tmp_path, warnings):
    """Upright and without transparency; opened files are taken as they are stored, with a warning."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, pixels, options in (("a.jpg", COLOURS, {"exif": exif}), ("b.png", COLOURED["alpha array"], {})):
        path = tmp_path / name
        Image.fromarray(pixels).save(path, **options)
        expected = process(load_image(str(path)), return_tensors="pt").pixel_values
        for given in (path, str(path)):
            assert torch.equal(process(given, return_tensors="pt").pixel_values, expected)
        assert "EXIF" not in warnings.text
    with Image.open(tmp_path / "a.jpg") as opened:
        stored = process([opened, opened], return_tensors="pt").pixel_values
        assert torch.equal(stored[1:], process(np.asarray(opened), return_tensors="pt").pixel_values)
    assert warnings.text.count("whose EXIF says that they are to be turned") == 1
    with pytest.raises(ValueError, match="none.png"):
        process(str(Path(tmp_path) / "none.png"))
