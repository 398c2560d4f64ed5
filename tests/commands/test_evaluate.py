"""`pvt-hf evaluate`: what it measures of checkpoints of each task, and what it compares that with."""

import json

import pytest
from transformers import (
    AutoModelForImageClassification,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
)

import pvt_hf
from pvt_hf.commands.evaluate import main
from pvt_hf.commands.measure import published_metrics
from pvt_hf.data.digits import write_scenes
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


def test_variant_that_was_not_converted_is_an_error(checkpoints, monkeypatch):
    with pytest.raises(SystemExit, match="Not there: converted/pvt_tiny. `pvt-hf convert --all converted` makes them"):
        run(monkeypatch, checkpoints, "--variant", "pvt_tiny")


def test_other_number_of_classes_is_an_error(checkpoints, monkeypatch, tmp_path):
    config = pvt_hf.PvtV2Config.from_pretrained(checkpoints / "classifier", num_labels=7)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="other has 7 classes and the data 10"):
        run(monkeypatch, tmp_path, "--model_name_or_path", "other")


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
