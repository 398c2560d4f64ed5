"""The trainers and the training programs on a GPU: no step waits, resumed runs have the same bits, bf16 trains."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, TrainerCallback

from pvt_hf.commands import train_classification, train_detection, train_segmentation
from pvt_hf.data.digits import write_scenes
from pvt_hf.training.segmentation_losses import SegmentationLoss
from tests.support import classification_run, detection_run, segmentation_run
from tests.support.small_models import small_config

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

RICH = {"mixup": 0.8, "cutmix": 1.0, "repeats": 3, "random_erasing": 0.25, "auto_augment": "rand-m9-mstd0.5-inc1"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", images=16, validation=5)


@pytest.fixture
def places(device) -> dict:
    """Arguments of a trainer that computes there."""
    return {"use_cpu": device.type == "cpu"}


class ForbidWaits(TrainerCallback):
    """From the end of the second step to that of the fifth, waiting for the GPU is an error."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda" and state.global_step in (2, 5):
            torch.cuda.set_sync_debug_mode("error" if state.global_step == 2 else "default")

    def on_train_end(self, args, state, control, **kwargs):
        assert state.global_step >= 5


@pytest.fixture
def waits_again():
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


def forbid_waits(trainer):
    trainer.add_callback(ForbidWaits())
    trainer.train()


@pytest.mark.usefixtures("waits_again")
@pytest.mark.parametrize("workers", [0, 2])
def test_step_of_a_classifier_does_not_wait(workers, places, tmp_path):
    """Copies to the GPU, Mixup, loss and its check, backward pass, clipping, optimiser, schedule and EMA."""
    trainer = classification_run.build(
        tmp_path,
        recipe=RICH,
        model={"drop_path_rate": 0.2},
        trainer={"ema_decay": 0.9, "channels_last": True},
        bf16=True,
        max_grad_norm=1.0,
        max_steps=6,
        logging_steps=6,
        dataloader_num_workers=workers,
        **places,
    )
    forbid_waits(trainer)


@pytest.mark.usefixtures("waits_again")
@pytest.mark.parametrize(
    "loss",
    [None, SegmentationLoss("cross_entropy+dice"), SegmentationLoss("cross_entropy", [1.0] * 11)],
    ids=["own", "dice", "weighted"],
)
def test_step_of_a_segmenter_does_not_wait(loss, scenes, places, tmp_path):
    segmenter = {"bf16": True, "max_steps": 6, "logging_steps": 6, "gradient_accumulation_steps": 2}
    forbid_waits(segmentation_run.build(tmp_path, scenes, trainer={"loss": loss}, **segmenter, **places))


@pytest.mark.parametrize("task", ["classification", "segmentation", "detection"])
def test_resumed_run_has_the_same_bits(task, scenes, places, tmp_path, monkeypatch):
    """With everything that is random, where the kernels are deterministic."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "bf16": True} | places
    if task == "classification":
        more = {"recipe": RICH, "model": {"drop_path_rate": 0.2}, "trainer": {"ema_decay": 0.9}}
        build = lambda folder: classification_run.build(folder, **settings, **more)  # noqa: E731
    elif task == "segmentation":
        build = lambda folder: segmentation_run.build(folder, scenes, **settings)  # noqa: E731
    else:
        build = lambda folder: detection_run.build(folder, scenes, **settings)  # noqa: E731
    uninterrupted = build(tmp_path / "run")
    uninterrupted.train()
    expected = {key: value.clone() for key, value in uninterrupted.model.state_dict().items()}
    first = load_file(tmp_path / "run" / "checkpoint-3" / "model.safetensors")
    assert any(not torch.equal(first[key].to(value.device), value) for key, value in expected.items() if key in first)
    resumed = build(tmp_path / "run")
    resumed.train(str(tmp_path / "run" / "checkpoint-3"))
    differences = {
        key: (value - resumed.model.state_dict()[key]).abs().max().item()
        for key, value in expected.items()
        if not torch.equal(resumed.model.state_dict()[key], value)
    }
    if task == "classification":
        assert not differences
    else:  # bilinear upsampling and RoI align add up in any order, backwards
        assert all(difference < 1e-3 for difference in differences.values()), differences


def test_batches_come_in_pinned_memory(places, tmp_path):
    """From where copies need not be waited for."""
    trainer = classification_run.build(tmp_path, max_steps=2, **places)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].is_pinned() == (not places["use_cpu"])


def test_loss_that_is_no_number_ends_the_run(places, tmp_path):
    trainer = classification_run.build(tmp_path, max_steps=6, **places)
    with torch.no_grad():
        trainer.model.classifier.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="The loss is nan at step 1 "):
        trainer.train()


@pytest.fixture
def run(places, tmp_path, capsys):
    """Runs a training program; gives its folder and what it printed."""

    def run_program(program, *arguments) -> tuple:
        more = ["--smoke", "--bf16", "true", "--disable_tqdm", "true", "--use_cpu", str(places["use_cpu"]).lower()]
        program.main([*more, "--output_dir", str(tmp_path / "run"), "--eval_strategy", "no", *map(str, arguments)])
        return tmp_path / "run", capsys.readouterr().out

    return run_program


@pytest.fixture
def classifier(tmp_path):
    folder = tmp_path / "classifier"
    AutoModelForImageClassification.from_config(small_config("v2")).save_pretrained(folder)
    return folder


def test_program_for_classification(run):
    arguments = ("--ema_decay", "0.9", "--mixup", "0.8", "--max_steps", "4", "--channels_last")
    folder, output = run(train_classification, *arguments)
    assert re.search(r"eval: top-1 0\.\d+, top-5 0\.\d+ on 360 images\nema: top-1", output)
    assert (folder / "ema" / "model.safetensors").exists()


@pytest.mark.parametrize("recipe", ["retinanet_1x", "mask_rcnn_1x"])
def test_program_for_detection(recipe, run, classifier):
    overrides = json.dumps(detection_run.HEADS[recipe.rpartition("_")[0]])
    arguments = ("--recipe", recipe, "--backbone_checkpoint", classifier, "--config_overrides", overrides)
    folder, output = run(train_detection, *arguments, "--num_train_epochs", "1")
    assert "on 8 images" in output and (folder / "predictions.png").exists()


def test_program_for_segmentation(run, classifier):
    folder, output = run(train_segmentation, "--backbone_checkpoint", classifier, "--max_steps", 4)
    assert re.search(r"eval: mIoU ([\d.]+), .* on 9 images", output) and (folder / "predictions.png").exists()


@pytest.mark.parametrize("recipe", ["atss_3x_ms", "cascade_mask_rcnn_3x_ms", "sparse_rcnn_3x_ms", "detr_50ep"])
def test_detectors_train_and_are_evaluated(recipe, scenes, places, tmp_path):
    trainer = detection_run.build(tmp_path, scenes, recipe=recipe, bf16=True, max_steps=4, **places)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_images"] == 5 and 0 <= metrics["eval_AP"] <= 1


@pytest.mark.parametrize("precision", ["fp16", "torch_compile"])
def test_settings_of_trainer_work(precision, places, tmp_path):
    """Scaled gradients, and a compiled model."""
    if places["use_cpu"]:
        pytest.skip("a GPU's")
    trainer = classification_run.build(tmp_path, max_steps=4, **{precision: True}, **places)
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
