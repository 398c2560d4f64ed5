"""The README's first command does what it promises. (Its code and links: tests/docs.)"""

import os
import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
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
@pytest.mark.parametrize(
    ("options", "side", "wanted", "right_of_24"),
    [
        (["--epochs", "1", "--image_size", "32"], 32, 0.5, 12),
        pytest.param([], 64, 0.97, 21.6, marks=pytest.mark.slow),
    ],
    ids=["shorter", "as it stands"],
)
def test_quickstart(options, side, wanted, right_of_24, tmp_path):
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
    assert AutoImageProcessor.from_pretrained(tmp_path).size.height == side
    card = ModelCard.load(tmp_path / "README.md")
    assert [round(result.metric_value, 4) for result in card.data.eval_results] == [float(accuracy)]
    assert "trained by pvt_hf on `scikit-learn digits` from\nrandom weights. On the 360 validation" in card.content
    with Image.open(tmp_path / "predictions.png") as picture:
        assert picture.size == (1200, 800) and len(picture.convert("RGB").getcolors(10**6)) > 100
