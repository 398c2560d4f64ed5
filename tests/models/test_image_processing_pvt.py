"""`PvtImageProcessor` on both backends against torchvision's pipeline of the papers' evaluation."""

import functools
import json
import re

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, pil_torch_interpolation_mapping
from transformers.models.pvt import image_processing_pil_pvt, image_processing_pvt

import pvt_hf
from pvt_hf.models.image_processing_pvt import _PvtPreprocessing

BACKENDS = pytest.mark.parametrize("processor_class", [pvt_hf.PvtImageProcessor, pvt_hf.PvtImageProcessorPil])


def photo(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Structure at several scales, so that filter and position matter."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3))
    waves = np.stack([np.sin(x / 7 + y / 11), np.cos(x / 3), np.sin(y / 5)], axis=-1)
    return Image.fromarray((90 + 90 * waves + noise).clip(0, 255).astype(np.uint8)).convert(mode)


def papers_pixels(image: Image.Image, resize: int = 256, crop: int = 224) -> torch.Tensor:
    return transforms.Compose(
        [
            transforms.Resize(resize, interpolation=InterpolationMode.BICUBIC),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )(image.convert("RGB"))


def assert_same(pixels: torch.Tensor, expected: torch.Tensor, processor_class) -> None:
    """To rounding on PIL; on torchvision a grey level here and there, and two in a handful of values."""
    if processor_class is pvt_hf.PvtImageProcessorPil:
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
        return
    grey_levels = (pixels - expected).abs() * torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None] * 255
    assert grey_levels.max() < 2.01 and (grey_levels > 1.01).float().mean() < 1e-4


class PlainProcessor(_PvtPreprocessing, TorchvisionBackend):
    """With the settings of ours, and nothing of its own after the pixels are read but the crop."""

    center_crop = pvt_hf.PvtImageProcessor.center_crop


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_center_crop": False, "size": {"height": 30, "width": 45}},
        {"do_resize": False, "crop_size": 51},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"return_tensors": "np"},
    ],
    ids=str,
)
def test_values_have_the_bits_of_the_backend(settings):
    """In planes and without copies, for one image and for several, of every type."""
    rgb = np.array(photo(40, 50))
    given = [photo(40, 50), rgb, rgb / np.float32(1.5), torch.from_numpy(rgb).permute(2, 0, 1), photo(47, 36)]
    settings = {"return_tensors": "pt"} | settings
    process, expect = (processor_class(crop_size=28) for processor_class in (pvt_hf.PvtImageProcessor, PlainProcessor))
    for images in (*([image] for image in given), given[:2], given):
        pixels, expected = (processor(images, **settings)["pixel_values"] for processor in (process, expect))
        assert type(pixels) is type(expected) and pixels.dtype == expected.dtype
        np.testing.assert_array_equal(pixels, expected)
        assert pixels.is_contiguous() if isinstance(pixels, torch.Tensor) else pixels.flags.c_contiguous
    assert np.array_equal(given[1], np.array(photo(40, 50)))  # nothing is written to what was given
    ragged = [processor(given, do_center_crop=False)["pixel_values"] for processor in (process, expect)]
    for pixels, expected in zip(*ragged, strict=True):
        np.testing.assert_array_equal(pixels, expected)


# The widths leave 0, 1, 2 and 3 odd pixels to the crop, which is where its rounding shows.
@BACKENDS
@pytest.mark.parametrize("height", [256, 300, 60])
@pytest.mark.parametrize("width", [256, 257, 258, 259, 400, 90])
def test_equals_the_papers_pipeline(processor_class, height, width):
    image = photo(height, width)
    pixels = processor_class()(image, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 224, 224) and pixels.dtype == torch.float32
    assert_same(pixels[0], papers_pixels(image), processor_class)
    if processor_class is pvt_hf.PvtImageProcessor:  # and nothing but its own resize of tensors apart from PIL's
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        resized = functional.resize(tensor, 256, InterpolationMode.BICUBIC, antialias=True)
        cropped = functional.center_crop(resized, 224) / 255
        expected = functional.normalize(cropped, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        torch.testing.assert_close(pixels[0], expected, rtol=0, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize(
    ("arguments", "resize", "crop"),
    [({"crop_size": 384}, 438, 384), ({"size": {"shortest_edge": 512}}, 512, 448)],
    ids=str,
)
def test_size_and_crop_scale_together(processor_class, arguments, resize, crop, tmp_path):
    image = photo(500, 700)
    expected = papers_pixels(image, resize, crop)
    for processor, call in ((processor_class(**arguments), {}), (processor_class(), arguments)):
        pixels = processor(image, return_tensors="pt", **call).pixel_values[0]
        assert_same(pixels, expected, processor_class)
    processor_class(**arguments).save_pretrained(tmp_path)
    assert processor_class.from_pretrained(tmp_path).to_dict() == processor_class(**arguments).to_dict()


@BACKENDS
@pytest.mark.parametrize(
    ("arguments", "size", "crop_size", "crops"),
    [
        ({"crop_size": 448}, {"shortest_edge": 512}, {"height": 448, "width": 448}, True),
        ({"size": {"shortest_edge": 438}}, {"shortest_edge": 438}, {"height": 384, "width": 384}, True),
        ({"size": 384}, {"height": 384, "width": 384}, {"height": 384, "width": 384}, False),
        ({"size": {"height": 384, "width": 384}}, {"height": 384, "width": 384}, {"height": 384, "width": 384}, False),
        ({"crop_size": (192, 224)}, {"shortest_edge": 256}, {"height": 192, "width": 224}, True),
        ({"crop_size": 192, "do_center_crop": False}, {"shortest_edge": 219}, {"height": 192, "width": 192}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("source", ["own", "hub"])
def test_size_and_crop_scale_together_when_loading(
    processor_class, source, arguments, size, crop_size, crops, tmp_path
):
    saved = processor_class() if source == "own" else processor_class(size={"height": 224, "width": 224})
    saved.save_pretrained(tmp_path)
    loaded = processor_class.from_pretrained(tmp_path, **arguments)
    assert (dict(loaded.size), dict(loaded.crop_size), loaded.do_center_crop) == (size, crop_size, crops)
    called = saved(photo(500, 700), return_tensors="pt", **arguments).pixel_values
    torch.testing.assert_close(called, loaded(photo(500, 700), return_tensors="pt").pixel_values, rtol=0, atol=0)


@BACKENDS
def test_size_and_crop_given_apart_are_kept(processor_class):
    processor = processor_class(size={"shortest_edge": 248}, crop_size=224)
    assert (dict(processor.size), dict(processor.crop_size)) == (
        {"shortest_edge": 248},
        {"height": 224, "width": 224},
    )


@BACKENDS
@pytest.mark.parametrize("side", [224, 384])
def test_preprocessor_config_of_the_hub_turns_the_crop_off(processor_class, side, tmp_path):
    """Square resize and no crop, bilinear, as OpenGVLab's and Xrenya's files say."""
    hub = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(IMAGENET_DEFAULT_MEAN),
        "image_processor_type": "PvtImageProcessor",
        "image_std": list(IMAGENET_DEFAULT_STD),
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(hub))
    backend = "pil" if processor_class is pvt_hf.PvtImageProcessorPil else "torchvision"
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(processor) is processor_class
    image = photo(300, 500)
    squashed = transforms.Compose(
        [
            transforms.Resize((side, side), interpolation=InterpolationMode.BILINEAR),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )(image)
    pixels = processor(image, return_tensors="pt").pixel_values[0]
    assert_same(pixels, squashed, processor_class)


# Files in every form that sizes have had, and the size of what they make of a photo of 60 x 90.
FILES_OF_TRANSFORMERS = {
    "v1 checkpoints": ({"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "size": 24}, (24, 24)),
    "tuple": ({"size": [24, 32]}, (24, 32)),
    "sides": ({"size": {"height": 24, "width": 32}}, (24, 32)),
    "both edges": ({"size": {"shortest_edge": 32, "longest_edge": 36}}, (24, 36)),
    "limits": ({"size": {"max_height": 50, "max_width": 30}}, (20, 30)),
    "edge": ({"size": {"shortest_edge": 32}, "do_center_crop": False}, (32, 48)),
    "integer edge": ({"size": 32, "default_to_square": False, "do_center_crop": False}, (32, 48)),
    "DeiT": ({"size": 32, "crop_size": 28, "do_center_crop": True, "resample": 3}, (28, 28)),
    "crop of two sides": ({"size": [32, 40], "crop_size": [28, 20], "do_center_crop": True}, (28, 20)),
    "feature extractor": ({"feature_extractor_type": "ViTFeatureExtractor", "size": 24, "resample": 2}, (24, 24)),
    "nulls": ({"size": {"height": 24, "width": 24}, "crop_size": None, "do_center_crop": None}, (24, 24)),
}


@BACKENDS
@pytest.mark.parametrize("form", FILES_OF_TRANSFORMERS)
def test_sizes_of_every_form_are_those_of_transformers(processor_class, form):
    """Read from a file, given to the constructor, over the settings of a file, and given to a call."""
    file, size = FILES_OF_TRANSFORMERS[form]
    theirs = {
        pvt_hf.PvtImageProcessor: image_processing_pvt.PvtImageProcessor,
        pvt_hf.PvtImageProcessorPil: image_processing_pil_pvt.PvtImageProcessorPil,
    }[processor_class]
    expected = theirs.from_dict(file)(photo(60, 90), return_tensors="pt").pixel_values
    assert expected.shape == (1, 3, *size)
    names = ("size", "crop_size", "do_center_crop", "default_to_square")
    sizes = {key: value for key, value in file.items() if key in names}
    kept = {key: value for key, value in file.items() if key not in names}
    for processor, call in (
        (processor_class.from_dict(file), {}),
        (processor_class(**file), {}),
        (processor_class.from_dict({"size": {"shortest_edge": 99}, "crop_size": 77} | kept, **sizes), {}),
        (processor_class(**kept), sizes),
    ):
        pixels = processor(photo(60, 90), return_tensors="pt", **call).pixel_values
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [{}, {"feature_extractor_type": "PvtFeatureExtractor"}], ids=["none", "old"])
@pytest.mark.parametrize("model_type", ["pvt", "pvt_v2"])
def test_files_with_an_integer_size_load_by_the_auto_class(kind, model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_resize": True, "size": 48} | kind))
    for backend, processor_class in (("torchvision", pvt_hf.PvtImageProcessor), ("pil", pvt_hf.PvtImageProcessorPil)):
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
        assert type(processor) is processor_class
        assert processor(photo(60, 90), return_tensors="pt").pixel_values.shape == (1, 3, 48, 48)
        assert "feature_extractor_type" not in processor.to_dict()


@BACKENDS
@pytest.mark.parametrize("size", [32, [32, 32], {"shortest_edge": 32}, {"height": 32, "width": 32}], ids=str)
def test_crop_pct_is_the_share_that_the_crop_keeps(processor_class, size):
    """As timm's and ConvNeXT's files have it, and saved as every processor of PVT understands it."""
    processor = processor_class.from_dict({"size": size, "crop_pct": 0.9})
    pixels = processor(photo(60, 90), return_tensors="pt").pixel_values[0]
    assert_same(pixels, papers_pixels(photo(60, 90), 35, 32), processor_class)
    saved = processor.to_dict()
    assert saved["size"] == {"shortest_edge": 35} and saved["crop_size"] == {"height": 32, "width": 32}
    assert saved["do_center_crop"] is True and "crop_pct" not in saved
    assert dict(processor_class.from_dict({"size": 32, "crop_pct": 0.9}, size=48).size) == {"height": 48, "width": 48}
    for wrong, message in (({"crop_pct": 0.9}, "must say the size"), ({"size": 9, "crop_pct": 90}, r"in \(0, 1\]")):
        with pytest.raises(ValueError, match=f"`crop_pct`.*{message}"):
            processor_class(**wrong)


WRONG_SIZES = [0, -1, 2.5, "224", True, [224], [1, 2, 3], [4, 0], {}, {"longest_edge": 9}, {"width": 9}]
WRONG_SIZES += [{"height": "9", "width": 9}, {"min_pixels": 9, "max_pixels": 99}]


@pytest.mark.parametrize("name", ["size", "crop_size", "pad_size"])
def test_wrong_sizes_are_refused_by_name(name):
    """When a processor is made and when it is called, before an image is looked at."""
    dense = [pvt_hf.PvtDetectionImageProcessor, pvt_hf.PvtSegmentationImageProcessor]
    classes = {"size": [pvt_hf.PvtImageProcessor, *dense], "crop_size": [pvt_hf.PvtImageProcessorPil]}
    for processor_class in classes.get(name, dense[:1]):
        process = processor_class()
        for wrong in WRONG_SIZES:
            for use in (processor_class, functools.partial(process, None)):
                with pytest.raises(ValueError, match=f"`{name}` must have .*got {re.escape(repr(wrong))}"):
                    use(**{name: wrong})


def test_scripts_that_read_the_size_evaluate_as_the_processor(tmp_path):
    """transformers' program for image classification reads `size` and resizes to it itself: with a processor whose
    `size` is what the model sees, the size is right and the evaluation is that of the pipeline."""
    processor_class = pvt_hf.PvtImageProcessorPil  # which resizes as the program does, to the bit
    processor_class().save_pretrained(tmp_path)
    processor_class.from_pretrained(tmp_path, size=224).save_pretrained(tmp_path)
    processor = processor_class.from_pretrained(tmp_path)
    assert "shortest_edge" not in processor.size
    size = processor.size["height"], processor.size["width"]
    evaluate = transforms.Compose(
        [
            transforms.Resize(size, pil_torch_interpolation_mapping[processor.resample]),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(processor.image_mean, processor.image_std),
        ]
    )
    pixels = processor(photo(300, 260), return_tensors="pt").pixel_values[0]
    assert size == (224, 224) == pixels.shape[1:]
    assert_same(pixels, evaluate(photo(300, 260)), processor_class)


@BACKENDS
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK"])
def test_images_of_every_mode_are_read(processor_class, mode):
    image = photo(280, 300, mode)
    pixels = processor_class()([image, photo(500, 260)], return_tensors="pt").pixel_values
    assert pixels.shape == (2, 3, 224, 224)
    assert_same(pixels[0], papers_pixels(image), processor_class)


@BACKENDS
def test_arrays_and_tensors_equal_pil_images(processor_class):
    image = photo(280, 300)
    expected = processor_class()(image, return_tensors="pt").pixel_values
    array = np.array(image)
    for given in (array, [array], torch.from_numpy(array).permute(2, 0, 1), array.transpose(2, 0, 1)):
        pixels = processor_class()(given, return_tensors="pt").pixel_values
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


@BACKENDS
def test_crop_larger_than_the_image_is_padded(processor_class):
    """Padded with black on both sides, as torchvision's `CenterCrop` does."""
    image = photo(50, 70)
    processor = processor_class(do_resize=False, crop_size=101, size=115)
    expected = transforms.Compose(
        [
            transforms.CenterCrop(101),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )(image)
    torch.testing.assert_close(processor(image, return_tensors="pt").pixel_values[0], expected, rtol=0, atol=1e-6)


def test_backends_share_one_file(tmp_path):
    pvt_hf.PvtImageProcessorPil(crop_size=288).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "PvtImageProcessor"
    loaded = pvt_hf.PvtImageProcessor.from_pretrained(tmp_path)
    assert dict(loaded.size) == {"shortest_edge": 329} and loaded.crop_size.height == 288


@BACKENDS
@pytest.mark.parametrize("shape", [(20000, 1), (1, 20000)])
def test_a_thin_image_is_refused_before_it_is_enlarged(processor_class, shape):
    """Its shortest edge alone would make it gigabytes, most of which the crop throws away."""
    image = Image.new("RGB", shape[::-1])
    with pytest.raises(ValueError, match=f"{shape[0]} x {shape[1]} pixels .* would become"):
        processor_class()(image, return_tensors="pt")
    assert processor_class(size={"height": 32, "width": 32})(image).pixel_values[0].shape == (3, 32, 32)
    thin = Image.new("RGB", (8, 3000))
    assert processor_class()(thin, return_tensors="pt").pixel_values.shape == (1, 3, 224, 224)
