"""`pvt-hf train-segmentation`: runs on bundled and on own data, what a recipe decides, and wrong arguments."""

import json
import re

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation, pipeline

import pvt_hf
from pvt_hf.commands.train_segmentation import load_splits, main, name_classes, parse
from pvt_hf.data.digits import write_scenes
from pvt_hf.recipes import SEGMENTATION_RECIPES
from tests.support.segmentation_run import read
from tests.support.small_models import small_config

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", images=24, validation=5)


def run(*arguments) -> int:
    return main(["--use_cpu", "true", "--disable_tqdm", "true", *map(str, arguments)])


def test_smoke_run_and_fine_tuning_of_its_result(data, tmp_path, capsys):
    """Everything from bundled data; then fine-tuning of the result on folders of palette maps with other classes."""
    classifier = pvt_hf.PvtV2ForImageClassification(small_config("v2"))
    classifier.save_pretrained(tmp_path / "classifier")
    arguments = ["--smoke", "--output_dir", tmp_path / "run", "--backbone_checkpoint", tmp_path / "classifier"]
    arguments += ["--max_steps", 4, "--eval_strategy", "no"]
    run(*arguments)
    output = capsys.readouterr().out
    assert f"all {len(classifier.pvt_v2.state_dict())} tensors of the backbone are from" in output
    miou = re.search(r"eval: mIoU ([\d.]+), .* on 9 images", output)[1]
    card = ModelCard.load(tmp_path / "run" / "README.md")
    shown = re.search(r"\*\*([\d.]+) %\*\* mIoU", card.content)[1]
    assert float(shown) == pytest.approx(100 * float(miou), abs=0.011)
    assert card.data.pipeline_tag == "image-segmentation"
    assert "| steps | 4 |" in card.content and "| steps of the recipe | 40000 |" in card.content
    assert "from\n`classifier`. On the 9" in card.content and str(tmp_path) not in card.content
    assert "![predictions](predictions.png)" in card.content and "scikit-learn digits" in card.content
    for picture in ("predictions.png", "curves.png"):
        with Image.open(tmp_path / "run" / picture) as opened:
            assert len(opened.convert("RGB").getcolors(10**6)) > 100

    config = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "run").config
    assert config.loss_normalization == "all" and config.id2label[10] == "9" and config.id2label[0] == "background"
    image = Image.open(data / "validation" / "images" / "000001.png")
    segments = pipeline("image-segmentation", model=str(tmp_path / "run"))(image)
    assert segments and all(segment["mask"].size == image.size for segment in segments)

    folders = []
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        for path in (data / split / "maps").glob("*.png"):
            labels = Image.fromarray((np.array(Image.open(path)) > 0).astype(np.uint8) + 1)
            labels.putpalette(bytes(range(255, -1, -1)) * 3)
            labels.save(tmp_path / split / path.name)
        folders += [data / split / "images", tmp_path / split]
    (tmp_path / "names.json").write_text(json.dumps({"0": "paper", "1": "ink"}))
    names = ("--train_images", "--train_maps", "--eval_images", "--eval_maps")
    arguments = [value for pair in zip(names, folders, strict=True) for value in pair]
    arguments += ["--smoke", "--max_steps", "2", "--reduce_labels", "--class_names", tmp_path / "names.json"]
    arguments += ["--model_name_or_path", tmp_path / "run", "--output_dir", tmp_path / "tuned", "--window", 48]
    run(*arguments, "--stride", 32)
    assert "on 5 images" in capsys.readouterr().out
    tuned, before = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "run"))
    assert tuned["head.classifier.weight"].shape == (2, 32, 1, 1)
    name = "neck.lateral_convs.0.weight"
    assert 0 < (tuned[name] - before[name]).abs().max() < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "me/maps"], "--class_names is missing"),
        (["--with_code", "--head", "upernet"], "--with_code cannot be used for a model of type upernet: its class is"),
        (["--backbone_checkpoint", "classifier", "--variant", "pvt_tiny"], "classifier is not a pvt_tiny"),
    ],
)
def test_wrong_arguments_end_before_any_work(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pvt_hf.build_config("pvt_v2_b0").save_pretrained("classifier")
    with pytest.raises(SystemExit, match=message):
        run("--smoke", "--output_dir", "runs/x", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_images", "images"], "--train_images, --train_maps, --eval_images and --eval_maps go together"),
        (["--window", "64"], "--window and --stride go together"),
        (["--scales", "1"], "--scales must be two numbers, the lowest and the highest, got [1.0]"),
    ],
)
def test_arguments_that_contradict_each_other_are_a_usage_error(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run("--smoke", *arguments)
    assert message in capsys.readouterr().err


def test_recipe_decides_what_the_command_line_leaves_open(tmp_path):
    """Without arguments it is the recipe, with the rate for as many images as there are; and a choice is kept."""
    *_, recipe, args = parse(["--output_dir", str(tmp_path)])
    assert recipe == SEGMENTATION_RECIPES["semantic_fpn_40k"] and args.max_steps == 40_000
    assert args.learning_rate == pytest.approx(2e-4 * 4 / 32) and args.weight_decay == 1e-4 and not args.fp16
    assert (args.max_grad_norm, args.optim, args.adam_epsilon) == (0.0, "adamw_torch_fused", 1e-8)
    chosen = ["--num_train_epochs", "3", "--learning_rate", "0.5", "--crop_size", "96", "--flip", "0"]
    chosen += ["--distortion", "false", "--scales", "0.8", "1.5"]
    *_, recipe, args = parse(["--output_dir", str(tmp_path), *chosen])
    assert (args.max_steps, args.num_train_epochs, args.learning_rate) == (-1, 3, 0.5)
    assert (recipe.crop_size, recipe.flip, recipe.max_share) == (96, 0.0, 0.75)
    assert (recipe.distortion, recipe.scales) == (False, [0.8, 1.5])


def test_demo_needs_no_accelerator(tmp_path, monkeypatch):
    """Its bfloat16 is one of a CPU too, where there is nothing else."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    *_, args = parse(["--demo", "--output_dir", str(tmp_path)])
    assert args.bf16 and args.use_cpu


def test_data_set_of_the_hub_is_as_the_folders(data, tmp_path):
    """It has the columns `image` and `annotation`."""
    for split in ("train", "validation"):
        paths = {name: sorted(map(str, (data / split / name).glob("*.png"))) for name in ("images", "maps")}
        rows = {"image": paths["images"], "annotation": paths["maps"]}
        features = datasets.Features(dict.fromkeys(rows, datasets.Image()))
        table = datasets.Dataset.from_dict(rows, features=features)
        table.map(lambda row: row).to_parquet(tmp_path / "hub" / f"{split}-00000.parquet")
    (tmp_path / "names.json").write_text(json.dumps(list("abcdefghijk")))
    arguments = ["--dataset_name", tmp_path / "hub", "--class_names", tmp_path / "names.json", "--output_dir", tmp_path]
    (_, data_args, *_), _, _, args = parse([str(argument) for argument in arguments])
    names = name_classes(data_args, None)
    assert names == list("abcdefghijk")
    for found, split in zip(load_splits(data_args, args, names), ("train", "validation"), strict=True):
        expected = read(data, split)
        assert len(found) == len(expected)
        assert all(torch.equal(*pair) for pair in zip(found.read(3), expected.read(3), strict=True))
    data_args.class_names = tmp_path / "few.json"
    data_args.class_names.write_text(json.dumps({"0": "background", "1": "zero"}))
    few = load_splits(data_args, args, name_classes(data_args, None))[0]
    with pytest.raises(ValueError, match=r"label map .* has the labels \[.*10\], the classes are 0 to 1"):
        [few.read(index) for index in range(len(few))]
