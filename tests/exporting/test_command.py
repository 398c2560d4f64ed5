"""`pvt-hf export`: what it prints, and one line for whatever goes wrong, with nothing left behind."""

import re
import signal
import sys

import pytest

import pvt_hf
from pvt_hf.commands.main import main
from tests.support.disk import full_disk, read_only_folder
from tests.support.small_models import STAGES, small_config


@pytest.fixture
def saved(classifier, processor, tmp_path):
    """A folder with a saved classifier."""
    classifier.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def run(*arguments) -> int:
    return main(["export", *map(str, arguments)])


def assert_one_line(error: str, *patterns: str) -> None:
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert all(re.search(pattern, error) for pattern in patterns), error


def test_it_prints_what_was_written_and_how_near_it_is(saved, exporter, photos, tmp_path, capsys):
    assert run(saved, tmp_path / "out", "--calibration_images", photos, "--dtype", "int8") == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path}/out/onnx/model_quantized.onnx: int8" in printed
    assert "height and width from 64 pixels on" in printed and "pixel_values -> logits" in printed
    assert "largest difference to the model on three inputs: 0.0e+00" in printed and "(tolerance 0.5)" in printed
    assert "the same: 100.0 % (the best class of an image, 3 images)" in printed
    assert "base_model" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("version", ["v1", "v2_linear"])
def test_backbones_and_encoders_are_exported_as_they_were_saved(version, exporter, tmp_path, capsys):
    config = small_config(version, out_features=STAGES[:2])
    prefix = {"v1": "Pvt", "v2_linear": "PvtV2"}[version]
    for kind, outputs in (
        ("Backbone", "feature_maps.0, feature_maps.1"),
        ("Model", "last_hidden_state, pooler_output"),
    ):
        getattr(pvt_hf, prefix + kind)(config).save_pretrained(tmp_path / kind)
        assert run(tmp_path / kind, tmp_path / "out" / kind) == 0
        assert f"pixel_values -> {outputs}\n" in capsys.readouterr().out


def interrupt():
    raise KeyboardInterrupt


ENDS = {"Ctrl-C": (interrupt, 130), "SIGTERM": (lambda: signal.raise_signal(signal.SIGTERM), 143)}


@pytest.mark.parametrize("name", ENDS)
def test_interrupts_leave_nothing(name, saved, exporter, tmp_path, capsys):
    exporter.fail, code = ENDS[name]
    assert run(saved, tmp_path / "new" / "out") == code
    assert_one_line(capsys.readouterr().err, "saved: interrupted; nothing half-written is left")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_full_disk_leaves_nothing(saved, exporter, tmp_path, capsys):
    with full_disk(100):
        assert run(saved, tmp_path / "out") == 1
    assert_one_line(capsys.readouterr().err, r"out could not be written: .*\(\d+ MiB are free there\). Nothing is left")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_folders_that_may_not_be_written_are_refused(saved, exporter, capsys):
    with read_only_folder() as folder:
        assert run(saved, folder / "out") == 1
        assert_one_line(capsys.readouterr().err, f"`output_dir` {folder}/out cannot be written: {folder} is read-only")
    assert exporter.samples is None


def test_models_and_images_that_are_none_are_named(saved, exporter, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no image")
    cases = {
        (tmp_path / "empty",): "empty cannot be loaded: it must be a folder",
        (saved, "--calibration_images", tmp_path / "empty"): f"There are no images in {tmp_path}/empty",
        (saved, "--calibration_images", tmp_path / "bad"): f"{tmp_path}/bad/a.png cannot be read",
        (saved, "--tolerance", "-1"): "`tolerance` must be a number above 0, got -1",
    }
    for (model, *options), message in cases.items():
        assert run(model, tmp_path / "out", *options) == 1
        assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named_with_their_extra(saved, tmp_path, monkeypatch, capsys):
    for arguments, package, extra in (((), "onnx", "export"), (("--target", "executorch"), "executorch", "executorch")):
        monkeypatch.setitem(sys.modules, package, None)
        assert run(saved, tmp_path / "out", *arguments) == 1
        assert f'{package} is missing; install it with: pip install "pvt_hf[{extra}]"' in capsys.readouterr().err


def test_errors_that_nobody_thought_of_are_one_line_too(saved, exporter, tmp_path, capsys):
    def fail():
        raise KeyError("first\nsecond \x1b[31m")

    exporter.fail = fail
    assert run(saved, tmp_path / "out") == 1
    assert_one_line(capsys.readouterr().err, "saved: KeyError", "--debug shows where")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
