"""The README's demonstrations on the bundled data, as a user starts them: `pytest -m slow` and this file."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.polyps import write_polyps
from tests.support.small_models import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The quickstart's folder, from which every detector starts."""
    folder = str(tmp_path_factory.mktemp("quickstart"))
    command = [sys.executable, "examples/quickstart.py", "--output_dir", folder]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    return folder


@pytest.fixture
def example(python, tmp_path):
    """Runs a program of `examples/`, and returns what is in its `eval_results.json`."""

    def run(name: str, output_dir: str, *arguments: str) -> dict[str, float]:
        result = python(ROOT / "examples" / f"{name}.py", "--output_dir", output_dir, *arguments)
        assert result.returncode == 0, result.stderr[-3000:]
        results = tmp_path / output_dir / "eval_results.json"
        return json.loads(results.read_text()) if results.exists() else {}

    return run


def test_retinanet_and_then_semantic_fpn_learn_digits(example, classifier):
    """From the quickstart's classifier a detector, and from its backbone a segmenter."""
    detector = example("train_detection", "detection", "--demo", "--backbone_checkpoint", classifier)
    assert detector["eval_AP50"] > 0.5
    segmenter = example("train_segmentation", "segmentation", "--demo", "--backbone_checkpoint", "detection")
    assert segmenter["eval_mIoU"] > 0.6


@pytest.mark.parametrize(("recipe", "epochs"), [("atss_3x_ms", 5), ("gfl_3x_ms", 4), ("cascade_mask_rcnn_3x_ms", 2)])
def test_detectors_of_pvt_v2_learn_digits(recipe, epochs, example, classifier):
    arguments = ["--demo", "--recipe", recipe, "--num_train_epochs", str(epochs)]
    detector = example("train_detection", "detection", *arguments, "--backbone_checkpoint", classifier)
    assert detector["eval_AP50"] > 0.5


def test_mask_rcnn_learns_digits(example, classifier):
    arguments = ["--demo", "--recipe", "mask_rcnn_1x", "--num_train_epochs", "3"]
    instances = example("train_detection", "instances", *arguments, "--backbone_checkpoint", classifier)
    assert instances["eval_mask_AP50"] > 0.4


@pytest.mark.parametrize("recipe", ["detr_50ep", "sparse_rcnn_3x_ms"])
def test_validation_loss_of_what_learns_slowly_falls(recipe, example, classifier):
    """DETR's falls from 14.4 to 13.9, Sparse R-CNN's from 12.6 after 120 steps to 11.0 after 241."""
    arguments = ["--demo", "--recipe", recipe, "--backbone_checkpoint", classifier, "--eval_steps", "180"]
    shorter = example("train_detection", "shorter", *arguments, "--max_steps", "180")
    longer = example("train_detection", "longer", *arguments, "--max_steps", "480")
    assert longer["eval_loss"] < shorter["eval_loss"]


def test_pvt_learns_to_segment_a_foreground_of_0_and_255(example, tmp_path):
    """352 x 352 images of blobs on textures, masks as PNG and JPEG: from random weights, in minutes on two cores."""
    data = write_polyps(tmp_path / "polyps", train=80, validation=24)
    folders = [data / split / kind for split in ("train", "validation") for kind in ("images", "masks")]
    names = ("--train_images", "--train_maps", "--eval_images", "--eval_maps")
    arguments = [str(value) for pair in zip(names, folders, strict=True) for value in pair]
    arguments += ["--binary_masks", "--loss", "cross_entropy+dice", "--max_steps", "120", "--learning_rate", "5e-4"]
    arguments += ["--shortest_edge", "128", "--longest_edge", "512", "--crop_size", "128"]
    arguments += ["--neck_channels", "64", "--head_channels", "64", "--per_device_train_batch_size", "8"]
    segmenter = example("train_segmentation", "polyps-run", *arguments, "--dataloader_num_workers", "0")
    assert segmenter["eval_dice_images"] > 0.9 and segmenter["eval_dice_set"] > 0.9
