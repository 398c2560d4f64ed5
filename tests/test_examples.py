"""The programs in `examples/`, as a user starts them. (The quickstart is in `test_readme.py`.)"""

import io
import json
import re
import runpy
import sys

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from pvt_hf import build_config
from pvt_hf.training.run_checkpoints import CheckpointError
from tests.support.small_models import ROOT

TRAIN, EVALUATE = (str(ROOT / "examples" / name) for name in ("train_classification.py", "evaluate.py"))
SMOKE = ["--smoke", "--disable_tqdm", "true", "--num_train_epochs", "1"]


def test_smoke_run_is_published_and_measured_again(python, hub, tmp_path):
    """Training on bundled data, pushed to a Hub; the evaluation of that repository gives the number of its card."""
    arguments = ["--output_dir", "run", "--ema_decay", "0.9", "--push_to_hub", "true", "--hub_model_id", "me/digits"]
    arguments += ["--hub_strategy", "checkpoint"]
    result = python(TRAIN, *SMOKE, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"eval: top-1 0\.\d+, top-5 0\.\d+ on 360 images\nema: top-1", result.stdout)
    files = {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", "curves.png"}
    files |= {"last-checkpoint/model.safetensors", "last-checkpoint/complete.json"}  # pushed when it was whole
    assert files <= hub.repos["me/digits"].keys() and (tmp_path / "run" / "ema" / "model.safetensors").exists()
    card = ModelCard(hub.repos["me/digits"]["README.md"].decode())
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    accuracy = next(result.metric_value for result in card.data.eval_results if result.metric_type == "accuracy")
    assert "trained by pvt_hf on `scikit-learn digits`" in card.content and "| official |" in card.content
    assert f"**{100 * accuracy:.2f} %** top-1" in card.content and "More information" not in card.content
    with Image.open(io.BytesIO(hub.repos["me/digits"]["curves.png"])) as picture:
        assert picture.size == (1000, 700) and len(picture.convert("RGB").getcolors(10**6)) > 100

    result = python(EVALUATE, "--model_name_or_path", "me/digits", "--output_dir", "measured", "--num_workers", "0")
    assert result.returncode == 0, result.stderr[-3000:]
    measured = json.loads((tmp_path / "measured" / "results.json").read_text())["me/digits"]
    assert measured["accuracy"] == pytest.approx(100 * accuracy) and measured["images"] == 360
    assert f"| me/digits | accuracy |  | {100 * accuracy:.2f} |  | 360 |" in result.stdout

    assert results["eval_accuracy"] == accuracy and results["ema_images"] == 360
    assert "The averaged weights (in `ema`) reach **" in card.content

    again = python(TRAIN, *SMOKE, "--output_dir", "run")
    assert again.returncode == 1 and "--resume_from_checkpoint true goes on from them" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "pvt_small", "--model_name_or_path", "{checkpoint}"], "checkpoint is not a pvt_small"),
        (["--lora_rank", "4"], "--lora_rank adapts a trained model"),
        (["--train_val_split", "0.2", "--streaming"], "--train_val_split needs all the images"),
        (["--dataset_name", "x/*.tar"], "pass --eval_dataset_name with those for evaluation"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere is not a whole checkpoint: there is no such folder"),
    ],
)
def test_wrong_command_lines(arguments, message, tmp_path, monkeypatch):
    """Before anything is trained."""
    build_config("pvt_v2_b0", depths=[1, 1, 1, 1]).save_pretrained(tmp_path / "checkpoint")
    arguments = [argument.format(checkpoint=tmp_path / "checkpoint") for argument in arguments]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "--smoke", "--use_cpu", "true", *arguments])
    with pytest.raises((SystemExit, CheckpointError), match=message):
        runpy.run_path(TRAIN, run_name="__main__")


def test_smoke_run_of_a_stream(tmp_path, monkeypatch, capsys):
    """Streamed digits: one epoch of them all, and every validation image is counted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", *SMOKE, "--streaming", "--use_cpu", "true", "--output_dir", "run"])
    runpy.run_path(TRAIN, run_name="__main__")
    assert "on 360 images" in capsys.readouterr().out
    state = json.loads(next((tmp_path / "run").glob("checkpoint-*/trainer_state.json")).read_text())
    assert state["global_step"] == 1437 // 32


@pytest.mark.slow
def test_three_epochs_in_two_processes(python, tmp_path):
    """Digits, launched by accelerate: it learns, goes on where it ended, and counts every validation image once."""
    arguments = ["--variant", "pvt_v2_b0", "--image_size", "32", "--num_train_epochs", "3", "--learning_rate", "2e-4"]
    arguments += ["--per_device_train_batch_size", "16", "--warmup_epochs", "0", "--output_dir", "run"]
    arguments += ["--repeats", "1", "--mixup", "0", "--cutmix", "0", "--drop_path_rate", "0"]
    arguments += ["--dataloader_num_workers", "0", "--seed", "1", "--use_cpu", "true", "--disable_tqdm", "true"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", TRAIN]
    result = python(*launch, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    first = re.search(r"top-1 ([\d.]+), top-5 ([\d.]+) on 360 images", result.stdout)
    print(first[0])
    assert float(first[1]) > 0.5
    again = python(*launch, *arguments, "--resume_from_checkpoint", "true")
    assert again.returncode == 0 and first[0] in again.stdout
