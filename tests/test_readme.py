"""The README's first command does what it promises. (Its code and links: tests/docs.)"""

import os
import re
import subprocess
import sys

import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from tests.support.pages import read_blocks
from tests.support.small_models import ROOT


def test_first_commands():
    assert [block.text for block in read_blocks(ROOT / "README.md", "bash")] == [
        'pip install ".[training]" && python examples/quickstart.py\n',
        'pip install ".[test]" && pytest\n',
    ]


@pytest.mark.process
@pytest.mark.timeout(900)
def test_quickstart(tmp_path):
    """The first command as it stands: accuracy, checkpoint, reload in another process, picture."""
    # Two threads that other tests keep from running wait for each other most of the time.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "examples/quickstart.py", "--output_dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    accuracy, right, shown = re.search(r"accuracy ([\d.]+); (\d+) of (\d+) right", result.stdout).groups()
    assert float(accuracy) >= 0.97 and int(right) >= 0.9 * int(shown) == 0.9 * 24
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
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    common = ["--data_dir", str(tmp_path / "images"), "--epochs", "1", "--batch_size", "4"]
    for arguments in (
        ["--variant", "pvt_tiny", "--image_size", "32", "--output_dir", str(tmp_path / "first")],
        ["--model_name_or_path", str(tmp_path / "first"), "--output_dir", str(tmp_path / "second")],
    ):
        command = [sys.executable, "examples/quickstart.py", *common, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
        assert result.returncode == 0, result.stderr
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "second")
    assert model.config.model_type == "pvt" and model.config.id2label == {0: "bright", 1: "dark"}
    assert (tmp_path / "second" / "predictions.png").exists()
