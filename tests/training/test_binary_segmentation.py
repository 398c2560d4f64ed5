"""Segmenters of a foreground: Dice and IoU, losses against libraries and slow loops, and a recipe for small sets."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSemanticSegmentation, TrainingArguments

import pvt_hf
from pvt_hf.data.augmentation import SegmentationAugmentation
from pvt_hf.data.segmentation import EvaluationMaps, TrainingMaps, read_segmentation_folders
from pvt_hf.recipes import SEGMENTATION_RECIPES, SegmentationRecipe, fit_segmentation_recipe
from pvt_hf.training.segmentation import SegmentationTrainer
from pvt_hf.training.segmentation_losses import SegmentationLoss, balance_classes, dice_loss
from tests.support.polyps import write_polyps
from tests.support.small_models import STAGES, small_config


@pytest.fixture(scope="module")
def polyps(tmp_path_factory):
    return write_polyps(tmp_path_factory.mktemp("polyps"), train=4, validation=4, size=48)


def build(output_dir, polyps, **settings) -> SegmentationTrainer:
    backbone = small_config("v2", out_features=STAGES)
    names = {"id2label": {0: "background", 1: "polyp"}, "label2id": {"background": 0, "polyp": 1}}
    config = pvt_hf.SemanticFPNConfig(backbone_config=backbone, neck_channels=8, head_channels=8, **names)
    processor = pvt_hf.PvtSegmentationImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
    train, validation = (
        read_segmentation_folders(polyps / split / "images", polyps / split / "masks", num_labels=2, binary_masks=True)
        for split in ("train", "validation")
    )
    return SegmentationTrainer(
        model=AutoModelForSemanticSegmentation.from_config(config),
        args=TrainingArguments(
            output_dir=str(output_dir), report_to="none", use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4
        ),
        recipe=SegmentationRecipe(crop_size=64),
        train_dataset=TrainingMaps(train, SegmentationAugmentation(64, 256, crop=(64, 64))),
        eval_dataset=EvaluationMaps(validation, processor),
        processing_class=processor,
        **settings,
    )


def slow_scores(truth, prediction) -> tuple[float, float]:
    """Dice and IoU from sets of pixels."""
    one, other = ({tuple(place) for place in np.argwhere(values == 1)} for values in (truth, prediction))
    if not one | other:
        return 1.0, 1.0
    return 2 * len(one & other) / (len(one) + len(other)), len(one & other) / len(one | other)


def test_dice_and_iou_of_the_foreground_over_images_and_over_the_set(polyps, tmp_path, monkeypatch):
    """Right, wrong, nothing predicted, and nothing there; ignored pixels count for neither."""
    trainer = build(tmp_path, polyps)
    truth = [trainer.eval_dataset.data.read(index)[1].clone() for index in range(4)]
    truth[3].zero_()
    predictions = [truth[0].roll(3, 0), truth[1].roll(-5, 1), torch.zeros_like(truth[2]), torch.zeros_like(truth[3])]
    for labels in truth:
        labels[:4] = 255
    rows = trainer.eval_dataset
    monkeypatch.setattr(
        EvaluationMaps, "__getitem__", lambda _, index: {"pixel_values": torch.zeros(3, 64, 64), "labels": truth[index]}
    )
    given = iter(predictions)
    trainer.predictor = lambda model, views, size: (next(given), torch.zeros(1, 2, 16, 16))
    metrics = trainer.evaluate(rows)
    counted = [(labels[4:].numpy(), found[4:].numpy()) for labels, found in zip(truth, predictions, strict=True)]
    slow = np.array([slow_scores(*pair) for pair in counted])
    over_set = slow_scores(*(np.concatenate(arrays) for arrays in zip(*counted, strict=True)))
    assert 0 < slow[0, 0] < 1 and slow[2, 0] == 0 and slow[3, 0] == 1
    assert [metrics[f"eval_{key}_images"] for key in ("dice", "iou")] == pytest.approx(slow.mean(axis=0))
    assert [metrics[f"eval_{key}_set"] for key in ("dice", "iou")] == pytest.approx(over_set)
    assert trainer.metric_names["dice_images"] == "Dice of polyp (mean over images)"
    assert trainer.metric_names["iou_set"] == "IoU of polyp (over the set)"
    *_, row = (tmp_path / "eval_classes.csv").read_text().splitlines()
    assert row.split(",")[0] == "polyp" and [float(value) for value in row.split(",")[1:3]] == pytest.approx(
        over_set[::-1]
    )


def test_class_without_validation_pixels_is_a_warning_beside_miou(polyps, tmp_path, monkeypatch, caplog):
    trainer = build(tmp_path, polyps)
    truth = torch.zeros(48, 48, dtype=torch.int64)
    monkeypatch.setattr(
        EvaluationMaps, "__getitem__", lambda *_: {"pixel_values": torch.zeros(3, 64, 64), "labels": truth}
    )
    trainer.evaluate()
    message = "mIoU says nothing about ['polyp']: no pixel of the validation set has them."
    assert message in caplog.text and trainer._describe_missing() == message
    *_, last = trainer.describe_classes().split("\n")
    assert re.fullmatch(r"  polyp: (IoU 0.0000, Dice 0.0000, )?no ground truth", last)
    *_, row = (tmp_path / "eval_classes.csv").read_text().splitlines()
    assert re.fullmatch(r"polyp,(0.0)?,(0.0)?,,0", row)
    truth[0, 0] = 1
    trainer.evaluate()
    assert not trainer._describe_missing()


def test_metrics_of_a_foreground_that_is_nowhere_are_left_out(polyps, tmp_path, monkeypatch):
    """Neither NaN nor a loss of 0 is logged; images without it are right where it is not predicted."""
    trainer = build(tmp_path, polyps)
    truth = torch.zeros(48, 48, dtype=torch.int64)
    monkeypatch.setattr(
        EvaluationMaps, "__getitem__", lambda *_: {"pixel_values": torch.zeros(3, 64, 64), "labels": truth}
    )
    trainer.predictor = lambda model, views, size: (torch.zeros_like(truth), torch.zeros(1, 2, 16, 16))
    metrics = trainer.evaluate()
    assert trainer.unmeasured == ["dice_set", "iou_set"] and metrics["eval_dice_images"] == 1
    assert trainer.describe_classes().endswith("\n  polyp: no ground truth")
    truth.fill_(255)
    metrics = trainer.evaluate()
    assert not {"eval_loss", "eval_mIoU", "eval_aAcc"} & metrics.keys()
    assert all(value == value for entry in trainer.state.log_history for value in entry.values())


def pixels(seed=0, classes=3, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, 5, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (2, 5, 6), generator=generator)
    return logits, labels.masked_fill(torch.rand(2, 5, 6, generator=generator) < ignored, -100)


@pytest.mark.parametrize("classes", [2, 3])
def test_dice_loss_is_that_of_segmentation_models_and_of_a_slow_loop(classes):
    from segmentation_models_pytorch.losses import DiceLoss

    logits, labels = pixels(classes=classes)
    labels[labels == classes - 1] = 0  # a class that is nowhere counts as 0
    expected = DiceLoss("multiclass", ignore_index=-100)(logits, labels)
    assert float(dice_loss(logits, labels)) == pytest.approx(float(expected), rel=1e-6)
    total = 0.0
    for label in range(classes - 1):
        overlap = both = 0.0
        for batch, row, column in torch.argwhere(labels != -100).tolist():
            probability = float(logits[batch, :, row, column].softmax(0)[label])
            true = float(labels[batch, row, column] == label)
            overlap, both = overlap + probability * true, both + probability + true
        total += 1 - 2 * overlap / both
    assert float(dice_loss(logits, labels)) == pytest.approx(total / classes, rel=1e-9)
    assert float(dice_loss(logits, torch.full_like(labels, -100))) == 0


def test_losses_add_up_with_their_weights():
    """Cross-entropy against a slow loop; logits of another size are resized to the labels."""
    logits, labels = pixels()
    weights = [0.5, 2.0, 3.0]
    summed = [
        -weights[labels[place]] * float(logits[place[0], :, place[1], place[2]].log_softmax(0)[labels[place]])
        for place in map(tuple, torch.argwhere(labels != -100).tolist())
    ]
    outputs = {"logits": logits}
    weighted = SegmentationLoss("cross_entropy", weights)(outputs, labels)
    assert float(weighted) == pytest.approx(sum(summed) / len(summed), rel=1e-9)
    plain = SegmentationLoss("cross_entropy")(outputs, labels)
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels))
    both = SegmentationLoss("cross_entropy+dice", weights)(outputs, labels)
    torch.testing.assert_close(both, weighted + dice_loss(logits, labels))
    torch.testing.assert_close(SegmentationLoss("dice")(outputs, labels), dice_loss(logits, labels))
    large = F.interpolate(logits, (10, 12), mode="bilinear", align_corners=False)
    twice = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(SegmentationLoss("dice")(outputs, twice), dice_loss(large, twice))
    with pytest.raises(ValueError, match="`name` must be one of cross_entropy, dice, .*, got 'focal'"):
        SegmentationLoss("focal")
    with pytest.raises(ValueError, match="`class_weights` are of the cross-entropy"):
        SegmentationLoss("dice", weights)


def test_balanced_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.repeat([0, 1, 2], [70, 20, 10])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert balance_classes([70, 20, 10]) == pytest.approx(expected)
    assert balance_classes([70, 0, 20, 10]) == pytest.approx([expected[0], 0, *expected[1:]])


def test_parts_of_an_accumulated_batch_add_up_to_its_loss():
    """Whatever their ignored pixels; the Dice loss is a mean of those of the parts."""
    logits, labels = pixels()
    labels[1, :3] = -100
    valid = (labels != -100).sum(dim=(1, 2))
    for name, weights in (("cross_entropy", [0.5, 2.0, 3.0]), ("dice", None)):
        loss = SegmentationLoss(name, weights)
        parts = [loss({"logits": logits[i : i + 1]}, labels[i : i + 1], valid.sum()) for i in range(2)]
        alone = torch.stack([loss({"logits": logits[i : i + 1]}, labels[i : i + 1]) for i in range(2)])
        torch.testing.assert_close(sum(parts), (alone * valid).sum() / valid.sum())
        if name == "cross_entropy":
            torch.testing.assert_close(sum(parts), loss({"logits": logits}, labels))
    assert float(loss({"logits": logits}, labels.fill_(-100), 0)) == 0


def test_loss_of_choice_is_what_is_trained(polyps, tmp_path):
    """Instead of the model's own, with the pixels marked that `Trainer` shall not count."""
    trainer = build(tmp_path, polyps, loss=SegmentationLoss("dice"))
    (batch,) = trainer.get_train_dataloader()
    batch = {"pixel_values": batch["pixel_values"], "labels": batch["labels"]}
    batch["labels"][:, :8] = -100
    expected = dice_loss(
        F.interpolate(trainer.model.eval()(batch["pixel_values"]).logits, (64, 64), mode="bilinear"), batch["labels"]
    )
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), expected)
    assert trainer.data_collator.ignore_index == -100 and not (batch["labels"] == 255).any()


def test_recipe_for_small_sets_fits_the_data():
    """Sizes of the images to the next multiple of 32, steps of 50 epochs; the paper's recipe is what it is."""
    small, paper = SEGMENTATION_RECIPES["small_data"], SEGMENTATION_RECIPES["semantic_fpn_40k"]
    sizes = [(352, 352)] * 700 + [(300, 900)] * 300
    fitted = fit_segmentation_recipe(small, sizes, images_per_step=16)
    assert (fitted.shortest_edge, fitted.longest_edge, fitted.crop_size) == (352, 1408, 352)
    assert fitted.steps == math.ceil(50 * 1000 / 16)
    few, many = (fit_segmentation_recipe(small, [(2000, 3000)] * count, 4) for count in (10, 10**6))
    assert (few.steps, many.steps, few.crop_size) == (1000, 40_000, 512)
    assert fit_segmentation_recipe(small, [(20, 30)], 4).crop_size == 64
    assert fit_segmentation_recipe(paper, sizes, 16) is paper
    assert (paper.steps, paper.crop_size, paper.scales, paper.loss_normalization) == (40_000, 512, (0.5, 2.0), "all")
    assert fitted.scales == (0.75, 1.25)
