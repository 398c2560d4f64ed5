"""Training of detectors: runs of the program, several processes, interruptions, and bad input that ends clearly."""

import dataclasses

import pytest
import torch
import transformers

from pvt_hf.data.detection import EvaluationDetections, read_coco
from pvt_hf.data.digits import write_scenes
from pvt_hf.data.images import ImageError
from pvt_hf.evaluation.metrics import COCO_METRICS
from pvt_hf.models.annotations import AnnotationError
from pvt_hf.training.optimization import step_multiplier
from tests.support.detection_run import build
from tests.support.training_processes import kill_after

ARCHITECTURES = pytest.mark.parametrize(
    "recipe", ["retinanet_1x", "mask_rcnn_3x_ms", "cascade_mask_rcnn_3x_ms", "sparse_rcnn_3x_ms", "detr_50ep"]
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", images=16, validation=5)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.process
@ARCHITECTURES
def test_run_follows_its_recipe(recipe, scenes, tmp_path):
    """The loss falls, every step has the schedule's rates, and validation images give a loss and COCO's numbers."""
    trainer = build(tmp_path, scenes, recipe=recipe, num_train_epochs=3, learning_rate=3e-3)
    trainer.train()
    steps, values = trainer.state.max_steps, losses(trainer)
    assert sum(values[-3:]) < sum(values[:3])
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    base = trainer.optimizer.param_groups[0]["initial_lr"]
    multipliers = [step_multiplier(trainer.recipe, step, trainer.steps_per_epoch, steps) for step in range(steps)]
    assert logged == pytest.approx([base * multiplier for multiplier in multipliers]) and len(set(logged)) > 1
    metrics = trainer.evaluate()
    parts = ("", "mask_") if "mask_rcnn" in recipe else ("",)
    # No digit is large: COCO's -1 is not taken for a number.
    assert trainer.unmeasured == [f"{part}{name}" for part in parts for name in ("AP_large", "AR_large")]
    names = {f"{part}{name}" for part in parts for name in COCO_METRICS} - {*trainer.unmeasured}
    assert {f"eval_{name}" for name in names} | {"eval_loss"} <= metrics.keys()
    logged = [value for entry in trainer.state.log_history for key, value in entry.items() if "eval_" in key]
    assert min(logged) >= 0
    assert metrics["eval_images"] == 5 and metrics == metrics | {
        key: value for key, value in trainer.evaluate().items() if key.startswith(("eval_A", "eval_mask", "eval_l"))
    }


@pytest.mark.parametrize(
    ("recipe", "threshold"), [("retinanet_1x", 0.05), ("atss_3x_ms", 0), ("gfl_3x_ms", 0.05), ("detr_50ep", 0)]
)
def test_evaluation_has_mmdetections_threshold(recipe, threshold, scenes, tmp_path):
    """ATSS's scores are products, and none of them is left out."""
    assert build(tmp_path, scenes, recipe=recipe).threshold == threshold


def test_detr_has_auxiliary_losses(scenes, tmp_path):
    """Auxiliary losses included, and accumulated batches are averaged."""
    trainer = build(tmp_path, scenes, recipe="detr_50ep")
    batch = next(iter(trainer.get_train_dataloader()))
    outputs = trainer.model(**{key: batch[key] for key in ("pixel_values", "pixel_mask", "labels")})
    assert {"loss_ce", "loss_ce_0"} <= outputs.loss_dict.keys() and not trainer.model_accepts_loss_kwargs


@pytest.mark.process
def test_killed_run_resumes_bit_for_bit(scenes, tmp_path):
    """SIGKILL within an epoch: same batches, augmentations, sampled regions, stochastic depth and rates to the end."""
    settings = {"recipe": "mask_rcnn_3x_ms", "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    killed = tmp_path / "killed"
    kill_after(killed / "checkpoint-6", "detection", settings | {"scenes": scenes})
    assert not (killed / "result-0.json").exists()
    uninterrupted = build(tmp_path / "uninterrupted", scenes, **settings)
    uninterrupted.train()
    resumed = build(killed, scenes, **settings)
    resumed.train(True)
    assert losses(resumed) == losses(uninterrupted) and len(losses(uninterrupted)) >= 8
    final = uninterrupted.model.state_dict()
    assert all(torch.equal(resumed.model.state_dict()[key], value) for key, value in final.items())


def test_loss_that_is_not_finite_ends_the_run(scenes, tmp_path):
    trainer = build(tmp_path, scenes)
    step, names = trainer.training_step, []

    def poisoned(model, inputs, *args):
        names.append(inputs["names"])
        if len(names) == 3:
            trainer.model.head.class_predictor.weight.data.fill_(float("inf"))
        return step(model, inputs, *args)

    trainer.training_step = poisoned
    with pytest.raises(FloatingPointError, match="The loss is nan at step 3") as error:
        trainer.train()
    assert all(name in str(error.value) for name in names[2])


@ARCHITECTURES
def test_images_without_objects_train(recipe, scenes, tmp_path):
    """Batches without a single object train: everything is background."""
    data = read_coco(scenes / "train" / "annotations.json", scenes / "train" / "images")
    empty = dataclasses.replace(data, records=[dataclasses.replace(record, annotations=[]) for record in data.records])
    with pytest.raises(AnnotationError, match="No image of 16 is left to train on"):
        build(tmp_path, scenes, recipe=recipe, data=empty)
    trainer = build(tmp_path, scenes, recipe=recipe, data=empty, empty=True, max_steps=4, learning_rate=3e-3)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_corrupt_image_is_named_or_skipped(scenes, tmp_path, monkeypatch, caplog):
    """An error with its name, or skipped and counted; never in an evaluation."""
    monkeypatch.setattr(transformers.utils.logging._get_library_root_logger(), "propagate", True)
    monkeypatch.setattr(transformers.utils.logging.get_logger("pvt_hf.data.detection"), "propagate", True)
    data = read_coco(scenes / "train" / "annotations.json", scenes / "train" / "images")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    record = next(record for record in data.records if record.annotations)
    records = [dataclasses.replace(r, stored=str(broken)) if r is record else r for r in data.records]
    data = dataclasses.replace(data, records=records)
    message = rf"{record.name} \(image {record.image_id}\) cannot be read"
    with pytest.raises(ImageError, match=message):
        build(tmp_path, scenes, data=data, num_train_epochs=1).train()
    trainer = build(tmp_path, scenes, data=data, num_train_epochs=1)
    trainer.train_dataset.skip_corrupt = True
    trainer.train()
    assert trainer.skipped_images() >= 1 and f"{record.name} (image {record.image_id}) cannot be read" in caplog.text
    with pytest.raises(ImageError, match=message):
        trainer.evaluate(EvaluationDetections(data))
