"""`pvt-hf predict`: pictures, label maps and json of every task, of images of whatever names."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

import pvt_hf
from pvt_hf.commands import predict
from tests.support.dense_models import build_dense_model
from tests.support.small_models import small_config

PROCESSORS = {
    "classifier": pvt_hf.PvtImageProcessor(crop_size=32),
    "retinanet": pvt_hf.PvtDetectionImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}),
    "mask_rcnn": pvt_hf.PvtDetectionImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}),
    "semantic_fpn": pvt_hf.PvtSegmentationImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a model of each task."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    for name, processor in PROCESSORS.items():
        is_classifier = name == "classifier"
        model = pvt_hf.PvtV2ForImageClassification(small_config("v2")) if is_classifier else build_dense_model(name)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three images; the last lies on its side, and its EXIF says so."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deep").mkdir()
    rng = np.random.default_rng(0)
    for number, name in enumerate(("7.png", "8.jpg", "deep/9.jpg")):
        pixels = rng.integers(0, 255, (6, 9, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((90, 60))
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 2 else 1
        image.save(folder / name, exif=exif)
    return folder


def run(*arguments) -> int:
    return predict.main([*map(str, arguments), "--device", "cpu"])


def read(file):
    return json.loads(file.read_text())


def test_classes_are_those_of_the_pipeline(models, photos, tmp_path, capsys):
    run(models / "classifier", photos, "--output_dir", tmp_path, "--top_k", "2", "--batch_size", "2")
    rows = read(tmp_path / "predictions.json")
    assert [(row["file_name"], row["width"], row["height"]) for row in rows] == [
        ("7.png", 90, 60),
        ("8.jpg", 90, 60),
        ("deep/9.jpg", 60, 90),
    ]
    classify = pipeline("image-classification", str(models / "classifier"), device="cpu")
    for row in rows:
        expected = classify(str(photos / row["file_name"]), top_k=2)
        assert [(one["label"], pytest.approx(one["score"], abs=1e-5)) for one in expected] == [
            (one["label"], one["score"]) for one in row["predictions"]
        ]
        assert Image.open(tmp_path / row["picture"]).width > 512 * row["width"] // max(row["width"], row["height"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"7.png: {rows[0]['summary']}" and lines[-1] == f"predictions for 3 images are in {tmp_path}"
    assert not (tmp_path / "coco_results.json").exists()


def test_objects_are_those_of_the_pipeline(models, photos, tmp_path, capsys):
    run(models / "mask_rcnn", photos, "--output_dir", tmp_path)
    rows, results = read(tmp_path / "predictions.json"), read(tmp_path / "coco_results.json")
    detect = pipeline("object-detection", str(models / "mask_rcnn"), device="cpu", threshold=0.3)
    assert sum(len(row["predictions"]) for row in rows) == len(results) > 0
    for row in rows:
        expected = detect(str(photos / row["file_name"]))
        assert [one["label"] for one in expected] == [one["label"] for one in row["predictions"]]
        boxes = [[list(one["box"].values()) for one in found] for found in (expected, row["predictions"])]
        np.testing.assert_allclose(*boxes, atol=1)  # the pipeline's are whole numbers
        assert {result["image_id"] for result in results if result["file_name"] == row["file_name"]} <= {
            int(os.path.basename(row["file_name"])[0])
        }
    fields = {"file_name", "image_id", "category", "category_id", "bbox", "score", "segmentation"}
    assert results[0].keys() == fields and results[0]["segmentation"]["size"] == [60, 90]
    capsys.readouterr()
    run(models / "retinanet", photos / "7.png", "--threshold", "0.9999", "--output_dir", tmp_path / "none")
    (row,) = read(tmp_path / "none" / "predictions.json")
    assert row["predictions"] == [] == read(tmp_path / "none" / "coco_results.json")
    assert row["summary"].startswith("nothing above 0.9999 (best: LABEL_")
    assert f"7.png: {row['summary']}\n" in capsys.readouterr().out


def test_label_maps_have_the_size_of_the_image_as_it_is_seen(models, photos, tmp_path):
    run(models / "semantic_fpn", photos, "--output_dir", tmp_path, "--window", "64", "--stride", "32", "--no_pictures")
    rows = read(tmp_path / "predictions.json")
    for row in rows:
        labels = Image.open(tmp_path / row["label_map"])
        assert labels.mode == "L" and labels.size == (row["width"], row["height"])
        shares = np.bincount(np.array(labels).flatten(), minlength=3) / labels.width / labels.height
        assert {one["label_id"]: pytest.approx(one["share"], abs=1e-5) for one in row["predictions"]} == {
            label: share for label, share in enumerate(shares) if share
        }
    assert rows[2]["label_map"] == "label_maps/deep/9.png" and not (tmp_path / "pictures").exists()


def test_names_that_are_not_utf8_are_written_as_they_are(models, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in (b"\xff.png", b"\x1b[2J.png"):
        Image.new("RGB", (40, 40)).save(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name))
    run(models / "classifier", tmp_path / "in", "--output_dir", tmp_path / "out")
    names = [row["file_name"] for row in read(tmp_path / "out" / "predictions.json")]
    assert sorted(map(os.fsencode, names)) == [b"\x1b[2J.png", b"\xff.png"]
    assert sorted(os.listdir(os.fsencode(tmp_path / "out" / "pictures"))) == [b"\x1b[2J.jpg", b"\xff.jpg"]
    assert "\x1b" not in capsys.readouterr().out


def test_what_is_waited_for_is_refused_by_name(models, tmp_path):
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / "\x1b[2J.png")
    with pytest.raises(SystemExit, match=r"(?s)1 of 1 images cannot be used:.*/\\x1b\[2J\.png .*no regular file"):
        run(models / "classifier", tmp_path / "in")


def test_corrupt_images_are_errors_or_skipped_and_listed(models, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    good = (photos / "8.jpg").read_bytes()
    for name, content in (("0.jpg", b"no image"), ("1.jpg", good[:-200]), ("2.jpg", good)):
        (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(SystemExit, match=r"(?s)1 of 3 images cannot be used.*0\.jpg.*--skip_corrupt"):
        run(models / "classifier", "in", "--output_dir", "out")
    run(models / "classifier", "in", "--output_dir", "out", "--skip_corrupt", "--batch_size", "3")
    output = capsys.readouterr().out
    assert "0.jpg cannot be read" in output and "1.jpg cannot be read" in output and "for 1 images" in output
    assert [row["file_name"] for row in read(tmp_path / "out" / "predictions.json")] == ["2.jpg"]
    (tmp_path / "in" / "0.jpg").unlink()
    with pytest.raises(SystemExit, match="1.jpg cannot be read"):  # which only its pixels tell
        run(models / "classifier", "in", "--output_dir", "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classifier", "photos", "--binary_masks"], "classifier is a classifier, which has no --binary_masks"),
        (
            ["retinanet", "photos", "--tta_flip", "--top_k", "3"],
            "is a detector, which has no --top_k and no --tta_flip",
        ),
        (["semantic_fpn", "photos", "--binary_masks"], "`binary_masks` is for a segmenter of two classes, got .* of 3"),
        (["semantic_fpn", "photos", "--subtask", "semantic"], "is a segmenter, which has no --subtask"),
        (["classifier", "nowhere"], "nowhere is not there"),
        (["classifier", "photos", "--batch_size", "0"], "`batch_size` must be at least 1, got 0"),
        (["classifier", "photos", "--output_dir", "file"], "`output_dir` file cannot be written: "),
        (["classifier", "pictures/a.jpg", "--output_dir", "."], r"a\.jpg would be replaced by a result"),
        (["nowhere/x", "photos"], "nowhere/x cannot be loaded: it must be a folder"),
        (["retinanet", "photos", "--threshold", "1"], r"`threshold` must be in \[0, 1\), got 1"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(models, photos, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes((photos / "8.jpg").read_bytes())
    (tmp_path / "file").touch()
    for name, folder in {"photos": photos, **{name: models / name for name in PROCESSORS}}.items():
        os.symlink(folder, tmp_path / name)
    with pytest.raises(SystemExit, match=message):
        run(*arguments)
    assert not (tmp_path / "runs").exists() and (tmp_path / "pictures" / "a.jpg").stat().st_size < 10_000


def test_options_of_argparse_are_usage_errors(models, photos, capsys):
    for arguments, message in (
        ([], "the following arguments are required: MODEL, IMAGES"),
        ([models / "classifier"], "the following arguments are required: IMAGES"),
        ([models / "classifier", photos, "--window", "3"], "--window and --stride go together"),
        ([models / "classifier", photos, "--dtype", "int8"], "invalid choice: 'int8'"),
    ):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert message in capsys.readouterr().err


def test_settings_may_stand_in_a_file(models, photos, tmp_path):
    (tmp_path / "settings.yaml").write_text(f"top_k: 1\noutput_dir: {tmp_path / 'out'}")
    run(tmp_path / "settings.yaml", models / "classifier", photos)
    assert [len(row["predictions"]) for row in read(tmp_path / "out" / "predictions.json")] == [1, 1, 1]
