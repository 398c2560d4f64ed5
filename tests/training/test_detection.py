"""Training of detectors: runs of the program, several processes, interruptions, and bad input that ends clearly."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import transformers
from transformers import AutoModelForObjectDetection

from pvt_hf.data.detection import EvaluationDetections, read_coco
from pvt_hf.data.digits import write_scenes
from pvt_hf.data.images import ImageError
from pvt_hf.evaluation.metrics import COCO_METRICS
from pvt_hf.models.annotations import AnnotationError
from pvt_hf.training.optimization import step_multiplier
from tests.support.detection_run import build
from tests.support.small_models import ROOT

SYSTEMS = pytest.mark.parametrize("recipe", ["retinanet_1x", "mask_rcnn_3x_ms", "detr_50ep"])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", images=16, validation=5)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@SYSTEMS
def test_run_of_a_recipe(recipe, scenes, tmp_path):
    """The loss falls, every step has the schedule's rates, and validation images give a loss and COCO's numbers."""
    trainer = build(tmp_path, scenes, recipe=recipe, num_train_epochs=3, learning_rate=3e-3)
    trainer.train()
    steps, values = trainer.state.max_steps, losses(trainer)
    assert sum(values[-3:]) < sum(values[:3])
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    base = trainer.optimizer.param_groups[0]["initial_lr"]
    factors = [step_multiplier(trainer.recipe, step, trainer.steps_per_epoch, steps) for step in range(steps)]
    assert logged == pytest.approx([base * factor for factor in factors]) and len(set(logged)) > 1
    metrics = trainer.evaluate()
    parts = ("", "mask_") if recipe.startswith("mask") else ("",)
    assert {f"eval_{part}{name}" for part in parts for name in COCO_METRICS} | {"eval_loss"} <= metrics.keys()
    assert metrics["eval_images"] == 5 and metrics == metrics | {
        key: value for key, value in trainer.evaluate().items() if key.startswith(("eval_A", "eval_mask", "eval_l"))
    }


def test_official_loss_of_detr(scenes, tmp_path):
    """Auxiliary losses included, and accumulated batches are averaged."""
    trainer = build(tmp_path, scenes, recipe="detr_50ep")
    batch = next(iter(trainer.get_train_dataloader()))
    outputs = trainer.model(**{key: batch[key] for key in ("pixel_values", "pixel_mask", "labels")})
    assert {"loss_ce", "loss_ce_0"} <= outputs.loss_dict.keys() and not trainer.model_accepts_loss_kwargs


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_command(output_dir, settings: dict, processes: int = 1) -> list[str]:
    command = [
        sys.executable,
        str(ROOT / "tests" / "support" / "detection_run.py"),
        str(output_dir),
        json.dumps(settings),
    ]
    if processes == 1:
        return command
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    return [sys.executable, *launch, *command[1:]]


def test_two_processes(scenes, tmp_path):
    """Both see the numbers that one process sees: of five images, one comes to both and counts once."""
    settings = {"scenes": str(scenes), "recipe": "mask_rcnn_1x", "max_steps": 3, "per_device_train_batch_size": 2}
    settings |= {"per_device_eval_batch_size": 1}  # in a batch, an image's padding depends on the others
    command = run_command(tmp_path, settings, processes=2)
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in (0, 1))
    assert first["metrics"]["eval_images"] == 5 and set(first["seen"]) | set(second["seen"]) == set(range(1, 6))
    assert len(first["seen"]) == len(second["seen"]) == 3
    alone = build(tmp_path / "alone", scenes, recipe="mask_rcnn_1x", per_device_eval_batch_size=1)
    alone.model.load_state_dict(AutoModelForObjectDetection.from_pretrained(tmp_path).state_dict())
    expected = alone.evaluate()
    for key in [f"eval_{part}{name}" for part in ("", "mask_") for name in COCO_METRICS]:
        assert first["metrics"][key] == second["metrics"][key] == pytest.approx(expected[key], abs=1e-6), key
    together, single = (
        json.loads((folder / "predictions.json").read_text()) for folder in (tmp_path, tmp_path / "alone")
    )
    assert len(single) > 0
    for results in (together, single):
        results.sort(key=lambda result: (result["image_id"], -result["score"], result["category_id"]))
    assert [result["image_id"] for result in together] == [result["image_id"] for result in single]
    assert [result["score"] for result in together] == pytest.approx([result["score"] for result in single], abs=1e-5)


def test_killed_and_resumed(scenes, tmp_path):
    """SIGKILL within an epoch: same batches, augmentations, sampled regions, stochastic depth and rates to the end."""
    settings = {"recipe": "mask_rcnn_3x_ms", "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    killed = tmp_path / "killed"
    command = run_command(killed, settings | {"scenes": str(scenes), "slow": 0.3})
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment(), **silent)
    try:
        while not (killed / "checkpoint-6" / "complete.json").exists():
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "result-0.json").exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in that process, for the same bits
    try:
        whole = build(tmp_path / "whole", scenes, **settings)
        whole.train()
        expected = {key: value.clone() for key, value in whole.model.state_dict().items()}
        resumed = build(killed, scenes, **settings)
        resumed.train(True)
    finally:
        torch.set_num_threads(threads)
    assert losses(resumed) == losses(whole) and len(losses(whole)) >= 8
    assert all(torch.equal(resumed.model.state_dict()[key], value) for key, value in expected.items())


def test_loss_that_is_not_finite(scenes, tmp_path):
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


@SYSTEMS
def test_only_empty_images(recipe, scenes, tmp_path):
    """Batches without a single object train: everything is background."""
    data = read_coco(scenes / "train" / "annotations.json", scenes / "train" / "images")
    empty = dataclasses.replace(data, records=[dataclasses.replace(record, annotations=[]) for record in data.records])
    with pytest.raises(AnnotationError, match="No image of 16 is left to train on"):
        build(tmp_path, scenes, recipe=recipe, data=empty)
    trainer = build(tmp_path, scenes, recipe=recipe, data=empty, empty=True, max_steps=4, learning_rate=3e-3)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_unreadable_image(scenes, tmp_path, monkeypatch, caplog):
    """An error with its name, or left out and counted; never in an evaluation."""
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
