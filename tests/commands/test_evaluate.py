"""`pvt-hf evaluate`: what it measures of checkpoints of each task, and what it compares that with."""

import json
import re
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    Mask2FormerConfig,
)

import pvt_hf
from pvt_hf.commands.evaluate import main
from pvt_hf.commands.measure import published_metrics
from pvt_hf.data.classification import load_images
from pvt_hf.data.digits import write_scenes
from pvt_hf.training.detection import DetectionTrainer
from tests.support.small_models import STAGES, small_config

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Small random models of all tasks, for digits and for digits on scenes."""
    folder = tmp_path_factory.mktemp("checkpoints")
    backbone = small_config("v2", out_features=STAGES)
    limits = {"shortest_edge": 64, "longest_edge": 128}
    models = {
        "classifier": AutoModelForImageClassification.from_config(small_config("v2", num_labels=10)),
        "detector": AutoModelForObjectDetection.from_config(
            pvt_hf.RetinaNetConfig(
                backbone_config=small_config("v2", out_features=STAGES[1:]), num_labels=10, neck_channels=16
            )
        ),
        "instances": AutoModelForInstanceSegmentation.from_config(
            pvt_hf.MaskRCNNConfig(backbone_config=backbone, num_labels=10, neck_channels=16, box_head_size=32)
        ),
        "segmenter": AutoModelForSemanticSegmentation.from_config(
            pvt_hf.SemanticFPNConfig(backbone_config=backbone, num_labels=11, neck_channels=16, head_channels=16)
        ),
    }
    processors = {
        "classifier": pvt_hf.PvtImageProcessor(crop_size=32),
        "detector": pvt_hf.PvtDetectionImageProcessor(size=limits),
        "instances": pvt_hf.PvtDetectionImageProcessor(size=limits),
        "segmenter": pvt_hf.PvtSegmentationImageProcessor(size=limits),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        processors[name].save_pretrained(folder / name)
    models["classifier"].base_model.save_pretrained(folder / "encoder")
    Mask2FormerConfig(backbone_config=backbone).save_pretrained(folder / "universal")
    return folder


def run(monkeypatch, folder, *arguments) -> dict:
    monkeypatch.chdir(folder)
    main(["--dataloader_num_workers", "0", *map(str, arguments)])
    return json.loads((folder / "runs" / "evaluation" / "results.json").read_text())


def test_every_task_has_its_metrics(checkpoints, monkeypatch, capsys):
    names = ["classifier", "detector", "instances", "segmenter"]
    results = run(monkeypatch, checkpoints, "--smoke", "--max_eval_samples", 4, "--model_name_or_path", *names)
    assert list(results) == names and all(result["images"] == 4 for result in results.values())
    assert {"accuracy", "top5_accuracy"} < results["classifier"].keys()
    assert {"AP", "AP50", "AR100"} < results["detector"].keys() and "mask_AP" not in results["detector"]
    assert {"AP", "mask_AP", "mask_AR100"} < results["instances"].keys()
    assert {"mIoU", "mAcc", "aAcc"} < results["segmenter"].keys()
    table = capsys.readouterr().out
    for name, metric in (("classifier", "accuracy"), ("instances", "mask_AP"), ("segmenter", "mIoU")):
        assert f"| {name} | {metric} |  | {results[name][metric]:.2f} |  | 4 |" in table


def test_own_data_measure_as_the_bundled_ones(checkpoints, monkeypatch, tmp_path):
    """COCO json and folders of maps: the same images as bundled ones give the same numbers."""
    data = write_scenes(tmp_path / "scenes", 1, 40) / "validation"
    detector = checkpoints / "detector", checkpoints / "segmenter"
    bundled = run(monkeypatch, tmp_path, "--max_eval_samples", 3, "--model_name_or_path", *detector)
    arguments = ["--max_eval_samples", 3, "--images", data / "images"]
    found = run(
        monkeypatch, tmp_path, *arguments, "--annotations", data / "annotations.json",
        "--model_name_or_path", detector[0],
    )  # fmt: skip
    assert found[str(detector[0])] == bundled[str(detector[0])]
    found = run(monkeypatch, tmp_path, *arguments, "--maps", data / "maps", "--model_name_or_path", detector[1])
    assert found[str(detector[1])] == bundled[str(detector[1])]


def test_what_is_left_out_and_what_has_no_ground_truth_is_listed(checkpoints, scenes, monkeypatch, tmp_path, capsys):
    """Of segmenters and detectors alike. No digit is large."""
    shutil.copytree(scenes, tmp_path / "scenes")
    first, *_ = sorted((tmp_path / "scenes" / "images").iterdir())
    first.write_bytes(first.read_bytes()[:-500])  # which only its pixels tell
    for name, truth in (("segmenter", "maps"), ("detector", "annotations.json")):
        arguments = ["--model_name_or_path", checkpoints / name, "--images", tmp_path / "scenes" / "images"]
        arguments += [f"--{truth.split('.')[0]}", tmp_path / "scenes" / truth]
        results = run(monkeypatch, tmp_path, *arguments, "--skip_corrupt")[str(checkpoints / name)]
        printed = capsys.readouterr().out
        assert results["images"] == 3
        assert re.search(rf"1 corrupt images are left out:\n  .*{first.name} .*cannot be read", printed)
    assert f"{checkpoints / name}: no ground truth for AP_large, AR_large" in printed
    assert not {"AP_large", "AR_large"} & results.keys() and min(results.values()) >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_name_or_path", "detector", "--images", "x"], "--images goes with --annotations"),
        (["--model_name_or_path", "detector", "--variant", "all"], "pass either --variant or --model_name_or_path"),
        ([], "pass either --variant or --model_name_or_path"),
    ],
)
def test_arguments_that_contradict_each_other_are_a_usage_error(arguments, message, checkpoints, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, checkpoints, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("segmenter", ["--images", "x", "--annotations", "x"], "is a segmenter, which has no --annotations"),
        ("detector", ["--images", "x", "--maps", "x"], "is a detector, which has no --maps"),
        (
            "instances",
            ["--tta_flip", "--window", "8", "--stride", "8"],
            "no --window and no --stride and no --tta",
        ),
        ("classifier", ["--max_detections", "200"], "is a classifier, which has no --max_detections"),
        (
            "segmenter",
            ["--dataset_name", "./nowhere"],
            r"Split 'validation' of './nowhere' cannot be loaded: .*now",
        ),
        ("encoder", [], "cannot be measured: the model is a PvtV2Model: it must be a classifier, a"),
        ("universal", [], "is a universal segmenter of type mask2former: measured are pvt, "),
        ("nothing", [], r"nothing cannot be loaded: it must be a folder with a model's config\.json, or a repository"),
    ],
)
def test_what_cannot_be_measured_is_an_error(name, arguments, message, checkpoints, monkeypatch, tmp_path):
    """Instead of a number for other images than those that were named, or for a head at random."""
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, tmp_path, "--model_name_or_path", checkpoints / name, *arguments)


def test_variant_that_was_not_converted_is_an_error(checkpoints, monkeypatch):
    with pytest.raises(SystemExit, match="Not there: converted/pvt_tiny. `pvt-hf convert --all converted` makes them"):
        run(monkeypatch, checkpoints, "--variant", "pvt_tiny")


def test_other_number_of_classes_is_an_error(checkpoints, monkeypatch, tmp_path):
    config = pvt_hf.PvtV2Config.from_pretrained(checkpoints / "classifier", num_labels=7)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="other has 7 classes and the data 10"):
        run(monkeypatch, tmp_path, "--model_name_or_path", "other")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", images=1, validation=4) / "validation"


def name_classes(checkpoints, name, folder, names):
    """The checkpoint with names of its classes."""
    shutil.copytree(checkpoints / name, folder)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(label): text for label, text in enumerate(names)}
    config["label2id"] = {text: label for label, text in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def test_classifier_is_measured_on_its_classes_in_any_order(checkpoints, monkeypatch, tmp_path, capsys):
    named = name_classes(checkpoints, "classifier", tmp_path / "named", DIGITS)
    rows = load_images(None, "validation").select(range(40))
    features = rows.features | {"label": datasets.ClassLabel(names=DIGITS[::-1])}
    rows = rows.map(lambda row: {"label": 9 - row["label"]}).cast(datasets.Features(features))
    rows.to_parquet(str(tmp_path / "data.parquet"))
    arguments = ["--model_name_or_path", named, "--max_eval_samples", 20]
    expected = run(monkeypatch, tmp_path, *arguments)[str(named)]
    given = ["--dataset_name", tmp_path / "data.parquet"]
    assert run(monkeypatch, tmp_path, *arguments, *given)[str(named)] == expected and expected["top5_accuracy"] > 0
    assert "another order" in capsys.readouterr().out
    (tmp_path / "names.txt").write_text("\n".join([*DIGITS[:0:-1], "cat"]))
    with pytest.raises(SystemExit, match=r"only the first has \['zero'\], only the second \['cat'\]"):
        run(monkeypatch, tmp_path, *arguments, *given, "--class_names", tmp_path / "names.txt")


def test_segmenter_is_measured_on_its_classes_in_any_order(checkpoints, scenes, monkeypatch, tmp_path):
    named = name_classes(checkpoints, "segmenter", tmp_path / "named", ["background", *DIGITS])
    arguments = ["--model_name_or_path", named, "--max_eval_samples", 3, "--images", scenes / "images"]
    expected = run(monkeypatch, tmp_path, *arguments, "--maps", scenes / "maps")[str(named)]
    (tmp_path / "maps").mkdir()
    for file in (scenes / "maps").iterdir():
        labels = np.array(Image.open(file))
        Image.fromarray(np.where(labels == 255, 255, 10 - labels).astype(np.uint8)).save(tmp_path / "maps" / file.name)
    (tmp_path / "names.json").write_text(json.dumps([*DIGITS[::-1], "background"]))
    given = ["--maps", tmp_path / "maps", "--class_names", tmp_path / "names.json"]
    assert run(monkeypatch, tmp_path, *arguments, *given)[str(named)] == expected


def test_detector_is_measured_on_its_classes_in_any_order(checkpoints, scenes, monkeypatch, tmp_path):
    """What it is measured on has the names that the json has, and the labels of the model."""
    named = name_classes(checkpoints, "detector", tmp_path / "named", DIGITS)
    content = json.loads((scenes / "annotations.json").read_text())
    names = {entry["id"]: DIGITS[-entry["id"]] for entry in content["categories"]}
    for entry in content["categories"]:
        entry["name"] = names[entry["id"]]
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    measured = []

    def evaluate(self, rows):
        measured.append((self, rows.data))
        return {"eval_images": len(rows)}

    monkeypatch.setattr(DetectionTrainer, "evaluate", evaluate)
    arguments = ["--model_name_or_path", named, "--images", scenes / "images", "--max_detections", 300]
    run(monkeypatch, tmp_path, *arguments, "--annotations", tmp_path / "annotations.json", "--max_eval_samples", 4)
    ((trainer, data),) = measured
    assert data.label_names == DIGITS and len(data) == 4 and trainer.max_detections == 300
    for record in data.records:
        given = [entry for entry in content["annotations"] if entry["image_id"] == record.image_id]
        found = [DIGITS[entry["category_id"]] for entry in record.annotations]
        assert found == [names[entry["category_id"]] for entry in given]
    content["categories"][0]["name"] = "cat"
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(
        SystemExit, match=r"named has the classes \['zero'.*the data \['cat'.*only the second \['cat'\]"
    ):
        run(monkeypatch, tmp_path, *arguments, "--annotations", tmp_path / "annotations.json")


def test_papers_numbers_are_of_the_papers_classes_only():
    """Of architectures with the classes of ImageNet, COCO or ADE20K, and of no others."""
    assert published_metrics(pvt_hf.build_config("pvt_small")) == {"accuracy": 79.8}
    assert published_metrics(pvt_hf.build_config("pvt_small", num_labels=10)) == {}
    assert published_metrics(small_config("v2", num_labels=1000)) == {}
    backbone = pvt_hf.build_config("pvt_small", out_features=STAGES)
    instances = pvt_hf.MaskRCNNConfig(backbone_config=backbone, num_labels=80)
    assert published_metrics(instances)["mask_AP"] == 37.8
    assert published_metrics(instances, "mask_rcnn_3x_ms")["mask_AP"] == 39.9
    segmenter = pvt_hf.SemanticFPNConfig(backbone_config=backbone, num_labels=150)
    assert published_metrics(segmenter) == {"mIoU": 39.8}
