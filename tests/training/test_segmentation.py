"""Training and evaluation of segmenters: mmcv's schedule, metrics against a slow evaluation, resume, bad input."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import UperNetConfig, UperNetForSemanticSegmentation

import pvt_hf
from pvt_hf.evaluation.metrics import mean_iou_metric
from pvt_hf.recipes import SEGMENTATION_RECIPES
from pvt_hf.training.optimization import freeze_stages, polynomial_multiplier, segmentation_parameter_groups
from tests.support.segmentation_run import build, losses, write_data
from tests.support.small_models import STAGES, assert_close, randomize, small_config
from tests.support.training_processes import kill_after


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def slow_metrics(trainer, windows=None, num_labels: int = 11) -> tuple[dict, list[float], list[torch.Tensor]]:
    """One image after the other, class by class: metrics, IoU of the classes, and the predictions."""
    union, inter, labelled = torch.zeros(3, num_labels)
    total, pixels = 0.0, 0
    model, maps = trainer.model.eval(), []
    for index in range(len(trainer.eval_dataset)):
        image, labels = trainer.eval_dataset.data.read(index)
        pixel_values = trainer.processing_class(image, return_tensors="pt").pixel_values
        with torch.no_grad():
            logits = (
                pvt_hf.sliding_window_logits(model, pixel_values, *windows) if windows else model(pixel_values).logits
            )
        network = F.interpolate(logits, pixel_values.shape[-2:], mode="bilinear", align_corners=False)
        prediction = F.interpolate(network, labels.shape, mode="bilinear", align_corners=False).argmax(1)[0]
        maps.append(prediction)
        for label in range(num_labels):
            found, true = (prediction == label) & (labels != 255), labels == label
            inter[label] += (found & true).sum()
            union[label] += (found | true).sum()
            labelled[label] += true.sum()
        small = F.interpolate(labels[None, None].double(), pixel_values.shape[-2:], mode="nearest")[0].long()
        total += F.cross_entropy(network, small, ignore_index=255, reduction="sum").item()
        pixels += int((small != 255).sum())
    iou = inter / union
    metrics = {"mIoU": iou.nanmean(), "mAcc": (inter / labelled).nanmean(), "aAcc": inter.sum() / labelled.sum()}
    return {key: float(value) for key, value in metrics.items()} | {"loss": total / pixels}, iou.tolist(), maps


def test_schedule_is_mmcvs_at_every_step():
    """mmcv's `PolyLrUpdaterHook` with `power=0.9, min_lr=0.0, by_epoch=False`."""
    recipe = SEGMENTATION_RECIPES["semantic_fpn_40k"]
    assert (recipe.steps, recipe.learning_rate, recipe.reference_batch_size) == (40_000, 2e-4, 32)
    assert (recipe.weight_decay, recipe.max_grad_norm, recipe.loss_normalization) == (1e-4, 0.0, "all")
    for step in range(recipe.steps):
        coefficient = (1 - step / 40_000) ** 0.9
        expected = (2e-4 - 0.0) * coefficient + 0.0
        assert 2e-4 * polynomial_multiplier(recipe.power, step, 1000, recipe.steps) == pytest.approx(
            expected, rel=1e-12
        )
    assert (
        polynomial_multiplier(recipe.power, 40_000, 1000, 40_000) == polynomial_multiplier(0.9, 40_001, 1, 40_000) == 0
    )


def test_every_parameter_is_decayed(data, tmp_path):
    """Norms, biases and position embeddings too, as in mmsegmentation; frozen stages are skipped."""
    backbone = small_config("v1", out_features=STAGES)
    model = pvt_hf.SemanticFPNForSemanticSegmentation(pvt_hf.SemanticFPNConfig(backbone_config=backbone))
    (group,) = segmentation_parameter_groups(model, 2e-4, 1e-4)
    assert group["names"] == [name for name, _ in model.named_parameters()]
    assert (group["lr"], group["weight_decay"]) == (2e-4, 1e-4)
    assert any("position_embeddings" in name for name in group["names"])
    frozen = freeze_stages(model, 1)
    (group,) = segmentation_parameter_groups(model, 2e-4, 1e-4)
    assert frozen and set(frozen).isdisjoint(group["names"]) and len(group["params"]) == len(group["names"])


def test_run_follows_its_recipe(data, tmp_path):
    """The rate at each step, one group, and the loss falls."""
    trainer = build(tmp_path, data, max_steps=12, learning_rate=3e-3)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([3e-3 * (1 - step / 12) ** 0.9 for step in range(12)])
    (group,) = trainer.optimizer.param_groups
    assert group["weight_decay"] == 1e-4 and len(group["params"]) == len(list(trainer.model.parameters()))
    assert sum(losses(trainer)[-3:]) < 0.9 * sum(losses(trainer)[:3])


@pytest.mark.parametrize("window", [None, 32], ids=["whole", "windows"])
def test_metrics_are_those_of_a_slow_evaluation(window, data, tmp_path):
    """Also per class in a table, and through the metric of `evaluate`."""
    trainer = build(tmp_path, data, trainer={"window": window, "stride": window and 20})
    randomize(trainer.model, std=0.3)
    metrics = trainer.evaluate()
    expected, iou, maps = slow_metrics(trainer, window and (window, 20))
    for key, value in expected.items():
        assert metrics[f"eval_{key}"] == pytest.approx(value, rel=1e-4), key
    assert metrics["eval_images"] == 5 and len(torch.cat([labels.flatten() for labels in maps]).unique()) > 2
    with (tmp_path / "eval_classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [str(label) for label in range(11)]
    np.testing.assert_allclose([float(row["IoU"] or "nan") for row in rows], iou, rtol=1e-5)
    metric = mean_iou_metric(11)
    metric.add_batch(predictions=maps, references=[trainer.eval_dataset[index]["labels"] for index in range(5)])
    assert metric.compute()["mean_iou"] == pytest.approx(metrics["eval_mIoU"], rel=1e-9)


def test_window_that_covers_the_image_equals_the_whole_image(data, tmp_path):
    """The logits at the network's size: the same two resizes as for the whole image."""
    trainer = build(tmp_path, data)
    randomize(trainer.model, std=0.3)
    whole = trainer.evaluate()
    trainer.predictor = replace(trainer.predictor, window=500, stride=300)
    windows = trainer.evaluate()
    for key in ("mIoU", "mAcc", "aAcc", "loss"):
        assert windows[f"eval_{key}"] == pytest.approx(whole[f"eval_{key}"], rel=1e-5)
    assert trainer.processing_class.logits_stride == 4
    with pytest.raises(ValueError, match="`window` and `stride` go together, got 32 and None"):
        build(tmp_path, data, trainer={"window": 32})


@pytest.mark.parametrize("normalization", ["all", "valid"])
def test_accumulated_batches_train_as_one(normalization, data, tmp_path):
    """4 times 2 images are 8, although the crops have different numbers of ignored pixels."""
    settings = {"fixed_norms": True, "optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    settings |= {"fields": {"loss_normalization": normalization, "classifier_dropout": 0.0}}
    runs = []
    for batch_size, accumulated in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulated}
        trainer = build(tmp_path, data, drop_path_rate=0.0, **settings, **sizes)
        trainer.train()
        runs.append((losses(trainer), trainer.model.state_dict()))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-4)
    assert_close(runs[1][1], runs[0][1])


def test_ignored_pixels_are_marked_for_the_count(data, tmp_path):
    """What `Trainer` counts is what the loss divides by."""
    batches = {}
    for normalization in ("all", "valid"):
        trainer = build(tmp_path, data, fields={"loss_normalization": normalization})
        batches[normalization] = torch.cat([batch["labels"] for batch in trainer.get_train_dataloader()])
    ignored = batches["all"] == 255
    assert 0 < ignored.sum() < ignored.numel() and not (batches["all"] < 0).any()
    assert torch.equal(batches["valid"], batches["all"].masked_fill(ignored, -100))


@pytest.mark.process
def test_killed_run_resumes_bit_for_bit(data, tmp_path):
    """SIGKILL in the second epoch: the same losses and weights, statistics of the norms included."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 10}
    uninterrupted = build(tmp_path / "uninterrupted", data, **settings)
    uninterrupted.train()
    killed = tmp_path / "killed"
    kill_after(killed / "checkpoint-8", "segmentation", settings | {"scenes": data})  # the epoch has 6
    assert not (killed / "result-0.json").exists()
    resumed = build(killed, data, **settings)
    resumed.train(True)
    assert losses(resumed)[-2:] == losses(uninterrupted)[-2:]
    final = resumed.model.state_dict()
    assert all(torch.equal(final[key], value) for key, value in uninterrupted.model.state_dict().items())


def test_upernet_is_evaluated_at_its_own_stride(data, tmp_path):
    """UperNet: its logits are as large as its input, and the saved image processor says so."""
    names = {"id2label": {label: str(label) for label in range(11)}}
    names["label2id"] = {name: label for label, name in names["id2label"].items()}
    backbone = small_config("v2", out_features=STAGES)
    config = UperNetConfig(backbone_config=backbone, hidden_size=8, auxiliary_in_channels=24, pool_scales=[1], **names)
    trainer = build(tmp_path, data, model=UperNetForSemanticSegmentation(config), max_steps=2)
    trainer.train()
    metrics, (expected, *_) = trainer.evaluate(), slow_metrics(trainer)
    assert {key: metrics[f"eval_{key}"] for key in expected} == pytest.approx(expected, rel=1e-4)
    trainer.save_model()
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["logits_stride"] == 1


def test_images_that_are_ignored_altogether_do_no_harm(data, tmp_path):
    """A batch without a label has the loss 0, also with weights that are trained on; and it is not evaluated."""
    for path in (*(data / "train" / "maps").glob("*.png"), *(data / "validation" / "maps").glob("*.png")):
        target = tmp_path / path.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", Image.open(path).size, 255).save(target)
    for split in ("train", "validation"):
        (tmp_path / split / "images").symlink_to(data / split / "images")
    for normalization in ("all", "valid"):
        trainer = build(tmp_path / "run", tmp_path, fields={"loss_normalization": normalization}, max_steps=2)
        trainer.train()
        assert losses(trainer) == [0, 0]
        assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    metrics = trainer.evaluate()
    assert metrics["eval_images"] == 5 and not {"eval_loss", "eval_mIoU"} & metrics.keys()
    assert trainer.unmeasured == ["mIoU", "mAcc", "aAcc"]
