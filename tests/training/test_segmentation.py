"""Training and evaluation of segmenters: the official schedule, metrics against a slow evaluation, processes, resume,
pictures, bad input, and the program as a user starts it."""

import csv
import json
import re
import runpy
import signal
import socket
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation, UperNetConfig, UperNetForSemanticSegmentation, pipeline

import pvt_hf
from pvt_hf.data.digits import write_scenes
from pvt_hf.evaluation.metrics import mean_iou_metric
from pvt_hf.recipes import SEGMENTATION_RECIPES
from pvt_hf.training.optimization import freeze_stages, polynomial_multiplier, segmentation_parameter_groups
from tests.support.segmentation_run import build, losses, read
from tests.support.small_models import ROOT, STAGES, randomize, small_config
from tests.training.test_classification import assert_close, environment, weights

PROGRAM = ROOT / "examples" / "train_segmentation.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 scenes to train on, 5 held out: of several sizes, and with some pixels ignored."""
    root = write_scenes(tmp_path_factory.mktemp("data") / "scenes", images=24, validation=5)
    for index, path in enumerate(sorted(root.glob("*/maps/*.png"))):
        labels = np.array(Image.open(path))
        labels[: 7 * (index % 5)] = 255
        Image.fromarray(labels).save(path)
    return root


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes that results are compared with; and enough for models of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def started(output_dir, data, settings: dict, **variables: object) -> subprocess.Popen:
    program = [
        str(ROOT / "tests" / "support" / "segmentation_run.py"),
        str(output_dir),
        str(data),
        json.dumps(settings),
    ]
    variables = {name: str(value) for name, value in variables.items()}
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *program], env=environment() | variables, **output)


def slow_metrics(trainer, windows=None, num_labels: int = 11) -> tuple[dict, list[float], list[torch.Tensor]]:
    """One image after the other, class by class: metrics, IoU of the classes, and the predictions."""
    union, inter, labelled = torch.zeros(3, num_labels)
    total, pixels = 0.0, 0
    model, maps = trainer.model.eval(), []
    for index in range(len(trainer.eval_dataset)):
        image, labels = trainer.eval_dataset.data.read(index)
        pixel_values = trainer.processing_class(image, return_tensors="pt").pixel_values
        with torch.no_grad():
            logits = (
                pvt_hf.sliding_window_logits(model, pixel_values, *windows) if windows else model(pixel_values).logits
            )
        network = F.interpolate(logits, pixel_values.shape[-2:], mode="bilinear", align_corners=False)
        prediction = F.interpolate(network, labels.shape, mode="bilinear", align_corners=False).argmax(1)[0]
        maps.append(prediction)
        for label in range(num_labels):
            found, true = (prediction == label) & (labels != 255), labels == label
            inter[label] += (found & true).sum()
            union[label] += (found | true).sum()
            labelled[label] += true.sum()
        small = F.interpolate(labels[None, None].double(), pixel_values.shape[-2:], mode="nearest")[0].long()
        total += F.cross_entropy(network, small, ignore_index=255, reduction="sum").item()
        pixels += int((small != 255).sum())
    iou = inter / union
    metrics = {"mIoU": iou.nanmean(), "mAcc": (inter / labelled).nanmean(), "aAcc": inter.sum() / labelled.sum()}
    return {key: float(value) for key, value in metrics.items()} | {"loss": total / pixels}, iou.tolist(), maps


def test_schedule_at_every_step():
    """mmcv's `PolyLrUpdaterHook` with `power=0.9, min_lr=0.0, by_epoch=False`."""
    recipe = SEGMENTATION_RECIPES["semantic_fpn_40k"]
    assert (recipe.steps, recipe.learning_rate, recipe.reference_batch_size) == (40_000, 2e-4, 32)
    assert (recipe.weight_decay, recipe.max_grad_norm, recipe.loss_normalization) == (1e-4, 0.0, "all")
    for step in range(recipe.steps):
        coefficient = (1 - step / 40_000) ** 0.9
        expected = (2e-4 - 0.0) * coefficient + 0.0
        assert 2e-4 * polynomial_multiplier(recipe.power, step, 1000, recipe.steps) == pytest.approx(
            expected, rel=1e-12
        )
    assert (
        polynomial_multiplier(recipe.power, 40_000, 1000, 40_000) == polynomial_multiplier(0.9, 40_001, 1, 40_000) == 0
    )


def test_every_parameter_is_decayed(data, tmp_path):
    """Norms, biases and position embeddings too, as officially; frozen stages are skipped."""
    backbone = small_config("v1", out_features=STAGES)
    model = pvt_hf.SemanticFPNForSemanticSegmentation(pvt_hf.SemanticFPNConfig(backbone_config=backbone))
    (group,) = segmentation_parameter_groups(model, 2e-4, 1e-4)
    assert group["names"] == [name for name, _ in model.named_parameters()]
    assert (group["lr"], group["weight_decay"]) == (2e-4, 1e-4)
    assert any("position_embeddings" in name for name in group["names"])
    frozen = freeze_stages(model, 1)
    (group,) = segmentation_parameter_groups(model, 2e-4, 1e-4)
    assert frozen and set(frozen).isdisjoint(group["names"]) and len(group["params"]) == len(group["names"])


def test_run_of_the_recipe(data, tmp_path):
    """The rate at each step, one group, and the loss falls."""
    trainer = build(tmp_path, data, max_steps=12, learning_rate=3e-3)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([3e-3 * (1 - step / 12) ** 0.9 for step in range(12)])
    (group,) = trainer.optimizer.param_groups
    assert group["weight_decay"] == 1e-4 and len(group["params"]) == len(list(trainer.model.parameters()))
    assert sum(losses(trainer)[-3:]) < 0.9 * sum(losses(trainer)[:3])


@pytest.mark.parametrize("window", [None, 32], ids=["whole", "windows"])
def test_metrics_are_those_of_a_slow_evaluation(window, data, tmp_path):
    """Also per class in a table, and through the metric of `evaluate`."""
    trainer = build(tmp_path, data, trainer={"window": window, "stride": window and 20})
    randomize(trainer.model, std=0.3)
    metrics = trainer.evaluate()
    expected, iou, maps = slow_metrics(trainer, window and (window, 20))
    for key, value in expected.items():
        assert metrics[f"eval_{key}"] == pytest.approx(value, rel=1e-4), key
    assert metrics["eval_images"] == 5 and len(torch.cat([labels.flatten() for labels in maps]).unique()) > 2
    with (tmp_path / "eval_classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [str(label) for label in range(11)]
    np.testing.assert_allclose([float(row["IoU"]) for row in rows], iou, rtol=1e-5)
    metric = mean_iou_metric(11)
    metric.add_batch(predictions=maps, references=[trainer.eval_dataset[index]["labels"] for index in range(5)])
    assert metric.compute()["mean_iou"] == pytest.approx(metrics["eval_mIoU"], rel=1e-9)


def test_window_that_covers_the_images(data, tmp_path):
    """The logits at the network's size: the same two resizes as for the whole image."""
    trainer = build(tmp_path, data)
    randomize(trainer.model, std=0.3)
    whole = trainer.evaluate()
    trainer.window, trainer.stride = 500, 300
    windows = trainer.evaluate()
    for key in ("mIoU", "mAcc", "aAcc", "loss"):
        assert windows[f"eval_{key}"] == pytest.approx(whole[f"eval_{key}"], rel=1e-5)
    assert trainer.processing_class.logits_stride == 4
    with pytest.raises(ValueError, match="`window` and `stride` go together, got 32 and None"):
        build(tmp_path, data, trainer={"window": 32})


@pytest.mark.parametrize("normalization", ["all", "valid"])
def test_gradient_accumulation(normalization, data, tmp_path):
    """4 times 2 images are 8, although the crops have different numbers of ignored pixels."""
    settings = {"fixed_norms": True, "optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    settings |= {"fields": {"loss_normalization": normalization, "classifier_dropout": 0.0}}
    runs = []
    for batch_size, accumulated in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulated}
        trainer = build(tmp_path, data, drop_path_rate=0.0, **settings, **sizes)
        trainer.train()
        runs.append((losses(trainer), trainer.model.state_dict()))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-4)
    assert_close(runs[1][1], runs[0][1])


def test_ignored_pixels_are_marked_for_the_count(data, tmp_path):
    """What `Trainer` counts is what the loss divides by."""
    batches = {}
    for normalization in ("all", "valid"):
        trainer = build(tmp_path, data, fields={"loss_normalization": normalization})
        batches[normalization] = torch.cat([batch["labels"] for batch in trainer.get_train_dataloader()])
    ignored = batches["all"] == 255
    assert 0 < ignored.sum() < ignored.numel() and not (batches["all"] < 0).any()
    assert torch.equal(batches["valid"], batches["all"].masked_fill(ignored, -100))


def test_two_processes(data, tmp_path):
    """2 x 4 images are 8, and the five validation images are counted once each, in whichever process."""
    settings = {"fixed_norms": True, "optim": "sgd", "learning_rate": 0.1, "drop_path_rate": 0.0, "max_steps": 3}
    settings |= {"fields": {"classifier_dropout": 0.0}}
    one = build(tmp_path / "one", data, per_device_train_batch_size=8, **settings)
    one.train()
    expected = one.evaluate()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": 2}
    settings |= {"per_device_train_batch_size": 4}
    processes = [started(tmp_path / "two", data, settings, RANK=rank, LOCAL_RANK=rank, **group) for rank in (0, 1)]
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors[-3000:]
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["losses"] == pytest.approx(losses(one), rel=1e-4)
    assert_close(weights(tmp_path / "two"), one.model.state_dict())
    assert two["metrics"]["eval_images"] == expected["eval_images"] == 5
    for key in ("mIoU", "mAcc", "aAcc", "loss"):
        assert two["metrics"][f"eval_{key}"] == pytest.approx(expected[f"eval_{key}"], rel=1e-4), key
    with (tmp_path / "two" / "eval_classes.csv").open() as file:
        assert sum(int(row["pixels"]) for row in csv.DictReader(file)) == one.matrix.counts.sum()


def test_killed_and_resumed(data, tmp_path):
    """SIGKILL in the second epoch: the same losses and weights, bit by bit, statistics of the norms included."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 10}
    whole = build(tmp_path / "whole", data, **settings)
    whole.train()
    killed = tmp_path / "killed"
    process = started(killed, data, settings | {"slow": 0.5})
    while not (killed / "checkpoint-8" / "complete.json").exists():  # the epoch has 6
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "result.json").exists()
    resumed = build(killed, data, **settings)
    resumed.train(True)
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    final = resumed.model.state_dict()
    assert all(torch.equal(final[key], value) for key, value in whole.model.state_dict().items())


def test_other_segmenters(data, tmp_path):
    """UperNet: its logits are as large as its input, and the saved image processor says so."""
    names = {"id2label": {label: str(label) for label in range(11)}}
    names["label2id"] = {name: label for label, name in names["id2label"].items()}
    backbone = small_config("v2", out_features=STAGES)
    config = UperNetConfig(backbone_config=backbone, hidden_size=8, auxiliary_in_channels=24, pool_scales=[1], **names)
    trainer = build(tmp_path, data, model=UperNetForSemanticSegmentation(config), max_steps=2)
    trainer.train()
    metrics, (expected, *_) = trainer.evaluate(), slow_metrics(trainer)
    assert {key: metrics[f"eval_{key}"] for key in expected} == pytest.approx(expected, rel=1e-4)
    trainer.save_model()
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["logits_stride"] == 1


def test_images_that_are_ignored_altogether(data, tmp_path):
    """A batch without a label has the loss 0, also with weights that are trained on; and it is not evaluated."""
    for path in (*(data / "train" / "maps").glob("*.png"), *(data / "validation" / "maps").glob("*.png")):
        target = tmp_path / path.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", Image.open(path).size, 255).save(target)
    for split in ("train", "validation"):
        (tmp_path / split / "images").symlink_to(data / split / "images")
    for normalization in ("all", "valid"):
        trainer = build(tmp_path / "run", tmp_path, fields={"loss_normalization": normalization}, max_steps=2)
        trainer.train()
        assert losses(trainer) == [0, 0]
        assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == 0 and metrics["eval_images"] == 5 and np.isnan(metrics["eval_mIoU"])


def program(*arguments) -> list[str]:
    return [str(PROGRAM), "--use_cpu", "true", "--disable_tqdm", "true", *map(str, arguments)]


def test_program(data, tmp_path, monkeypatch, capsys):
    """Everything from bundled data; then fine-tuning of the result on folders of palette maps with other classes."""
    classifier = pvt_hf.PvtV2ForImageClassification(pvt_hf.build_config("pvt_v2_b0", num_labels=10))
    classifier.save_pretrained(tmp_path / "classifier")
    arguments = ["--smoke", "--output_dir", tmp_path / "run", "--backbone_checkpoint", tmp_path / "classifier"]
    monkeypatch.setattr(sys, "argv", program(*arguments))
    runpy.run_path(str(PROGRAM), run_name="__main__")
    output = capsys.readouterr().out
    assert f"all {len(classifier.pvt_v2.state_dict())} tensors of the backbone are from" in output
    miou = re.search(r"eval: mIoU ([\d.]+), .* on 9 images", output)[1]
    card = ModelCard.load(tmp_path / "run" / "README.md")
    shown = re.search(r"\*\*([\d.]+) %\*\* mIoU", card.content)[1]
    assert float(shown) == pytest.approx(100 * float(miou), abs=0.011)
    assert card.data.pipeline_tag == "image-segmentation"
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
    monkeypatch.setattr(sys, "argv", program(*arguments, "--stride", 32))
    runpy.run_path(str(PROGRAM), run_name="__main__")
    assert "on 5 images" in capsys.readouterr().out
    tuned, before = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "run"))
    assert tuned["head.classifier.weight"].shape == (2, 32, 1, 1)
    name = "neck.lateral_convs.0.weight"
    assert 0 < (tuned[name] - before[name]).abs().max() < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_images", "images"], "--train_images, --train_maps, --eval_images and --eval_maps go together"),
        (["--dataset_name", "me/maps"], "--class_names is missing"),
        (["--backbone_checkpoint", "classifier", "--variant", "pvt_tiny"], "classifier is not a pvt_tiny"),
    ],
)
def test_wrong_arguments_of_the_program(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pvt_hf.build_config("pvt_v2_b0").save_pretrained("classifier")
    monkeypatch.setattr(sys, "argv", program("--smoke", "--output_dir", "runs/x", *arguments))
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(PROGRAM), run_name="__main__")


def test_official_run_of_the_program(monkeypatch, tmp_path):
    """Without arguments it is the recipe, with the rate for as many images as there are; and a choice is kept."""
    monkeypatch.setattr(sys, "argv", program("--output_dir", tmp_path))
    parse_arguments = runpy.run_path(str(PROGRAM))["parse_arguments"]
    options, args = parse_arguments()
    assert options.recipe == SEGMENTATION_RECIPES["semantic_fpn_40k"] and args.max_steps == 40_000
    assert args.learning_rate == pytest.approx(2e-4 * 4 / 32) and args.weight_decay == 1e-4 and not args.fp16
    assert (args.max_grad_norm, args.optim, args.adam_epsilon) == (0.0, "adamw_torch_fused", 1e-8)
    chosen = ["--output_dir", tmp_path, "--num_train_epochs", 3, "--learning_rate", 0.5, "--crop_size", 96, "--flip", 0]
    monkeypatch.setattr(sys, "argv", program(*chosen))
    options, args = parse_arguments()
    assert (args.max_steps, args.num_train_epochs, args.learning_rate) == (-1, 3, 0.5)
    assert (options.recipe.crop_size, options.recipe.flip, options.recipe.max_share) == (96, 0.0, 0.75)


def test_data_of_the_program(data, monkeypatch, tmp_path):
    """A data set of the Hub with the columns `image` and `annotation` gives what the folders give."""
    for split in ("train", "validation"):
        paths = {name: sorted(map(str, (data / split / name).glob("*.png"))) for name in ("images", "maps")}
        rows = {"image": paths["images"], "annotation": paths["maps"]}
        features = datasets.Features(dict.fromkeys(rows, datasets.Image()))
        table = datasets.Dataset.from_dict(rows, features=features)
        table.map(lambda row: row).to_parquet(tmp_path / "hub" / f"{split}-00000.parquet")
    (tmp_path / "names.json").write_text(json.dumps(list("abcdefghijk")))
    arguments = ["--dataset_name", tmp_path / "hub", "--class_names", tmp_path / "names.json", "--output_dir", tmp_path]
    monkeypatch.setattr(sys, "argv", program(*arguments))
    module = runpy.run_path(str(PROGRAM))
    options, args = module["parse_arguments"]()
    names = module["class_names"](options)
    assert names == list("abcdefghijk")
    for found, split in zip(module["load_data"](options, args, names), ("train", "validation"), strict=True):
        expected = read(data, split)
        assert len(found) == len(expected)
        assert all(torch.equal(*pair) for pair in zip(found.read(3), expected.read(3), strict=True))
    options.class_names = tmp_path / "few.json"
    options.class_names.write_text(json.dumps({"0": "background", "1": "zero"}))
    few = module["load_data"](options, args, module["class_names"](options))[0]
    with pytest.raises(ValueError, match=r"label map .* has the labels \[.*10\], the classes are 0 to 1"):
        [few.read(index) for index in range(len(few))]
