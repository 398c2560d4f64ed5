"""Pictures of objects and of label maps: everything is where it should be, in its class's colour."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from pvt_hf.data.detection import DetectionData, ImageRecord
from pvt_hf.evaluation.metrics import coco_results
from pvt_hf.evaluation.visualization import (
    draw_classes,
    draw_detections,
    draw_objects,
    draw_overlays,
    overlay,
    pick_color,
)
from pvt_hf.models.annotations import encode_mask
from pvt_hf.training.report import plot_curves

GREY = torch.full((3, 80, 120), 100, dtype=torch.uint8)
BOX = torch.tensor([[30.0, 40, 70, 60]])


def pixels(picture):
    return np.asarray(picture).astype(int)


def test_boxes_and_masks_are_where_they_belong():
    """The outline lies on the box, the mask is tinted within its own outline, the rest is the image."""
    mask = torch.zeros(1, 80, 120, dtype=torch.bool)
    mask[0, 44:56, 40:60] = True
    drawn = pixels(draw_objects(GREY, BOX, [2], ["a", "b", "c"], masks=mask))
    color = np.array(pick_color(2))
    for y, x in ((40, 69), (60, 50), (50, 30), (50, 70), (44, 50), (55, 59)):
        assert (drawn[y, x] == color).all(), (y, x)
    assert (drawn[50, 50] == (0.55 * 100 + 0.45 * color).astype(int)).all()
    assert (drawn[42, 35] == 100).all() and (drawn[70:] == 100).all() and (drawn[:, 80:] == 100).all()


def test_boxes_move_along_and_scores_need_room():
    """Twice as high: boxes move along; a score makes the plate above the box wider."""
    plain, scored = (pixels(draw_objects(GREY, BOX, [0], ["a"], scores, height=160)) for scores in (None, [0.5]))
    assert plain.shape == scored.shape == (160, 240, 3)
    for drawn in (plain, scored):
        assert (drawn[100, 60] == pick_color(0)).all() and (drawn[100, 140] == pick_color(0)).all()
    widths = [((drawn == pick_color(0)).all(axis=2)[72]).sum() for drawn in (plain, scored)]
    assert 0 < widths[0] < widths[1]


@pytest.mark.parametrize("box", [[0, 0, 20, 10], [110, 70, 120, 80], [0, 0, 120, 80]])
def test_names_stay_in_the_picture(box):
    """A plate is as large in a corner as in the middle."""

    def plate(place):
        drawn = pixels(draw_objects(GREY, torch.tensor([place]).float(), [1], ["", "name"]))
        return (drawn != 100).any(axis=2).sum()

    inside = plate([40, 40, 60, 50])
    assert plate(box) > 0.5 * inside


def test_no_objects_leave_the_image_as_it_is():
    assert (pixels(draw_objects(GREY, torch.zeros(0, 4), [], ["a"], [], [])) == 100).all()


def test_colors_of_neighbouring_classes_differ():
    colors = np.array([pick_color(label) for label in range(151)])
    assert len(np.unique(colors, axis=0)) == 151
    assert np.abs(np.diff(colors, axis=0)).sum(axis=1).min() > 150


@pytest.mark.parametrize("masks", [False, True])
def test_sheet_shows_truth_beside_detections(masks, tmp_path):
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


def test_best_object_is_on_top():
    masks = torch.zeros(2, 80, 120, dtype=torch.bool)
    masks[0, 30:60, 40:70] = masks[1, 30:60, 60:90] = True
    drawn = pixels(
        draw_objects(GREY, torch.tensor([[30.0, 20, 75, 70], [50, 20, 100, 70]]), [3, 1], "abcd", masks=masks)
    )
    best, other = (np.array(pick_color(label)) for label in (3, 1))
    assert (drawn[69, 60] == best).all() and (drawn[69, 90] == other).all()  # where one box crosses the other, and not
    assert (drawn[70, 40:75] == best).all()
    assert np.abs(drawn[45, 65] - drawn[45, 45]).sum() < np.abs(drawn[45, 65] - drawn[45, 80]).sum()


def test_overlays_show_classes_over_brightness(tmp_path):
    """The classes' colours over the image's brightness, black where ignored, and a legend of what is there."""
    colors = [pick_color(label) for label in range(151)]
    image = torch.full((3, 40, 60), 100, dtype=torch.uint8)
    truth = torch.zeros(40, 60, dtype=torch.int64)
    truth[:20, :30], truth[30:] = 150, 255
    painted = overlay(image, truth, colors)
    expected = (0.65 * torch.tensor(colors[150]) + 0.35 * 100).to(torch.uint8)
    assert torch.equal(painted[:, 0, 0], expected) and not painted[:, 35].any()
    assert not torch.equal(painted[:, 25, 0], expected) and painted.shape == image.shape
    assert not overlay(image, torch.full_like(truth, 255), colors).any()
    names = {label: f"class {label}" for label in range(151)}
    draw_overlays([(image, truth, truth.clamp(max=150))] * 2, names, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        shown = np.array(picture.convert("RGB")).reshape(-1, 3)
    assert all((shown == color).all(1).sum() > 1000 for color in (expected.tolist(), [0, 0, 0], [100, 100, 100]))
    assert ((shown == colors[150]).all(1)).sum() > 50  # the legend


def test_names_are_drawn_as_they_are(tmp_path, monkeypatch):
    """In legends too, where matplotlib reads mathematics between dollars, and hides what begins with an underscore."""
    names = dict(enumerate(["$x^2$", "_private", r"$\frac$", "a\nb\x1b[31m", "", "long " * 40, "ignored"]))
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **options: figures.append(figure))
    labels = torch.arange(7).repeat(7, 1)
    draw_overlays([(torch.zeros(3, 7, 7, dtype=torch.uint8), labels, labels)], names, tmp_path / "overlays.png")
    plot_curves([{"epoch": 1, "eval_x": 0.5}], tmp_path / "curves.png", {"x": "Dice of $polyp_1$"})
    legends = [axes.get_legend() for figure in figures for axes in figure.axes if axes.get_legend()]
    shown = [text.get_text() for legend in legends for text in legend.get_texts()]
    assert shown[:5] == ["$x^2$", "_private", r"$\frac$", r"a\nb\x1b[31m", ""]
    assert shown[6:] == ["ignored", "validation Dice of $polyp_1$"]
    assert len(shown[5]) == 39 and shown[5].startswith("long long") and "\u2026" in shown[5]
    for figure in figures:
        FigureCanvasAgg(figure).draw()  # which fails at \\frac unless it is text
    drawn = [pixels(draw_objects(GREY, BOX, [0], [name])) for name in ("a\nb", r"a\nb", "x" * 300)]
    assert (drawn[0] == drawn[1]).all()


def test_classes_stand_below_their_images():
    """Eight beside each other; a class that is right is green, and another red; long names fit."""
    images = [Image.new("RGB", (40, 20), (0, 0, 200)), Image.new("L", (20, 40), 77)]
    samples = [(images[0], "cat", "cat", 0.5)] * 8 + [(images[1], "cat", "$dog_" * 20, 1.0)]
    drawn = pixels(draw_classes(samples))
    height, width = drawn.shape[0] // 2, drawn.shape[1] // 8
    assert (drawn[height // 2, width // 2] == (0, 0, 200)).all() and (
        drawn[height // 2, -width // 2] == (0, 0, 200)
    ).all()
    assert (drawn[height + height // 2, width // 2] == 77).all() and (
        drawn[height + height // 2, width * 2 :] == 255
    ).all()
    lines = drawn[height - 20 : height, :width], drawn[2 * height - 20 : 2 * height]
    right, wrong = (line.astype(int) for line in lines)
    assert ((right[..., 1] > right[..., 0] + 50).any()) and not (right[..., 0] > right[..., 1] + 50).any()
    columns = np.flatnonzero((wrong[..., 0] > wrong[..., 1] + 50).any(0))
    assert len(columns) and columns.max() < width
    assert draw_classes(samples[:3]).width == 3 * (draw_classes(samples).width - 4) // 8 + 4
