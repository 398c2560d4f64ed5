"""Predictions for a folder of images, of whatever names."""

import os

import pytest
from PIL import Image

import pvt_hf
from pvt_hf.commands import predict
from tests.support.small_models import small_config


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    pvt_hf.PvtV2ForImageClassification(small_config("v2")).save_pretrained(folder)
    pvt_hf.PvtImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def test_names_that_are_not_utf8_are_written_as_they_are(classifier, tmp_path):
    (tmp_path / "in").mkdir()
    for name in (b"\xff.png", b"\x1b[2J.png"):
        Image.new("RGB", (40, 40)).save(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name))
    options = ["--images", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    assert predict.main(["--model_name_or_path", classifier, *options]) == 0
    lines = (tmp_path / "out" / "predictions.csv").read_bytes().split(b"\r\n")
    assert sorted(line.split(b",")[0] for line in lines) == [b"", b"\x1b[2J.png", b"image", b"\xff.png"]


def test_what_is_waited_for_is_refused_by_name(classifier, tmp_path):
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / "\x1b[2J.png")
    with pytest.raises(SystemExit, match=r"(?s)1 of 1 images cannot be used:.*/\\x1b\[2J\.png .*no regular file"):
        predict.main(["--model_name_or_path", classifier, "--images", str(tmp_path / "in"), "--use_cpu"])
