"""Training of detectors: runs of the program, several processes, interruptions, and bad input that ends clearly."""

import dataclasses
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time

import datasets
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import AutoModelForImageClassification, AutoModelForObjectDetection, pipeline

import pvt_hf
from pvt_hf.data.detection import EvaluationDetections, read_coco
from pvt_hf.data.digits import write_scenes
from pvt_hf.data.images import ImageError
from pvt_hf.evaluation.metrics import COCO_METRICS
from pvt_hf.models.annotations import AnnotationError
from pvt_hf.training.optimization import step_multiplier
from tests.support.detection_run import build, small_detector
from tests.support.small_models import ROOT, small_config

PROGRAM = str(ROOT / "examples" / "train_detection.py")
SYSTEMS = pytest.mark.parametrize("recipe", ["retinanet_1x", "mask_rcnn_3x_ms", "detr_50ep"])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", images=16, validation=5)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    AutoModelForImageClassification.from_config(small_config("v2")).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def program(monkeypatch):
    """Runs the example, or one of its functions, with these arguments in this process."""

    def run(*arguments, function="main"):
        monkeypatch.setattr(sys, "argv", [PROGRAM, *map(str, arguments)])
        return runpy.run_path(PROGRAM)[function]()

    return run


def coco_arguments(folder):
    arguments = []
    for name, split in (("train", "train"), ("eval", "validation")):
        arguments += [f"--{name}_annotations", folder / split / "annotations.json"]
        arguments += [f"--{name}_images", folder / split / "images"]
    return arguments


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_smoke_run(program, classifier, tmp_path, capsys):
    """Mask R-CNN from a classifier: what it says, saves and draws is what pycocotools finds in its json."""
    run = tmp_path / "run"
    arguments = ["--smoke", "--recipe", "mask_rcnn_1x", "--backbone_checkpoint", classifier, "--output_dir", run]
    program(*arguments, "--num_train_epochs", "1", "--disable_tqdm", "true")
    printed = capsys.readouterr().out
    count = len(pvt_hf.PvtV2Backbone.from_pretrained(classifier).state_dict())
    assert f"all {count} tensors of the backbone are from {classifier}" in printed
    assert "on 8 images\n0 corrupt images were left out" in printed
    measured = json.loads((run / "eval_results.json").read_text())
    card = ModelCard.load(run / "README.md")
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values.keys() == {"AP", "AP50", "mask_AP", "mask_AP50"} and card.data.pipeline_tag == "object-detection"
    truth = COCO(str(tmp_path / "scenes-16" / "validation" / "annotations.json"))
    for kind, prefix in (("bbox", ""), ("segm", "mask_")):
        found = json.loads((run / "predictions.json").read_text())
        if kind == "segm":
            found = [{key: value for key, value in result.items() if key != "bbox"} for result in found]
        evaluation = COCOeval(truth, truth.loadRes(found), kind)
        for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
            step()
        numbers = dict(zip([f"eval_{prefix}{name}" for name in COCO_METRICS], evaluation.stats, strict=True))
        assert measured == measured | {key: pytest.approx(value, abs=1e-9) for key, value in numbers.items()}
        assert values[f"{prefix}AP50"] == pytest.approx(evaluation.stats[1], abs=1e-9)
    assert not list(run.glob("*.incomplete")) and not list(run.glob("scenes*"))
    for name in ("curves.png", "predictions.png"):
        with Image.open(run / name) as picture:
            assert len(picture.convert("RGB").getcolors(10**7)) > 100
        assert f"]({name})" in card.content
    detections = pipeline("object-detection", model=str(run), threshold=0.0)(Image.new("RGB", (150, 120)))
    assert all(detection["label"] in "0123456789" for detection in detections)
    with pytest.raises(SystemExit, match="--resume_from_checkpoint true goes on from them"):
        program(*arguments)


def test_fine_tuning_on_other_classes(program, scenes, tmp_path, capsys):
    """From a checkpoint with ten classes to a data set of the Hub with two; the ids of the json stay in the results."""
    build(tmp_path / "first", scenes).save_model()
    content = json.loads((scenes / "validation" / "annotations.json").read_text())
    rows = []
    for image in content["images"]:
        own = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        objects = {"bbox": [entry["bbox"] for entry in own], "category": [entry["category_id"] % 2 for entry in own]}
        path = scenes / "validation" / "images" / image["file_name"]
        rows.append({"image_id": image["id"], "image": str(path), "objects": objects})
    label = datasets.ClassLabel(names=["even", "odd"])
    objects = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(label)}
    features = {"image_id": datasets.Value("int64"), "image": datasets.Image(), "objects": objects}
    data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    data.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "data.parquet"))
    program(
        *("--smoke", "--model_name_or_path", tmp_path / "first", "--dataset_name", tmp_path / "data.parquet"),
        *("--output_dir", tmp_path / "second", "--num_train_epochs", "1", "--warmup_iterations", "0"),
        *("--disable_tqdm", "true", "--save_strategy", "no"),
    )
    first, second = (AutoModelForObjectDetection.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert second.config.id2label == {0: "even", 1: "odd"} and first.config.num_labels == 10
    assert "on 5 images" in capsys.readouterr().out
    # One step with the recipe's small rate moves nothing far: the rest really came from the checkpoint.
    torch.testing.assert_close(second.neck.state_dict(), first.neck.state_dict(), atol=2e-3, rtol=0)


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


def test_bad_input_of_the_program(program, scenes, classifier, tmp_path):
    """It ends before any work is done, with a message that says what to change."""
    wrong = tmp_path / "wrong"
    for split in ("train", "validation"):
        (wrong / split).mkdir(parents=True)
        content = json.loads((scenes / split / "annotations.json").read_text())
        del content["categories"]
        (wrong / split / "annotations.json").write_text(json.dumps(content))
    arguments = ["--smoke", "--output_dir", tmp_path / "run", "--disable_tqdm", "true"]
    with pytest.raises(AnnotationError, match=r"annotations.json is not COCO json: it has no list \['categories'\]"):
        program(*arguments, *coco_arguments(wrong))
    with pytest.raises(SystemExit, match="--train_annotations, .* and --eval_images go together"):
        program(*arguments, *coco_arguments(scenes)[:4])
    with pytest.raises(SystemExit, match="a RetinaNetConfig has no fields \\['neck_chanels'\\]"):
        program(*arguments, *coco_arguments(scenes), "--config_overrides", '{"neck_chanels": 8}')
    fewer = tmp_path / "fewer"
    shutil.copytree(scenes, fewer)
    content = json.loads((fewer / "validation" / "annotations.json").read_text())
    content["categories"].pop()
    content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] < 10]
    (fewer / "validation" / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="Training has the classes .*'9'], evaluation .*'8']"):
        program(*arguments, *coco_arguments(fewer))
    small_detector("retinanet").save_pretrained(tmp_path / "detector")
    with pytest.raises(SystemExit, match="--recipe detr_50ep is not for a pvt_hf_retinanet"):
        program(*arguments, "--recipe", "detr_50ep", "--model_name_or_path", tmp_path / "detector")
    with pytest.raises(SystemExit, match="is not a pvt_v2_b2"):
        program(*arguments, "--variant", "pvt_v2_b2", "--backbone_checkpoint", classifier)
    with pytest.raises(ValueError, match="`warmup_iterations` must be less than the 10 steps .* got 500"):
        program(*arguments, *coco_arguments(scenes), "--warmup_iterations", "500")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_defaults_of_a_recipe_reach_the_program(program, tmp_path):
    """Without arguments it is the official run, its rate scaled to the real number of images per step."""

    def parsed(*arguments):
        options, args = program("--output_dir", tmp_path / "x", *arguments, function="parse_arguments")
        numbers = (args.learning_rate, args.weight_decay, args.max_grad_norm, args.num_train_epochs)
        return numbers, options.recipe

    assert parsed()[0] == (pytest.approx(1e-4 * 2 / 16), 1e-4, 0, 12)
    assert parsed("--recipe", "detr_50ep", "--variant", "pvt_small")[0] == (pytest.approx(1.25e-5), 1e-4, 0.1, 50)
    numbers, recipe = parsed("--recipe", "mask_rcnn_3x_ms", "--per_device_train_batch_size", "8")
    assert numbers == (pytest.approx(5e-5), 0.05, 0, 36) and not recipe.decays_norms
    numbers, _ = parsed("--recipe", "mask_rcnn_1x", "--variant", "pvt_v2_b5", "--gradient_accumulation_steps", "4")
    assert numbers == (pytest.approx(2e-4 / 1.4), 1e-4, 0, 12)
    numbers, recipe = parsed("--learning_rate", "0.01", "--num_train_epochs", "3", "--shortest_edges", "96", "128")
    assert numbers == (0.01, 1e-4, 0, 3) and recipe.shortest_edges == [96, 128] and recipe.longest_edge == 1333
