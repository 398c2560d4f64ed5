"""Images and label maps for the segmenter against OpenCV, predictions against mmsegmentation's two resizes."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import pvt_hf
from pvt_hf.models import image_processing_segmentation

PROCESSORS = [pvt_hf.PvtSegmentationImageProcessor, pvt_hf.PvtSegmentationImageProcessorPil]
BACKENDS = pytest.mark.parametrize("processor_class", PROCESSORS)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def labels_of(height: int, width: int, classes: int = 151) -> np.ndarray:
    return np.random.default_rng(1).integers(0, classes, (height, width), dtype=np.uint8)


def align_resize(image: np.ndarray, interpolation: int, long: int = 2048, short: int = 512) -> np.ndarray:
    """mmsegmentation's `AlignResize` with OpenCV."""
    for _ in range(2):
        height, width = image.shape[:2]
        if _ == 0:
            factor = min(long / max(height, width), short / min(height, width))
            size = int(width * factor + 0.5), int(height * factor + 0.5)
        else:
            size = -(-width // 32) * 32, -(-height // 32) * 32
        image = cv2.resize(image, size, interpolation=interpolation)
    return image


@BACKENDS
@pytest.mark.parametrize("size", [(300, 401), (683, 512), (512, 512), (90, 700), (1100, 1501)], ids=str)
def test_equals_mmsegmentations_pipeline(processor_class, size):
    image, labels = noise(*size), labels_of(*size)
    normal = align_resize(image, cv2.INTER_LINEAR).astype(np.float32) - np.float32([123.675, 116.28, 103.53])
    expected = torch.from_numpy((normal / np.float32([58.395, 57.12, 57.375])).transpose(2, 0, 1))
    for given in (Image.fromarray(image), image):
        inputs = processor_class()(given, Image.fromarray(labels), return_tensors="pt")
        torch.testing.assert_close(inputs.pixel_values, expected[None], rtol=0, atol=1e-6)
        maps = torch.from_numpy(align_resize(labels, cv2.INTER_NEAREST)).long()
        assert torch.equal(inputs["labels"], maps[None]) and inputs["labels"].dtype == torch.int64


@BACKENDS
def test_images_and_maps_are_prepared_on_a_device(processor_class):
    image, labels = np.zeros((50, 70, 3), dtype=np.uint8), np.zeros((50, 70), dtype=np.uint8)
    settings = {"segmentation_maps": labels, "do_reduce_labels": True, "return_tensors": "pt"}
    on_device = processor_class()(image, **settings, device="meta")  # without values that could be asked
    for name, expected in processor_class()(image, **settings).items():
        assert on_device[name].device.type == "meta" and on_device[name].shape == expected.shape


@BACKENDS
def test_reduced_labels_count_from_zero(processor_class):
    labels = np.array([[0, 1, 150], [255, 2, 0]], dtype=np.uint8)
    settings = {"do_resize": False, "return_tensors": "pt", "num_labels": 150}
    inputs = processor_class(do_reduce_labels=True)(noise(2, 3), labels, **settings)
    assert inputs["labels"].tolist() == [[[255, 0, 149], [255, 1, 255]]]
    with pytest.raises(ValueError, match=r"map number 0 has the labels \[150\], the classes are 0 to 149"):
        processor_class()(noise(2, 3), labels, **settings)


@pytest.mark.parametrize("kind", ["array", "tensor", "L", "P", "I;16", "int32", "channel"])
def test_maps_of_every_type_give_the_same_labels(kind):
    labels = labels_of(40, 50)
    palette = Image.fromarray(labels)
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    given = {
        "array": labels,
        "tensor": torch.from_numpy(labels),
        "L": Image.fromarray(labels),
        "P": palette,
        "I;16": Image.fromarray(labels.astype(np.uint16)),
        "int32": labels.astype(np.int32),
        "channel": labels[None],
    }[kind]
    for processor_class in PROCESSORS:
        inputs = processor_class()([noise(40, 50)], [given], do_resize=False, return_tensors="pt")
        np.testing.assert_array_equal(inputs["labels"][0].numpy(), labels)


@BACKENDS
def test_maps_of_colours_or_fractions_are_refused(processor_class):
    process = processor_class()
    image = noise(40, 50)
    with pytest.raises(ValueError, match="of PIL's mode 'RGB': it must have one class label"):
        process(image, Image.fromarray(image))
    with pytest.raises(ValueError, match="dtype torch.float64: it must have one class label"):
        process(image, labels_of(40, 50) / 2)
    with pytest.raises(ValueError, match=r"map number 1 has \(height, width\) \[50, 40\], its image \[40, 50\]"):
        process([image, image], [labels_of(40, 50), labels_of(50, 40)])
    with pytest.raises(ValueError, match="`segmentation_maps` of 1 images for 2 images"):
        process([image, image], labels_of(40, 50))
    with pytest.raises(ValueError, match=r"negative labels \(-100\)"):
        process(image, np.full((40, 50), -100))
    with pytest.raises(ValueError, match="Image number 0 has pixels that are NaN"):
        process(np.full((40, 50, 3), np.nan, dtype=np.float32))


@BACKENDS
def test_batches_need_one_size(processor_class):
    process = processor_class(size={"shortest_edge": 64, "longest_edge": 256})
    same = process([noise(64, 90), noise(128, 180)], return_tensors="pt").pixel_values
    assert same.shape == (2, 3, 64, 96)
    with pytest.raises(ValueError, match=r"different sizes .*\[\(64, 96\), \(96, 64\)\]"):
        process([noise(64, 90), noise(90, 64)], return_tensors="pt")
    apart = process([noise(64, 90), noise(90, 64)])
    assert [tuple(image.shape[1:]) for image in apart.pixel_values] == [(64, 96), (96, 64)]
    fixed = process([noise(64, 90), noise(90, 64)], size={"height": 96, "width": 96}, return_tensors="pt")
    assert fixed.pixel_values.shape == (2, 3, 96, 96)


@pytest.mark.parametrize("stride", [4, 1])
def test_predictions_are_resized_in_two_steps(stride):
    """Two resizes, with more classes than are resized at a time."""
    logits = torch.randn(2, 37, 12, 16)
    outputs = SimpleNamespace(logits=logits)
    process = pvt_hf.PvtSegmentationImageProcessor(logits_stride=stride)
    sizes = [(50, 61), (33, 128)]
    for target_sizes in (sizes, torch.tensor(sizes)):
        predictions = process.post_process_semantic_segmentation(outputs, target_sizes)
        for prediction, image, size in zip(predictions, logits, sizes, strict=True):
            network = F.interpolate(image[None], (12 * stride, 16 * stride), mode="bilinear", align_corners=False)
            expected = F.interpolate(network, size, mode="bilinear", align_corners=False)[0].argmax(0)
            assert torch.equal(prediction, expected) and prediction.dtype == torch.int64
    direct = F.interpolate(logits[:1], sizes[0], mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(direct, process.post_process_semantic_segmentation(outputs, sizes)[0]) == (stride == 1)
    plain = process.post_process_semantic_segmentation(outputs)
    assert torch.equal(torch.stack(plain), logits.argmax(1))
    with pytest.raises(ValueError, match="`target_sizes` of 1 images for logits of 2"):
        process.post_process_semantic_segmentation(outputs, sizes[:1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grid", [(13, 17), (1, 2), (3, 5)])
def test_classes_that_are_nowhere_the_best_are_not_resized(grid, layout, monkeypatch):
    """Nor does that change a label, at the borders neither, whatever is resized at a time."""
    logits = torch.randn(1, 60, *grid, generator=torch.Generator().manual_seed(0)) - 9
    logits[0, 7] += 10
    logits[0, 50, -1, -1] += 14  # in one corner alone
    logits[0, 33, 0, 0] = logits[0, 7, 0, 0]
    logits = logits.contiguous(memory_format=layout)
    size, possible = (29, 61), image_processing_segmentation._find_possible_classes(logits).tolist()
    assert {7, 50} <= set(possible) and len(possible) == 16 and possible == sorted(possible)
    network = F.interpolate(logits, [4 * side for side in grid], mode="bilinear", align_corners=False)
    expected = F.interpolate(network, size, mode="bilinear", align_corners=False)[0].argmax(0)
    assert {7, 50} <= set(expected.unique().tolist())
    for lanes in (16, 1, 7):  # with one more or fewer at a time
        monkeypatch.setattr(image_processing_segmentation, "_CHUNK", 1)
        monkeypatch.setattr(image_processing_segmentation, "_LANES", lanes)
        assert torch.equal(image_processing_segmentation._segment(logits, 4, size), expected)


def test_backends_share_one_file(tmp_path):
    settings = {"size": {"shortest_edge": 64, "longest_edge": 200}, "do_reduce_labels": True, "logits_stride": 1}
    PROCESSORS[1](**settings).save_pretrained(tmp_path)
    loaded = [processor_class.from_pretrained(tmp_path) for processor_class in PROCESSORS]
    assert loaded[0].to_dict() == loaded[1].to_dict() and loaded[0].do_reduce_labels and loaded[0].logits_stride == 1
    inputs = [processor(noise(70, 95), labels_of(70, 95), return_tensors="pt") for processor in loaded]
    assert torch.equal(inputs[0].pixel_values, inputs[1].pixel_values)
    assert torch.equal(inputs[0]["labels"], inputs[1]["labels"])
