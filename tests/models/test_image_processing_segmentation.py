"""Images and label maps for the segmenter against OpenCV, predictions against mmsegmentation's two resizes."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import pvt_hf
from pvt_hf.models import class_maps

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


def resize_twice(logits: torch.Tensor, stride: int, size: tuple[int, int]) -> torch.Tensor:
    """All classes at every pixel, as mmsegmentation has them, of `(1, classes, height, width)`."""
    network = F.interpolate(logits, [stride * side for side in logits.shape[2:]], mode="bilinear")
    return F.interpolate(network, size, mode="bilinear")[0]


def write_regions(classes: int, *grid: int) -> torch.Tensor:
    """Logits with a few classes here and there, as trained models have them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, classes, *(max(1, side // 6) for side in grid), generator=generator) * 4
    return F.interpolate(coarse, grid, mode="bicubic") + 0.1 * torch.randn(1, classes, *grid, generator=generator)


@pytest.fixture
def tiny_chunks(monkeypatch):
    """Strips of a row of tiles, and tiles whose rows are computed one by one."""
    monkeypatch.setattr(class_maps, "_STRIP", 1)
    monkeypatch.setattr(class_maps, "_VALUES", 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grid", [(13, 17), (1, 2), (3, 5), (6, 7), (10, 9)])
def test_classes_that_are_nowhere_the_best_are_not_resized(grid, layout, request):
    """Nor does that change a label, at the borders neither, whatever is resized at a time."""
    logits = torch.randn(1, 60, *grid, generator=torch.Generator().manual_seed(0)) - 9
    logits[0, 7] += 10
    logits[0, 50, -1, -1] += 14  # in one corner alone
    logits[0, 33, 0, 0] = logits[0, 7, 0, 0]
    logits = logits.contiguous(memory_format=layout)
    possible = class_maps._find_possible_classes(logits[0].permute(1, 2, 0).contiguous())
    assert possible[:, [7]].all() and possible[-1, 50] and not possible[:-1, 50].any() and possible.sum(1).max() < 20
    expected = resize_twice(logits, 4, (29, 61)).argmax(0)
    assert {7, 50} <= set(expected.unique().tolist())
    assert torch.equal(class_maps.find_classes(logits[0], 4, (29, 61)), expected)
    request.getfixturevalue("tiny_chunks")
    assert torch.equal(class_maps.find_classes(logits[0], 4, (29, 61)), expected)


@pytest.mark.parametrize("classes", [1, 2, 12, 13, 40])
@pytest.mark.parametrize(
    ("stride", "size"), [(4, (75, 86)), (4, (11, 300)), (1, (23, 27)), (1, (50, 9)), (2, (30, 61))]
)
def test_labels_are_those_of_two_resizes(classes, stride, size, monkeypatch):
    logits = write_regions(classes, 23, 27)
    expected = resize_twice(logits, stride, size).argmax(0)
    assert torch.equal(class_maps.find_classes(logits[0], stride, size), expected)
    assert torch.equal(class_maps.find_classes(logits[0].half(), stride, size),
                       resize_twice(logits.half().float(), stride, size).argmax(0))  # fmt: skip
    monkeypatch.setattr(class_maps, "_CHUNK", 5 * 23 * 27 * stride**2)  # a few classes at a time, as on a GPU
    assert torch.equal(class_maps._resize_all(logits, stride, size), expected)


def test_labels_do_not_depend_on_the_precision_of_products():
    logits = write_regions(40, 23, 27)
    expected = resize_twice(logits, 4, (75, 86)).argmax(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(class_maps.find_classes(logits[0], 4, (75, 86)), expected)


@pytest.mark.parametrize("classes", [3, 40])
def test_equal_logits_give_the_first_class(classes):
    """Everywhere, and where whole numbers are equal here and there."""
    assert not class_maps.find_classes(torch.full((classes, 13, 17), 0.7), 4, (39, 51)).any()
    logits = torch.randint(3, (classes, 13, 17), generator=torch.Generator().manual_seed(0)).float()
    twins = torch.cat([logits, logits])
    labels = class_maps.find_classes(twins, 4, (52, 68))  # at which all weights are exact
    assert torch.equal(labels, resize_twice(logits[None], 4, (52, 68)).argmax(0))


@pytest.mark.parametrize("classes", [3, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_reaches_the_pixels_of_its_cell(classes, value):
    """A class of minus infinity is nowhere, as models mask classes; NaN counts as the largest, as in an argmax."""
    logits = write_regions(classes, 13, 17)[0]
    expected = class_maps.find_classes(logits, 4, (52, 68))
    masked = logits.clone()
    masked[1] = value
    changed = logits.clone()
    changed[1, 6, 8] = value
    near = torch.zeros(52, 68, dtype=torch.bool)
    near[22:30, 30:38] = True  # the pixels that the cell has a share in
    labels = class_maps.find_classes(changed, 4, (52, 68))
    assert torch.equal(labels[~near], expected[~near])
    if value == float("-inf"):
        others = [index for index in range(classes) if index != 1]
        best = torch.tensor(others)[class_maps.find_classes(logits[others], 4, (52, 68))]
        assert torch.equal(class_maps.find_classes(masked, 4, (52, 68)), best) and not (labels[near] == 1).any()
    else:
        assert (class_maps.find_classes(masked, 4, (52, 68)) == 1).all() and (labels[near] == 1).all()


def test_backends_share_one_file(tmp_path):
    settings = {"size": {"shortest_edge": 64, "longest_edge": 200}, "do_reduce_labels": True, "logits_stride": 1}
    PROCESSORS[1](**settings).save_pretrained(tmp_path)
    loaded = [processor_class.from_pretrained(tmp_path) for processor_class in PROCESSORS]
    assert loaded[0].to_dict() == loaded[1].to_dict() and loaded[0].do_reduce_labels and loaded[0].logits_stride == 1
    inputs = [processor(noise(70, 95), labels_of(70, 95), return_tensors="pt") for processor in loaded]
    assert torch.equal(inputs[0].pixel_values, inputs[1].pixel_values)
    assert torch.equal(inputs[0]["labels"], inputs[1]["labels"])
