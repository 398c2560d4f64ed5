"""Pictures of detections: everything is where it should be, in its class's colour."""

import numpy as np
import pytest
import torch
from PIL import Image

from pvt_hf.data.detection import DetectionData, ImageRecord
from pvt_hf.evaluation.metrics import coco_results
from pvt_hf.evaluation.visualization import class_color, draw_detections, draw_objects
from pvt_hf.models.annotations import encode_mask

GREY = torch.full((3, 80, 120), 100, dtype=torch.uint8)
BOX = torch.tensor([[30.0, 40, 70, 60]])


def pixels(picture):
    return np.asarray(picture).astype(int)


def test_boxes_and_masks():
    """The outline lies on the box, the mask is tinted within its own outline, the rest is the image."""
    mask = torch.zeros(1, 80, 120, dtype=torch.bool)
    mask[0, 44:56, 40:60] = True
    drawn = pixels(draw_objects(GREY, BOX, [2], ["a", "b", "c"], masks=mask))
    color = np.array(class_color(2))
    for y, x in ((40, 69), (60, 50), (50, 30), (50, 70), (44, 50), (55, 59)):
        assert (drawn[y, x] == color).all(), (y, x)
    assert (drawn[50, 50] == (0.55 * 100 + 0.45 * color).round()).all()
    assert (drawn[42, 35] == 100).all() and (drawn[70:] == 100).all() and (drawn[:, 80:] == 100).all()


def test_size_and_scores():
    """Twice as high: boxes move along; a score makes the plate above the box wider."""
    plain, scored = (pixels(draw_objects(GREY, BOX, [0], ["a"], scores, height=160)) for scores in (None, [0.5]))
    assert plain.shape == scored.shape == (160, 240, 3)
    for drawn in (plain, scored):
        assert (drawn[100, 60] == class_color(0)).all() and (drawn[100, 140] == class_color(0)).all()
    widths = [((drawn == class_color(0)).all(axis=2)[72]).sum() for drawn in (plain, scored)]
    assert 0 < widths[0] < widths[1]


@pytest.mark.parametrize("box", [[0, 0, 20, 10], [110, 70, 120, 80], [0, 0, 120, 80]])
def test_names_stay_in_the_picture(box):
    """A plate is as large in a corner as in the middle."""

    def plate(place):
        drawn = pixels(draw_objects(GREY, torch.tensor([place]).float(), [1], ["", "name"]))
        return (drawn != 100).any(axis=2).sum()

    inside = plate([40, 40, 60, 50])
    assert plate(box) > 0.5 * inside


def test_nothing_to_draw():
    assert (pixels(draw_objects(GREY, torch.zeros(0, 4), [], ["a"], [], [])) == 100).all()


def test_colors_of_neighbouring_classes_differ():
    colors = np.array([class_color(label) for label in range(80)])
    assert len(np.unique(colors, axis=0)) == 80
    assert np.abs(np.diff(colors, axis=0)).sum(axis=1).min() > 150


@pytest.mark.parametrize("masks", [False, True])
def test_sheet(masks, tmp_path):
    """Perfect detections look like the annotations but for their scores; low scores are not drawn."""
    mask = np.zeros((80, 120), dtype=bool)
    mask[45:55, 40:60] = True
    annotation = {"bbox": [30, 40, 40, 20], "category_id": 1, "segmentation": encode_mask(mask)}
    records = []
    for number in range(3):
        path = tmp_path / f"{number}.png"
        Image.fromarray(GREY.permute(1, 2, 0).numpy()).save(path)
        records.append(ImageRecord(number, path.name, (80, 120), [annotation][: number + 1], str(path)))
    data = DetectionData(["a", "b"], [4, 9], records)

    def sheet(score):
        found = {"scores": torch.tensor([score]), "labels": torch.tensor([1]), "boxes": BOX}
        found |= {"masks": torch.from_numpy(mask)[None]} if masks else {}
        return pixels(draw_detections(data, coco_results([found] * 3, [0, 1, 2], [4, 9]), size=(80, 200)))

    good, poor = sheet(0.9), sheet(0.2)
    assert good.shape == poor.shape == (32 + 2 * 88, 2 * (244 + 16), 3)
    left, right = good[32:112, 8:128], good[32:112, 132:252]
    assert (left[42:] == right[42:]).all() and (left != right).any()
    assert (poor[32:112, 132:252] == 100).all() and (poor[32:112, 8:128] == left).all()
    assert ((left[50, 50] != 100).any()) == masks
    assert (good[120:200, 268:512] == 255).all()  # three images, four places
