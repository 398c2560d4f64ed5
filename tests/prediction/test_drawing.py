"""Pictures of predictions: of a size that people can look at, with nothing over what the image shows."""

import numpy as np
import pytest
import torch

from pvt_hf.evaluation.visualization import pick_color
from pvt_hf.prediction.drawing import draw
from pvt_hf.prediction.predictions import Classification, Detections, Segmentation
from tests.support.predictors import draw_image

NAMES = ["background", "cat", "dog", "a name that is much too long to be written beside a picture of this size"]


@pytest.mark.parametrize(("size", "drawn"), [((28, 14), (512, 256)), ((600, 90), (600, 90)), ((4096, 64), (2048, 32))])
def test_classes_are_beside_the_image(size, drawn):
    image = draw_image(*size)
    picture = draw(image, Classification(NAMES, torch.tensor([0.1, 0.6, 0.2, 0.1])))
    assert picture.width > drawn[0] and picture.height >= drawn[1]
    expected = image.resize(drawn)
    np.testing.assert_array_equal(np.array(picture)[: drawn[1], : drawn[0]], np.array(expected))
    panel = np.array(picture)[:, drawn[0] :].reshape(-1, 3)
    assert (panel.min(axis=1) < 60).any() and len(np.unique(panel, axis=0)) > 3  # text and bars


def test_boxes_have_the_colour_of_their_class_and_an_empty_picture_says_so():
    image = draw_image(640, 480)
    boxes = torch.tensor([[50.0, 60, 300, 300], [320, 10, 630, 200]])
    found = Detections(NAMES, torch.tensor([0.9, 0.5]), torch.tensor([1, 2]), boxes, 0.3)
    pixels = np.array(draw(image, found))
    assert pixels.shape == (480, 640, 3)
    for row, column, label in ((200, 50, 1), (300, 200, 1), (100, 320, 2), (200, 500, 2)):
        assert tuple(pixels[row, column]) == pick_color(label)
    empty = np.array(draw(image, found.above(0.95)))
    changed = (empty != np.array(image)).any(axis=2)
    assert changed[-10:].any() and not changed[:400].any()


def test_legend_has_the_classes_that_are_there_and_counts_what_does_not_fit():
    image, labels = draw_image(640, 480), torch.zeros(480, 640, dtype=torch.int64)
    labels[100:200, 300:400] = 2
    pixels = np.array(draw(image, Segmentation(NAMES, labels)))
    legend = {tuple(color) for color in pixels[:, 640:].reshape(-1, 3)}
    assert pick_color(2) in legend and pick_color(1) not in legend and pick_color(3) not in legend
    hue = pixels[150, 350].astype(int) - pixels[150, 350].mean()
    assert np.corrcoef(hue, np.array(pick_color(2)))[0, 1] > 0.99  # a class is painted as its legend says
    many = torch.arange(480 * 640).reshape(480, 640) % 200
    picture = draw(image, Segmentation([f"class {label}" for label in range(200)], many))
    assert picture.height < 560  # and not 200 lines


@pytest.mark.parametrize("size", [(320, 240), (600, 90)])
def test_steady_pictures_have_one_size_whatever_is_found(size):
    image, names = draw_image(*size), [*NAMES, *map(str, range(50))]
    labels = torch.arange(size[0] * size[1]).reshape(size[::-1])
    scores = torch.eye(len(names)) + torch.linspace(0.1, 0.2, len(names))
    for pictures in (
        [draw(image, Segmentation(names, labels % count), steady=True) for count in (1, 54)],
        [draw(image, Classification(names, row.softmax(0)), steady=True) for row in scores[:2]],
    ):
        assert len({picture.size for picture in pictures}) == 1
        assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    assert draw(image, Segmentation(names, labels * 0)).width < pictures[0].width
