"""Segmentation of a foreground as the README says it, start to end: train, evaluate, predict."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

import pvt_hf
from pvt_hf.commands import evaluate, predict, train_segmentation
from pvt_hf.commands.main import main as start
from tests.support.polyps import write_polyps
from tests.support.small_models import ROOT, small_config

pytestmark = pytest.mark.process
NAMES = ("--train_images", "--train_maps", "--eval_images", "--eval_maps")


@pytest.fixture(scope="module")
def polyps(tmp_path_factory):
    return write_polyps(tmp_path_factory.mktemp("polyps"), train=8, validation=3, size=64)


def folders(data) -> list[str]:
    pairs = [data / split / kind for split in ("train", "validation") for kind in ("images", "masks")]
    return [str(value) for pair in zip(NAMES, pairs, strict=True) for value in pair]


def train(data, output_dir, *arguments) -> None:
    arguments = ["--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none", *map(str, arguments)]
    arguments += ["--dataloader_num_workers", "0", "--output_dir", str(output_dir)]
    train_segmentation.main([*folders(data), *arguments])


@pytest.fixture(scope="module")
def run(polyps, tmp_path_factory):
    """A short run of UperNet from a classifier's backbone, and what it prints."""
    folder = tmp_path_factory.mktemp("run")
    pvt_hf.PvtV2ForImageClassification(small_config("v2")).save_pretrained(folder / "classifier")
    return folder


def test_train_evaluate_and_predict(run, polyps, capsys, monkeypatch):
    """Losses, heads and sizes of choice; the same metrics from `evaluate`; masks of 0 and 255 from `predict`."""
    monkeypatch.chdir(run)
    arguments = ["--backbone_checkpoint", "classifier", "--head", "upernet", "--head_channels", "8", "--binary_masks"]
    arguments += [
        "--loss",
        "cross_entropy+dice",
        "--class_weights",
        "auto",
        "--max_steps",
        "10",
        "--save_strategy",
        "no",
    ]
    train(polyps, "trained", *arguments, "--learning_rate", "1e-3", "--per_device_train_batch_size", "4")
    output = capsys.readouterr().out
    assert re.search(r"8 training images: background [\d,]+ pixels in 8 maps; foreground [\d,]+ pixels in 8", output)
    assert "10 steps of 4 crops of 64 x 64 pixels" in output and output.count("'eval_dice_images'") >= 10
    for name in ("Dice", "IoU"):
        for over in ("mean over images", "over the set"):
            assert re.search(rf"{name} of foreground \({over}\) [\d.]+", output)
    assert re.search(r"foreground: IoU [\d.]+, Dice [\d.]+, accuracy [\d.]+, [\d,]+ pixels", output)
    model = AutoModelForSemanticSegmentation.from_pretrained("trained")
    assert model.config.model_type == "upernet" and model.config.id2label == {0: "background", 1: "foreground"}
    processor = AutoImageProcessor.from_pretrained("trained")
    assert (processor.size.shortest_edge, processor.logits_stride) == (64, 1)

    image = torch.from_numpy(np.array(Image.open(polyps / "validation" / "images" / "0.jpg"))).permute(2, 0, 1)
    pixel_values = processor(image, return_tensors="pt").pixel_values
    with torch.no_grad():  # so short a run finds nothing: the classes shall both be there
        model.decode_head.classifier.bias -= model(pixel_values).logits.mean((0, 2, 3))
    model.save_pretrained("trained")
    data = ["--images", str(polyps / "validation" / "images"), "--maps", str(polyps / "validation" / "masks")]
    common = ["--dataloader_num_workers", "0", "--model_name_or_path", "trained"]
    measured = {}
    for name, options in (
        ("plain", []),
        ("more", ["--window", "48", "--stride", "32", "--tta_scales", "1.5", "--tta_flip"]),
    ):
        evaluate.main([*common, *data, "--binary_masks", *options, "--output_dir", name])
        assert re.search(r"foreground: IoU [\d.]+, Dice [\d.]+, accuracy [\d.]+, [\d,]+ p", capsys.readouterr().out)
        measured[name] = json.loads((run / name / "results.json").read_text())["trained"]
    assert measured["more"] != measured["plain"] and measured["more"].keys() == measured["plain"].keys()
    with pytest.raises(SystemExit, match=r"(?s)is a JPEG.*`--binary_masks`"):
        evaluate.main([*common, *data])
    capsys.readouterr()

    predict.main(["trained", data[1], "--output_dir", "found", "--binary_masks", "--device", "cpu"])
    assert "predictions for 3 images are in found" in capsys.readouterr().out
    masks = [np.array(Image.open(run / "found" / "masks" / f"{index}.png")) for index in range(3)]
    assert all(mask.shape == (64, 64) and set(np.unique(mask)) <= {0, 255} for mask in masks)
    truth = [
        np.array(Image.open(next((polyps / "validation" / "masks").glob(f"{index}.*"))).convert("L"))
        for index in range(3)
    ]
    found, true = np.stack(masks) > 0, np.stack(truth) >= 128
    dice = 200 * (found & true).sum() / (found.sum() + true.sum())
    assert measured["plain"]["dice_set"] == pytest.approx(dice, abs=1e-3) and 1 < dice < 99
    assert sorted(path.name for path in (run / "found" / "masks").iterdir()) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--class_names is missing"),
        (["--class_names", "names.json"], r"values 0 and 255 only.*`--binary_masks`"),
        (["--class_names", "names.json", "--binary_masks", "--reduce_labels"], "Only one of `binary_masks`"),
        (["--class_names", "three.json", "--binary_masks"], "`binary_masks` are of two classes, `num_labels` is 3"),
        (["--class_names", "names.json", "--palette", "none.json"], "The palette none.json cannot be read"),
        (["--binary_masks", "--class_weights", "1"], "--class_weights must be 2 numbers, one for each class, got 1"),
    ],
)
def test_what_is_wrong_with_data_is_said_before_the_first_step(arguments, message, polyps, tmp_path, monkeypatch):
    """With a message instead of a traceback, which names an option that the program has."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.json").write_text('["background", "polyp"]')
    (tmp_path / "three.json").write_text('["a", "b", "c"]')
    for path in (polyps / "train" / "masks").glob("*.png"):
        data = tmp_path / "data"
        for split in ("train", "validation"):
            for kind, name in (("images", f"{path.stem}.jpg"), ("masks", path.name)):
                (data / split / kind).mkdir(parents=True, exist_ok=True)
                (data / split / kind / name).write_bytes((polyps / "train" / kind / name).read_bytes())
    with pytest.raises(SystemExit, match=f"(?s){message}"):
        train(data, tmp_path / "run", *arguments)
    assert not list((tmp_path / "run").glob("*checkpoint*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class_weights", "x"], "--class_weights must be `auto` or positive numbers, got x"),
        (["--class_weights", "1", "2", "--loss", "dice"], "--class_weights are of the cross-entropy"),
        (["--head", "upernet", "--model_name_or_path", "x"], "--head is for a new model"),
        (["--loss", "focal"], "invalid choice: 'focal'"),
        (["--train_val_split", "0.2"], "--train_val_split makes the validation set: leave --eval_images"),
    ],
)
def test_options_that_contradict_each_other_are_a_usage_error(arguments, message, polyps, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(polyps, tmp_path, *arguments)
    assert message in capsys.readouterr().err


def test_hints_name_options_that_the_programs_have(capsys):
    """Those of the readers of label maps, which training and evaluation share."""
    helps = {}
    for command in ("train-segmentation", "evaluate"):
        with pytest.raises(SystemExit):
            start([command, "--help"])
        helps[command] = capsys.readouterr().out
    files = [ROOT / "pvt_hf" / "data" / f"{name}.py" for name in ("segmentation", "label_maps", "segmentation_checks")]
    hints = {hint for file in files for hint in re.findall(r"`(--\w+)`", file.read_text())}
    assert {"--binary_masks", "--palette", "--reduce_labels"} <= hints
    of_training = {"--class_names", "--allow_missing_classes"}  # said of a training set only
    assert all(re.search(rf"{hint}\b", helps["train-segmentation"]) for hint in hints)
    assert all(re.search(rf"{hint}\b", helps["evaluate"]) for hint in hints - of_training)
