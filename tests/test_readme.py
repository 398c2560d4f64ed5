"""The README is true: its code runs, its first command does what it promises."""

import os
import re
import subprocess
import sys

import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from pvt_hf.commands.main import COMMANDS, main
from tests.support.small_models import ROOT

README = (ROOT / "README.md").read_text()


def fenced(info: str) -> list[str]:
    """The contents of the blocks that start with exactly this info string."""
    return re.findall(rf"^```{info}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_first_commands():
    assert fenced("bash") == [
        'pip install ".[training]" && python examples/quickstart.py\n',
        'pip install ".[test]" && pytest\n',
    ]


@pytest.mark.process
def test_python_examples_run():
    namespace = {}
    for block in fenced("python"):
        exec(block, namespace)
    assert namespace["logits"].shape == (2, 10)


def help_of(command: str, capsys) -> str:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return capsys.readouterr().out


@pytest.mark.process
def test_every_option_exists(capsys):
    """Those of each command line by its own `--help`, those that the text names by that of any program."""
    helps = {command: help_of(command, capsys) for command in COMMANDS}
    joined = README.replace("\\\n", " ")
    lines = re.findall(
        r"^(?:pvt-hf|accelerate launch -m pvt_hf\.commands\.)\s?([\w-]+)(.*)$", joined, flags=re.MULTILINE
    )
    assert len(lines) >= 12 and {name.replace("_", "-") for name, _ in lines} == set(COMMANDS)
    for name, arguments in lines:
        for option in re.findall(r"(?<!\S)--[\w-]+", arguments.split(" #")[0]):
            assert re.search(rf"{option}\b(?!-)", helps[name.replace("_", "-")]), (name, option)
    programs = [(ROOT / "examples" / f"{name}.py").read_text() for name in ("benchmark",)]
    known = "\n".join([*helps.values(), *programs])
    for option in re.findall(r"`[^`\n]*?(--[a-z][\w-]+)", README):
        assert re.search(rf"{option}\b", known), option


@pytest.mark.process
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("options", "wanted", "right_of_24"),
    [(["--epochs", "2"], 0.5, 12), pytest.param([], 0.97, 21.6, marks=pytest.mark.slow)],
    ids=["shorter", "as it stands"],
)
def test_quickstart(options, wanted, right_of_24, tmp_path):
    """The first command: accuracy, checkpoint, reload in another process, picture. As it stands it takes minutes."""
    # Two threads that other tests keep from running wait for each other most of the time.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "examples/quickstart.py", "--output_dir", str(tmp_path), *options]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    accuracy, right, shown = re.search(r"accuracy ([\d.]+); (\d+) of (\d+) right", result.stdout).groups()
    assert float(accuracy) >= wanted and int(right) >= right_of_24 and int(shown) == 24
    assert (tmp_path / "model.safetensors").exists()
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.id2label[7] == "7"
    assert AutoImageProcessor.from_pretrained(tmp_path).size.height == 64
    with Image.open(tmp_path / "predictions.png") as picture:
        assert picture.size == (1200, 800) and len(picture.convert("RGB").getcolors(10**6)) > 100


@pytest.mark.process
def test_quickstart_on_an_image_folder_and_a_checkpoint(tmp_path):
    """A stranger's folders of images: v1 from random weights, then again from the checkpoint this leaves."""
    for index in range(24):
        folder = tmp_path / "images" / ("bright", "dark")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + index, 50), color=(10 * index, 128, 255 * (index % 2))).save(folder / f"{index}.png")
    common = ["quickstart", "--data_dir", str(tmp_path / "images"), "--epochs", "1", "--batch_size", "4"]
    for arguments in (
        ["--variant", "pvt_tiny", "--image_size", "32", "--output_dir", str(tmp_path / "first")],
        ["--model_name_or_path", str(tmp_path / "first"), "--output_dir", str(tmp_path / "second")],
    ):
        assert main([*common, *arguments]) == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "second")
    assert model.config.model_type == "pvt" and model.config.id2label == {0: "bright", 1: "dark"}
    assert (tmp_path / "second" / "predictions.png").exists()
