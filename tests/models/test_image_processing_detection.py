"""Images and annotations for the detectors: sizes and pixels against OpenCV, boxes and masks against slow code."""

import textwrap

import cv2
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from pycocotools import mask as coco_mask
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

import pvt_hf
from pvt_hf.models import resize
from pvt_hf.models.annotations import SKIPPED, AnnotationError, rasterize
from pvt_hf.models.image_processing_dense import compute_resized_size
from pvt_hf.models.resize import keep_ratio_size, resize_bilinear, resize_nearest
from tests.support.dense_models import build_dense_model
from tests.support.small_models import ROOT, STAGES, small_config

PROCESSORS = [pvt_hf.PvtDetectionImageProcessor, pvt_hf.PvtDetectionImageProcessorPil]
BACKENDS = pytest.mark.parametrize("processor_class", PROCESSORS)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mmdetection_pixels(image: np.ndarray, long: int = 1333, short: int = 800, divisor: int = 32) -> np.ndarray:
    """mmdetection's test pipeline with OpenCV: resized, normalised, padded; `(3, height, width)`."""
    height, width = image.shape[:2]
    factor = min(long / max(height, width), short / min(height, width))
    size = int(width * factor + 0.5), int(height * factor + 0.5)
    resized = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR).astype(np.float32)
    normal = (resized - np.float32([123.675, 116.28, 103.53])) / np.float32([58.395, 57.12, 57.375])
    bottom, right = (-side % divisor for side in normal.shape[:2])
    return np.pad(normal, [(0, bottom), (0, right), (0, 0)]).transpose(2, 0, 1)


def annotation(bbox, category_id=0, **fields) -> dict:
    return {"bbox": bbox, "category_id": category_id, "area": bbox[2] * bbox[3], "iscrowd": 0} | fields


@pytest.mark.parametrize("installed", [True, False], ids=["with_opencv", "without_opencv"])
def test_resize_has_the_bits_of_opencv(installed, monkeypatch):
    """Up and down, sides of one pixel, exact halves and doubles (where OpenCV takes another way)."""
    if installed:
        assert resize.find_opencv() is cv2
    else:
        monkeypatch.setattr(resize, "find_opencv", lambda: None)
    draw = np.random.default_rng(0)
    sizes = [tuple(draw.integers(1, 300, 4).tolist()) for _ in range(150)]
    sizes += [(60, 80, 120, 160), (60, 80, 30, 40), (61, 83, 61, 83), (1, 1, 7, 5), (60, 80, 60, 37), (1, 90, 40, 1)]
    for height, width, *target in sizes:
        image = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        tensor = torch.from_numpy(image).permute(2, 0, 1)
        ours = resize_bilinear(tensor, target).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(ours, cv2.resize(image, target[::-1], interpolation=cv2.INTER_LINEAR))
        ours = resize_nearest(tensor[0], target).numpy()
        np.testing.assert_array_equal(ours, cv2.resize(image[..., 0], target[::-1], interpolation=cv2.INTER_NEAREST))
        ours = resize_bilinear(tensor.float(), target).permute(1, 2, 0).numpy()
        theirs = cv2.resize(image.astype(np.float32), target[::-1], interpolation=cv2.INTER_LINEAR)
        np.testing.assert_allclose(ours, theirs, atol=0.02)


@pytest.mark.parametrize("shape", [(5, 30, 40), (1, 30, 40), (2, 3, 30, 40), (30, 40), (0, 30, 40)])
def test_resize_takes_any_channels_with_opencv_and_without(shape):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    for given in (image, image.transpose(-1, -2)):  # of any strides
        ours, expected = resize_bilinear(given, (41, 23)), resize._resize_uint8(given, (41, 23))
        assert ours.shape == (*shape[:-2], 41, 23) and ours.equal(expected)


def test_opencv_of_other_bits_is_not_used(monkeypatch):
    """Nor more threads of it than torch has, as in a worker of a data loader."""
    uint8 = np.random.default_rng(0).integers(0, 256, (3, 30, 40), dtype=np.uint8)
    monkeypatch.setattr(cv2, "getNumThreads", lambda: 64)
    set_to = []
    monkeypatch.setattr(cv2, "setNumThreads", set_to.append)
    resize_bilinear(torch.from_numpy(uint8), (41, 23))
    assert set_to == [torch.get_num_threads()]
    wrong = cv2.resize
    monkeypatch.setattr(cv2, "resize", lambda *args, **kwargs: wrong(*args, **kwargs) | 1)
    assert resize.find_opencv.__wrapped__() is None


def test_sizes_round_to_the_nearest_pixel():
    for height, width in np.random.default_rng(0).integers(1, 3000, (2000, 2)).tolist():
        factor = min(1333 / max(height, width), 800 / min(height, width))
        expected = max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
        assert keep_ratio_size(height, width, 800, 1333) == expected
    processor = PROCESSORS[0]()
    assert compute_resized_size(480, 640, processor.size) == (800, 1067)  # 1066.67: transformers' rule gives 1066
    assert compute_resized_size(427, 640, processor.size) == (800, 1199)
    assert processor(noise(300, 300), size={"height": 64, "width": 96}).pixel_values[0].shape == (3, 64, 96)
    assert processor(noise(300, 600), size={"shortest_edge": 64}).pixel_values[0].shape == (3, 64, 128)
    with pytest.raises(ValueError, match=r"`size` must have `shortest_edge`.*got \{'longest_edge': 64\}"):
        processor(noise(300, 600), size={"longest_edge": 64})
    with pytest.raises(ValueError, match="`resample` must be bilinear"):
        processor(noise(300, 600), resample=3)


@BACKENDS
def test_equals_mmdetections_pipeline(processor_class):
    processor = processor_class()
    for height, width in ((480, 640), (500, 333), (900, 1600)):
        image = noise(height, width)
        for given in (Image.fromarray(image), image, torch.from_numpy(image).permute(2, 0, 1)):
            inputs = processor(given, return_tensors="pt")
            expected = torch.from_numpy(mmdetection_pixels(image))[None]
            torch.testing.assert_close(inputs.pixel_values, expected, rtol=0, atol=1e-6)
            size = keep_ratio_size(height, width, 800, 1333)
            mask = torch.zeros(1, *expected.shape[2:], dtype=torch.int64)
            mask[:, : size[0], : size[1]] = 1
            assert torch.equal(inputs.pixel_mask, mask)


@BACKENDS
def test_batches_are_padded_to_the_largest_image(processor_class):
    images = [noise(100, 160), noise(170, 120), noise(90, 90)]
    settings = {"size": {"shortest_edge": 96, "longest_edge": 130}}
    inputs = processor_class(**settings)(images, return_tensors="pt")
    assert inputs.pixel_values.shape == (3, 3, 160, 160) and inputs.pixel_mask.shape == (3, 160, 160)
    assert inputs.pixel_values.dtype == torch.float32 and inputs.pixel_mask.dtype == torch.int64
    for index, image in enumerate(images):
        alone = torch.from_numpy(mmdetection_pixels(image, 130, 96))
        height, width = alone.shape[1:]
        torch.testing.assert_close(inputs.pixel_values[index, :, :height, :width], alone, rtol=0, atol=1e-6)
        assert not inputs.pixel_values[index, :, height:].any() and not inputs.pixel_values[index, :, :, width:].any()
        assert not inputs.pixel_values[index][:, inputs.pixel_mask[index] == 0].any()
    fixed = processor_class(**settings, pad_size={"height": 200, "width": 240})(images, return_tensors="pt")
    assert fixed.pixel_values.shape == (3, 3, 200, 240)
    sizes = [(81, 130), (130, 92), (96, 96)]
    resized = [
        resize_bilinear(torch.from_numpy(image).permute(2, 0, 1), size)
        for image, size in zip(images, sizes, strict=True)
    ]
    for pad_size in ({"height": 200, "width": 240}, None):  # the second half alone
        again = processor_class(**settings).batch(resized, pad_size=pad_size)
        expected = inputs if pad_size is None else fixed
        assert torch.equal(again.pixel_values, expected.pixel_values)
        assert torch.equal(again.pixel_mask, expected.pixel_mask)
    with pytest.raises(ValueError, match=r"`pad_size` is .*largest sides of the images are \[130, 130\]"):
        processor_class(**settings, pad_size={"height": 64, "width": 240})(images)
    unpadded = processor_class(**settings, do_pad=False)(images)
    assert [tuple(image.shape[1:]) for image in unpadded.pixel_values] == sizes
    assert "pixel_mask" not in unpadded


# As DETR's processor takes it, its own size of an image of 480 x 640, and ours, which rounds to the nearest pixel.
SIZES_OF_DETR = {
    "integer": ({"size": 300}, (300, 400), (300, 400)),
    "integer and limit": ({"size": 300, "max_size": 333}, (250, 333), (250, 333)),
    "pair": ({"size": (96, 128)}, (96, 128), (96, 128)),
    "limits": ({"size": {"max_height": 250, "max_width": 300}}, (225, 300), (225, 300)),
    "sides": ({"size": {"height": 96, "width": 64}}, (96, 64), (96, 64)),
    "edges": ({"size": {"shortest_edge": 300, "longest_edge": 333}}, (250, 333), (250, 333)),
}


@pytest.mark.parametrize("form", SIZES_OF_DETR)
def test_sizes_are_as_detr_takes_them(form):
    settings, theirs, ours = SIZES_OF_DETR[form]
    image = np.zeros((480, 640, 3), np.uint8)
    detr = transformers.DetrImageProcessor(**settings, do_pad=False)(image)
    assert tuple(detr.pixel_values[0].shape[1:]) == theirs
    old = {"format": "coco_detection", "do_convert_annotations": True, "pad_and_return_pixel_mask": False}
    for processor in (PROCESSORS[0](**settings, do_pad=False), PROCESSORS[1].from_dict(settings | old)):
        assert tuple(processor(image).pixel_values[0].shape[1:]) == ours
    assert tuple(PROCESSORS[0]()(image, **settings, do_pad=False).pixel_values[0].shape[1:]) == ours
    for name, value in (("format", "coco_panoptic"), ("do_convert_annotations", False)):
        with pytest.raises(ValueError, match=f"`{name}` must be .*got {value!r}"):
            PROCESSORS[0](**{name: value})
        with pytest.raises(ValueError, match=f"`{name}` must be .*got {value!r}"):
            PROCESSORS[0]()(image, **{name: value})


@BACKENDS
def test_padding_to_a_square_gives_the_same_boxes_and_detections(processor_class, tmp_path):
    """As transformers' program for object detection loads the processor: labels and detections are relative to the
    image without its padding, whatever that is."""
    square = {"do_pad": True, "pad_size": {"height": 150, "width": 150}}
    settings = {"do_resize": True, "size": {"max_height": 150, "max_width": 150}, **square}
    processor_class().save_pretrained(tmp_path)
    processors = [processor_class(size=settings["size"]), processor_class.from_pretrained(tmp_path, **settings)]
    processors += [processor_class(**square), processor_class.from_pretrained(tmp_path, **square)]
    images = [noise(80, 120), noise(90, 60)]
    targets = [
        {"image_id": 9, "annotations": [annotation([10, 12, 60, 50], 1), annotation([70, 20, 30, 30], 2)]},
        {"image_id": 11, "annotations": [annotation([5, 0, 25, 30], 0, segmentation=[[5, 0, 30, 0, 30, 30, 5, 30]])]},
    ]
    batches = [processor(images, annotations=targets, return_tensors="pt") for processor in processors]
    batches.append(processor_class()(images, annotations=targets, return_tensors="pt", **square))
    assert batches[0].pixel_values.shape == (2, 3, 160, 160)
    for batch in batches[1:]:
        assert batch.pixel_values.shape == (2, 3, 150, 150) and batch.pixel_mask.shape == (2, 150, 150)
        assert torch.equal(batch.pixel_values, batches[0].pixel_values[..., :150, :150])
        assert torch.equal(batch.pixel_mask, batches[0].pixel_mask[..., :150, :150])
        assert batch.pixel_mask.sum((1, 2)).tolist() == [100 * 150, 150 * 100]
        for label, expected in zip(batch["labels"], batches[0]["labels"], strict=True):
            assert all(torch.equal(label[key], expected[key]) for key in expected)
    # A model that finds what there is.
    boxes = torch.stack([labels["boxes"][[0, -1]] for labels in batches[1]["labels"]])
    classes = torch.stack([labels["class_labels"][[0, -1]] for labels in batches[1]["labels"]])
    logits = 9 * torch.nn.functional.one_hot(classes, 4).float()
    outputs = DetrObjectDetectionOutput(logits=logits, pred_boxes=boxes)
    found = processors[1].post_process_object_detection(outputs, 0.5, [(80, 120), (90, 60)])
    for detections, target in zip(found, targets, strict=True):
        corners = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in target["annotations"])]
        for corner in corners:
            assert (detections["boxes"] - torch.tensor(corner)).abs().amax(1).min() < 1e-3


def test_padding_alone_keeps_sizes_that_fit():
    assert dict(PROCESSORS[0](pad_size=1333).size) == {"shortest_edge": 800, "longest_edge": 1333}
    assert dict(PROCESSORS[0](pad_size=1332).size) == {"max_height": 1332, "max_width": 1332}
    assert dict(PROCESSORS[0](pad_size=64, do_pad=False).size) == {"shortest_edge": 800, "longest_edge": 1333}
    process = PROCESSORS[0](size={"shortest_edge": 48, "longest_edge": 64})
    inputs = process(noise(80, 90), pad_size={"height": 64, "width": 70}, return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 3, 64, 70) and inputs.pixel_mask.sum() == 48 * 54
    with pytest.raises(
        ValueError, match=r"`pad_size` is .* With `size=\{'max_height': 32, 'max_width': 32\}` they fit"
    ):
        process(noise(80, 90), pad_size=32, size=48)


@pytest.mark.parametrize("kind", ["np", None])
def test_tensors_are_returned_as_they_are_asked_for(kind):
    targets = {"image_id": 3, "annotations": [annotation([10, 12, 30, 20], 1)]}
    pt, other = (PROCESSORS[0](size=64)(noise(50, 60), targets, return_tensors=value) for value in ("pt", kind))
    assert isinstance(other.pixel_values, np.ndarray if kind else list)
    np.testing.assert_array_equal(np.asarray(other.pixel_values[0]), pt.pixel_values[0])
    for key, value in pt["labels"][0].items():
        np.testing.assert_array_equal(np.asarray(other["labels"][0][key]), value)


@pytest.mark.parametrize("name", ["Detection", "Segmentation"])
@pytest.mark.parametrize("backend", ["", "Pil"])
def test_a_thin_image_is_refused_before_it_is_enlarged(name, backend):
    process = getattr(pvt_hf, f"Pvt{name}ImageProcessor{backend}")(size={"shortest_edge": 800})
    with pytest.raises(ValueError, match="Image number 1 of 1 x 20000 pixels .* would become 800 x 16000000"):
        process([noise(8, 9), Image.new("RGB", (20000, 1))])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "I;16", "uint16", "int64"])
def test_images_of_every_mode_are_read(mode):
    grey = Image.fromarray(noise(60, 80)).convert("L")
    if mode in ("I;16", "uint16", "int64"):
        pixels = np.asarray(grey)[..., None]
        given = pixels.astype(np.int64) if mode == "int64" else (pixels.astype(np.uint16) << 8) + 77
        given = Image.fromarray(given[..., 0]) if mode == "I;16" else given
        expected = grey.convert("RGB")
    else:
        given = grey.convert(mode)
        expected = given.convert("RGB")
    inputs = [processor_class()(given, return_tensors="pt").pixel_values[0] for processor_class in PROCESSORS]
    assert torch.equal(*inputs)
    torch.testing.assert_close(inputs[0], torch.from_numpy(mmdetection_pixels(np.asarray(expected))), rtol=0, atol=1e-6)


@BACKENDS
def test_pixels_out_of_range_are_refused(processor_class):
    image = noise(40, 50).astype(np.float32)
    image[3, 4, 1] = np.nan
    with pytest.raises(ValueError, match="Image number 1 has pixels that are NaN"):
        processor_class()([noise(40, 50), image])
    with pytest.raises(ValueError, match="Image 17 has pixels that are NaN"):
        processor_class()([image], annotations={"image_id": 17, "annotations": []})
    with pytest.raises(ValueError, match=r"values in \[-1, 255\]"):
        processor_class()(np.array([[[-1], [255]], [[3], [4]]]))
    with pytest.raises(ValueError, match="mode 'F'"):
        processor_class()(Image.fromarray(image[..., 0]))
    image = noise(40, 50)
    rescaled = processor_class()(image.astype(np.float32) / 255, do_rescale=False, return_tensors="pt").pixel_values
    expected = processor_class()(image, return_tensors="pt").pixel_values
    grey_levels = (rescaled - expected).abs() * torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None] * 255
    assert grey_levels.max() < 1  # only the rounding to grey levels is missing
    plain = processor_class(do_normalize=False, do_resize=False, do_rescale=False)(image, return_tensors="pt")
    assert torch.equal(plain.pixel_values[0, :, :40, :50], torch.from_numpy(image).permute(2, 0, 1).float())
    normal = processor_class(do_resize=False)(image, return_tensors="pt").pixel_values[0, :, 0, 0]
    expected = (image[0, 0] / 255 - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
    np.testing.assert_allclose(normal.numpy(), expected, atol=1e-6)


@BACKENDS
@pytest.mark.parametrize("kind", ["polygons", "rle", "compressed"])
def test_labels_equal_the_annotations(processor_class, kind):
    """Against OpenCV and pycocotools, for two images of which the second is padded."""
    size = {"shortest_edge": 96, "longest_edge": 160}
    polygons = [[10.5, 20, 50, 12.25, 45, 60.5, 20, 55], [60, 60, 75, 60, 75, 75]]
    raster = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 80, 120)))
    runs = np.diff(np.flatnonzero(np.diff(raster.ravel(order="F"), prepend=2, append=2))).tolist()
    encoded = coco_mask.encode(np.asfortranarray(raster))
    segmentation = {
        "polygons": polygons,
        "rle": {"size": [80, 120], "counts": runs},
        "compressed": {"size": [80, 120], "counts": encoded["counts"].decode()},
    }[kind]
    first = annotation([10.5, 12.25, 100, 100], 7, segmentation=segmentation, area=1234.5, id=5)
    second = annotation([-5, 0, 25, 30], 1, segmentation=[[0, 0, 20, 0, 20, 30, 0, 30]])
    targets = [{"image_id": 9, "annotations": [first]}, {"image_id": 11, "annotations": [second]}]
    arguments = {"annotations": targets, "return_segmentation_masks": True, "return_tensors": "pt"}
    inputs = processor_class(size=size)([noise(80, 120), noise(90, 60)], **arguments)
    assert inputs.pixel_values.shape[2:] == (160, 160)
    labels = inputs["labels"]
    assert [label["size"].tolist() for label in labels] == [[96, 144], [144, 96]]
    assert [label["orig_size"].tolist() for label in labels] == [[80, 120], [90, 60]]
    assert [label["image_id"].tolist() for label in labels] == [[9], [11]]
    assert [label["class_labels"].tolist() for label in labels] == [[7], [1]]
    assert [label["iscrowd"].tolist() for label in labels] == [[0], [0]]
    boxes = [[10.5, 12.25, 110.5, 80], [0, 0, 20, 30]]  # clipped, xyxy, in the original image
    for label, (x0, y0, x1, y1), (height, width) in zip(labels, boxes, [(80, 120), (90, 60)], strict=True):
        expected = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
        torch.testing.assert_close(label["boxes"], torch.tensor([expected]))
        assert label["boxes"].dtype == torch.float32 and label["class_labels"].dtype == torch.int64
    torch.testing.assert_close(labels[0]["area"], torch.tensor([1234.5 * 1.2 * 1.2]))
    assert [label["masks"].dtype for label in labels] == [torch.bool] * 2
    expected = np.pad(cv2.resize(raster, (144, 96), interpolation=cv2.INTER_NEAREST), [(0, 64), (0, 16)])
    np.testing.assert_array_equal(labels[0]["masks"].numpy(), expected[None].astype(bool))
    assert labels[1]["masks"].shape == (1, 160, 160) and labels[1]["masks"][0, :48, :32].all()
    assert labels[1]["masks"].sum() == 48 * 32


def test_polygons_are_drawn_as_pycocotools_does():
    draw = np.random.default_rng(3)
    for _ in range(100):
        height, width = draw.integers(5, 90, 2).tolist()
        polygons = [draw.uniform(-10, 100, 2 * draw.integers(3, 9)).round(2).tolist() for _ in range(2)]
        expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))
        np.testing.assert_array_equal(rasterize(polygons, (height, width)), expected.astype(bool))


@BACKENDS
def test_what_mmdetection_does_not_train_on_is_skipped(processor_class, caplog):
    SKIPPED.clear()
    annotations = [
        annotation([1, 1, 20, 20], 0, ignore=1),
        annotation([1, 1, 20, 20], 1, iscrowd=1, segmentation={"size": [1, 1], "counts": [1]}),
        annotation([1, 1, 20, 20], 2, area=0),
        annotation([1, 1, 0.9, 20], 3),
        annotation([1, 1, 20, 0], 4),
        annotation([60, 1, 20, 20], 5),
        annotation([1, -20, 20, 20], 6, id=77),
        annotation([1, 1, 20, 20], 7, segmentation=[[1, 1, 21, 1, 21, 21, 1, 21]]),
        annotation([3, 3, 20, 20], 8, area=None, iscrowd=None, segmentation=[[3, 3, 23, 3, 23, 23]]),
    ]
    target = {"image_id": 3, "annotations": annotations}
    for _ in range(2):
        inputs = processor_class()(
            noise(50, 60), annotations=target, return_segmentation_masks=True, return_tensors="pt"
        )
    assert inputs["labels"][0]["class_labels"].tolist() == [7, 8] and len(inputs["labels"][0]["masks"]) == 2
    assert sorted(SKIPPED.values()) == [2, 2, 2, 4, 4]
    assert caplog.text.count("is skipped") == 5  # the first of each kind
    assert "Annotation number 5 of image 3 is skipped: its box lies outside the image" in caplog.text


@BACKENDS
def test_images_are_prepared_on_a_device(processor_class):
    """As transformers' fast processors do, with nothing that is asked of it on the way: this one has no values."""
    annotations = {"image_id": 1, "annotations": [annotation([4, 5, 20, 30])]}
    image = np.zeros((50, 70, 3), dtype=np.uint8)
    on_device = processor_class()(image, annotations=annotations, return_tensors="pt", device="meta")
    on_cpu = processor_class()(image, annotations=annotations, return_tensors="pt")
    for ours, expected in ((on_device, on_cpu), (on_device["labels"][0], on_cpu["labels"][0])):
        tensors = {name: value for name, value in ours.items() if name != "labels"}
        assert {value.device.type for value in tensors.values()} == {"meta"}
        assert {name: value.shape for name, value in tensors.items()} == {
            name: expected[name].shape for name in tensors
        }


@BACKENDS
def test_images_without_objects_have_empty_labels(processor_class):
    target = {"image_id": 1, "annotations": []}
    arguments = {"annotations": [target] * 2, "return_segmentation_masks": True, "return_tensors": "pt"}
    inputs = processor_class()([noise(50, 60), noise(60, 50)], **arguments)
    for label in inputs["labels"]:
        assert label["boxes"].shape == (0, 4) and label["class_labels"].shape == (0,)
        assert label["masks"].shape == (0, *inputs.pixel_values.shape[2:])


MALFORMED = {
    "no bbox": ({"category_id": 1}, "has no `bbox`"),
    "nothing": ({}, "has no `bbox` and no `category_id`"),
    "NaN": (annotation([1, 2, float("nan"), 4]), "four finite numbers"),
    "three": ({"bbox": [1, 2, 3], "category_id": 1}, "four finite numbers"),
    "class": (annotation([1, 1, 9, 9], 10), "`category_id` 10, the class labels are 0 to 9"),
    "negative class": (annotation([1, 1, 9, 9], -1), "`category_id` -1"),
    "null": ({"bbox": None, "category_id": 1}, "has `bbox` None, it must be four finite numbers"),
    "string": (annotation([1, 1, 9, 9]) | {"bbox": [1, 1, "9", 9]}, r"has `bbox` \[1, 1, '9', 9\]"),
    "dictionary": (annotation([1, 1, 9, 9]) | {"bbox": {"x": 1}}, "has `bbox` {'x': 1}"),
    "huge": (annotation([1, 1, 9, 10**400]), "four finite numbers"),
    "class name": (annotation([1, 1, 9, 9], "cat"), "has `category_id` 'cat', it must be an integer"),
    "half a class": (annotation([1, 1, 9, 9], 1.5), "has `category_id` 1.5, it must be an integer"),
    "area": (annotation([1, 1, 9, 9], area="81"), "has `area` '81', it must be a finite number"),
    "crowd": (annotation([1, 1, 9, 9], iscrowd="0"), "has `iscrowd` '0', it must be 0 or 1"),
    "ignore": (annotation([1, 1, 9, 9], ignore=[]), r"has `ignore` \[\], it must be 0 or 1"),
    "mask": (annotation([1, 1, 9, 9], segmentation="1 1 9 1"), "`segmentation` with '1 1 9 1', it must be RLE or a"),
    "polygon": (annotation([1, 1, 9, 9], segmentation=["1 1 9 1"]), "`segmentation` with '1 1 9 1', it must be RLE"),
    "flat polygon": (annotation([1, 1, 9, 9], segmentation=[1, 1, 9, 1, 9, 9]), "`segmentation` with 1, it must be"),
    "odd polygon": (annotation([1, 1, 9, 9], segmentation=[[1, 1, 9, 1, 9]]), r"with \[1, 1, 9, 1, 9\], it must be"),
    "null in polygon": (annotation([1, 1, 9, 9], segmentation=[[1, None] * 3]), r"with \[1, None, 1, None, 1, None\]"),
    "negative counts": (annotation([1, 1, 9, 9], segmentation={"size": [50, 60], "counts": [-5]}), "cannot be read"),
    "size": (annotation([1, 1, 9, 9], segmentation={"size": 9, "counts": [9]}), r"\(height, width\) 9, the image"),
    "mask size": (
        annotation([1, 1, 9, 9], segmentation={"size": [60, 50], "counts": [3000]}),
        r"\[60, 50\], the image",
    ),
    "counts": (annotation([1, 1, 9, 9], segmentation={"size": [50, 60], "counts": [5]}), "RLE that cannot be read"),
    "no counts": (annotation([1, 1, 9, 9], segmentation={"size": [50, 60]}), "RLE that cannot be read"),
    "cut": (annotation([1, 1, 9, 9], segmentation={"size": [50, 60], "counts": "abc"}), "RLE that cannot be read"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_annotations_are_refused(case):
    malformed, message = MALFORMED[case]
    valid = annotation([1, 1, 9, 9], segmentation=[[1, 1, 9, 1, 9, 9]])
    target = {"image_id": 31, "annotations": [valid, malformed | {"id": 42}]}
    arguments = {"annotations": [target], "return_segmentation_masks": True, "num_labels": 10}
    with pytest.raises(AnnotationError, match=f"Annotation 42 of image 31 .*{message}"):
        PROCESSORS[0]()(noise(50, 60), **arguments)


def test_annotation_that_is_no_object_is_refused():
    with pytest.raises(AnnotationError, match="Annotation number 0 of image 3 is no object: None"):
        PROCESSORS[0]()(noise(50, 60), annotations={"image_id": 3, "annotations": [None]})


def test_annotations_without_a_mask_have_a_box():
    """Stray parts of one or two points are no masks; where all have one, labels do not say so."""
    polygon = [1, 1, 9, 1, 9, 9]
    given = [[polygon], None, [], [[1, 1, 4, 4]], [[1, 1], [2, 2, 3, 3], polygon]]
    annotations = [annotation([1, 1, 9, 9], segmentation=segmentation) for segmentation in given]
    arguments = {"return_segmentation_masks": True, "return_tensors": "pt"}
    target = {"image_id": 3, "annotations": [*annotations, annotation([1, 1, 9, 9])]}
    (label,) = PROCESSORS[0]()(noise(50, 60), annotations=target, **arguments)["labels"]
    assert label["has_masks"].tolist() == [True, False, False, False, True, False]
    assert label["masks"].flatten(1).any(dim=1).tolist() == label["has_masks"].tolist()
    assert torch.equal(label["masks"][0], label["masks"][4]) and label["boxes"].shape == (6, 4)
    target = {"image_id": 3, "annotations": annotations[:1]}
    (label,) = PROCESSORS[0]()(noise(50, 60), annotations=target, **arguments)["labels"]
    assert "has_masks" not in label


def test_as_many_annotations_as_images():
    with pytest.raises(ValueError, match="`annotations` of 2 images for 1 images"):
        PROCESSORS[0]()(noise(50, 60), annotations=[{"image_id": 1, "annotations": []}] * 2)
    for target in ({"annotations": []}, {"image_id": 3}, {"image_id": "a", "annotations": []}):
        with pytest.raises(AnnotationError, match="an integer `image_id` and a list `annotations`"):
            PROCESSORS[0]()(noise(50, 60), annotations=target)


def test_backends_share_one_file(tmp_path):
    settings = {"size": {"shortest_edge": 640, "longest_edge": 1066}, "pad_size_divisor": 64, "num_labels": 5}
    PROCESSORS[1](**settings).save_pretrained(tmp_path)
    loaded = [processor_class.from_pretrained(tmp_path) for processor_class in PROCESSORS]
    assert loaded[0].to_dict() == loaded[1].to_dict()
    assert dict(loaded[0].size) == settings["size"] and loaded[0].num_labels == 5
    inputs = [processor(noise(300, 500), return_tensors="pt") for processor in loaded]
    assert torch.equal(inputs[0].pixel_values, inputs[1].pixel_values)
    assert inputs[0].pixel_values.shape[2:] == (640, 1088)


def detectors(name: str) -> transformers.PreTrainedModel:
    """Small models with scores on both sides of the threshold."""
    if name in ("sparse_rcnn", "cascade_mask_rcnn"):
        model = build_dense_model(name, depths=[1, 1, 1, 1])
        for part, module in model.named_modules():
            if part.endswith("class_predictor"):
                torch.nn.init.normal_(module.weight, std=3)
        return model
    stages = STAGES if name == "mask_rcnn" else STAGES[1:]
    backbone = small_config("v2", out_features=stages)
    if name == "detr":
        sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 7}
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        model = pvt_hf.build_detr(pvt_hf.build_detr_config(backbone, num_labels=3, **sizes, **layers))
        model.class_labels_classifier.weight.data *= 9
        return model.eval()
    config_class, model_class = {
        "retinanet": (pvt_hf.RetinaNetConfig, pvt_hf.RetinaNetForObjectDetection),
        "atss": (pvt_hf.ATSSConfig, pvt_hf.ATSSForObjectDetection),
        "gfl": (pvt_hf.GFLConfig, pvt_hf.GFLForObjectDetection),
        "mask_rcnn": (pvt_hf.MaskRCNNConfig, pvt_hf.MaskRCNNForInstanceSegmentation),
    }[name]
    groups = {"norm_groups": 4} if name in ("atss", "gfl") else {}
    model = model_class(config_class(backbone_config=backbone, neck_channels=8, num_labels=3, **groups)).eval()
    if name != "mask_rcnn":
        torch.nn.init.normal_(model.head.class_predictor.weight, std=30)
        model.head.class_predictor.bias.data.fill_(-0.5)
    return model


@pytest.mark.parametrize("name", ["retinanet", "atss", "gfl", "sparse_rcnn", "mask_rcnn", "cascade_mask_rcnn", "detr"])
def test_pipeline_loads_a_saved_checkpoint(name, tmp_path, logged_errors):
    """Both backends, loaded by the Auto class, give what the parts give, in pixels of the original image."""
    model = detectors(name)
    model.save_pretrained(tmp_path)
    PROCESSORS[0](size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path)
    image = Image.fromarray(noise(150, 210))
    for backend, processor_class in zip(("torchvision", "pil"), PROCESSORS, strict=True):
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
        assert type(processor) is processor_class
        detect = transformers.pipeline("object-detection", str(tmp_path), image_processor=processor)
        inputs = processor(image, return_tensors="pt")
        assert inputs.pixel_values.shape == (1, 3, 64, 96)
        with torch.no_grad():
            outputs = model(**inputs)
        (expected,) = processor.post_process_object_detection(outputs, 0.3, [(150, 210)])
        found = detect(image, threshold=0.3)
        assert 0 < len(found) == len(expected["scores"])
        assert expected["scores"].diff().le(0).all() and expected["scores"].min() > 0.3
        for detection, score, label, box in zip(found, *expected.values(), strict=True):
            assert detection["score"] == pytest.approx(score.item()) and detection["label"] == f"LABEL_{label}"
            assert list(detection["box"].values()) == box.int().tolist()
            assert box[0] <= box[2] and box[1] <= box[3]
            assert name == "sparse_rcnn" or (box.min() >= 0 and box[2] <= 210 and box[3] <= 150)
    assert not logged_errors
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path).size.shortest_edge == 64
    with pytest.raises(ValueError, match="`target_sizes` must"):
        processor.post_process_object_detection(outputs, 0.3, [(1, 1)] * 2)


def test_registration_while_transformers_imports_a_detector(python):
    """Its import has the package registered, which must not need it."""
    code = """
        import pvt_hf
        from transformers import DetrForObjectDetection
        from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
        assert get_image_processor_class_from_name("PvtDetectionImageProcessor") is pvt_hf.PvtDetectionImageProcessor
    """
    run = python("-c", textwrap.dedent(code))
    assert run.returncode == 0, run.stderr


def test_detections_of_detr_equal_those_of_loops():
    """Against the definition, query by query; the same numbers without a target size are relative."""
    logits, boxes = torch.randn(2, 30, 4) * 2, torch.rand(2, 30, 4)
    outputs = DetrObjectDetectionOutput(logits=logits, pred_boxes=boxes)
    sizes = [(150, 210), (64, 32)]
    found = PROCESSORS[0]().post_process_object_detection(outputs, 0.5, torch.tensor(sizes))
    relative = PROCESSORS[0]().post_process_object_detection(outputs)
    for index, (height, width) in enumerate(sizes):
        expected = []
        for scores, (x, y, w, h) in zip(logits[index].softmax(-1).tolist(), boxes[index].tolist(), strict=True):
            best = max(range(3), key=lambda label, scores=scores: scores[label])
            if scores[best] > 0.5:
                corners = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
                limits = [width, height, width, height]
                corners = [min(max(corner, 0), limit) for corner, limit in zip(corners, limits, strict=True)]
                expected.append((scores[best], best, corners))
        expected.sort(key=lambda detection: -detection[0])
        assert 3 < len(expected) < 30
        for part, name in enumerate(("scores", "labels", "boxes")):
            wanted = torch.tensor([detection[part] for detection in expected])
            torch.testing.assert_close(found[index][name], wanted, rtol=1e-5, atol=1e-4)
        scale = torch.tensor([width, height, width, height])
        torch.testing.assert_close(relative[index]["boxes"] * scale, found[index]["boxes"])


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_mask_rcnn"])
def test_pipeline_gives_the_instances(name, logged_errors):
    model = detectors(name)
    processor = PROCESSORS[0](size={"shortest_edge": 64, "longest_edge": 96})
    image = Image.fromarray(noise(150, 210))
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    (expected,) = processor.post_process_instance_segmentation(outputs, 0.2, target_sizes=[(150, 210)])
    (binary,) = processor.post_process_instance_segmentation(
        outputs, 0.2, target_sizes=[(150, 210)], return_binary_maps=True
    )
    (boxes,) = processor.post_process_object_detection(outputs, 0.2, [(150, 210)])
    assert binary["segmentation"].shape == (len(boxes["scores"]), 150, 210) and len(boxes["scores"]) > 0
    assert [segment["label_id"] for segment in binary["segments_info"]] == boxes["labels"].tolist()
    segment = transformers.pipeline("image-segmentation", model, image_processor=processor)
    found = segment(image, threshold=0.2)
    assert not logged_errors
    assert len(found) == len(expected["segments_info"]) == len(boxes["scores"])
    for instance, info in zip(found, expected["segments_info"], strict=True):
        mask = np.array(instance["mask"]) > 0
        np.testing.assert_array_equal(mask, (expected["segmentation"] == info["id"]).numpy())
        assert (instance["score"], instance["label"]) == (info["score"], f"LABEL_{info['label_id']}")


def test_processors_load_with_their_published_code(python, tmp_path):
    """Both processors on both backends, where the package cannot be imported, from the files saved with them."""
    saving = """
        import pvt_hf
        for name in ("Detection", "Segmentation"):
            processor_class = getattr(pvt_hf, f"Pvt{name}ImageProcessor")
            processor_class.register_for_auto_class("AutoImageProcessor")
            processor_class(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(name)
    """
    loading = """
        import sys
        sys.modules["pvt_hf"] = sys.modules["faster_coco_eval"] = None
        import numpy, transformers
        image = numpy.zeros((60, 80, 3), dtype="uint8")
        for name in ("Detection", "Segmentation"):
            for backend in ("torchvision", "pil"):
                options = {"trust_remote_code": True, "backend": backend}
                processor = transformers.AutoImageProcessor.from_pretrained(f"./{name}", **options)
                assert processor.backend == backend and name in type(processor).__name__
                assert processor(image, return_tensors="pt").pixel_values.shape == (1, 3, 64, 96)
    """
    for code in (saving, loading):
        run = python("-c", textwrap.dedent(code), PYTHONPATH=str(ROOT) if code is saving else "")
        assert run.returncode == 0, run.stderr
