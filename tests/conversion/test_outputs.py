"""Whatever goes wrong with what a conversion writes: one line, exit 1, nothing left behind."""

import errno
import json
import os
import re
import signal
import threading

import pytest

from pvt_hf.commands import convert as command
from pvt_hf.conversion import convert
from pvt_hf.conversion.rename import ConversionError
from pvt_hf.writing.files import atomic_file, hidden_folder
from tests.support.checkpoints import run
from tests.support.dense_models import build_dense_model
from tests.support.disk import full_disk, read_only_folder


def loop(folder):
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def file(folder):
    (folder / "file").write_text("mine")
    return folder / "file"


PATHS = {
    "NUL byte": (lambda folder: f"{folder}/a\0b", "cannot be written: a name cannot have a NUL byte"),
    "loop of links": (loop, "cannot be written: Too many levels of symbolic links"),
    "below a loop": (lambda folder: loop(folder) / "out", "cannot be written: Too many levels of symbolic links"),
    "below a file": (lambda folder: file(folder) / "new" / "out", "cannot be written: Not a directory"),
    "long name": (lambda folder: folder / ("ü" * 128), "cannot be written: a name of 256 bytes is longer than the 255"),
    "long folder": (lambda folder: folder / "new" / ("a" * 300) / "out", "cannot be written: a name of 300 bytes"),
    "root": (lambda folder: "/", "(is not empty; use --overwrite|exists, and is no regular file)"),
    "file": (file, "(must be a new or an empty directory|exists; use --overwrite)"),
}


def assert_one_line(error: str, *patterns: str) -> None:
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert all(re.search(pattern, error) for pattern in patterns), error


@pytest.mark.parametrize("command", [("a.pth",), ("--to", "official", "saved")], ids=["convert", "--to"])
@pytest.mark.parametrize("name", PATHS)
def test_unusable_outputs_are_refused_before_anything_is_read(name, command, tmp_path, capsys, monkeypatch):
    path, message = PATHS[name]
    path = path(tmp_path)
    before = sorted(tmp_path.iterdir())
    (tmp_path / "saved").mkdir()
    for needed in ("config.json", "model.safetensors"):
        (tmp_path / "saved" / needed).touch()
    monkeypatch.chdir(tmp_path)
    assert run(*command, path) == 1
    argument = "`OUTPUT_DIR`" if command == ("a.pth",) else "`FILE`"
    assert_one_line(capsys.readouterr().err, argument, message)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "saved"])


@pytest.mark.parametrize("command", [("a.pth",), ("--to", "official", "saved")], ids=["convert", "--to"])
def test_folders_that_may_not_be_written_are_refused(command, capsys):
    with read_only_folder() as folder:
        assert run(*command, folder / "new" / "out") == 1
        assert_one_line(capsys.readouterr().err, rf"/new/out cannot be written: {folder} is read-only, or not yours")
        assert not list(folder.iterdir())


@pytest.mark.parametrize("output", ["new/out", "new/out.pth", "new/out.safetensors"])
def test_full_disk_leaves_nothing(output, converted, capsys):
    output = converted / output
    command = ("--to", "official", converted / "saved") if output.suffix else (converted / "a.pth",)
    with full_disk():
        assert run(*command, output) == 1
    assert_one_line(capsys.readouterr().err, rf"^error: {output} could not be written: .*\(\d+ MiB are free there\)")


def test_failing_card_leaves_the_former_conversion(converted, capsys, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "README.md")

    monkeypatch.setattr(convert, "_evaluate", lambda _: [])  # which takes long
    monkeypatch.setattr(convert, "largest_difference", lambda *_: 0.0)
    monkeypatch.setattr("huggingface_hub.ModelCard.save", fail)
    assert run(converted / "a.pth", converted / "saved", "--overwrite") == 1
    assert_one_line(capsys.readouterr().err, f"{converted}/saved could not be written: No space left on device")


def test_termination_is_as_clean_as_an_interrupt(converted, capsys, monkeypatch):
    monkeypatch.setattr(convert, "_evaluate", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert run(converted / "a.pth", converted / "new" / "out") == 143
    assert_one_line(capsys.readouterr().err, "a.pth: interrupted; nothing half-written is left")
    assert signal.getsignal(signal.SIGTERM) is before
    # In another thread there are no signals to wait for.
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run("missing.pth", converted / "out")))
    thread.start()
    thread.join()
    assert codes == [1]


def test_leftovers_of_the_killed_are_cleared_and_those_of_the_running_are_not(tmp_path):
    if (child := os.fork()) == 0:
        with hidden_folder(tmp_path) as folder:
            (folder / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with hidden_folder(tmp_path) as running:
        assert [path.name for path in tmp_path.iterdir()] == [running.parent.name] != [left.name]
        (running / "mine").touch()
        with hidden_folder(tmp_path) as other:
            assert (running / "mine").exists() and other != running
    assert not list(tmp_path.iterdir())


def test_without_locks_files_are_written_and_nothing_is_cleared(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("pvt_hf.writing.files.FileLock.__enter__", refuse)
    with hidden_folder(tmp_path), atomic_file(tmp_path / "file") as path:
        assert len(list(tmp_path.iterdir())) == 2
        path.touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_errors_that_nobody_thought_of_are_one_line_too(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise KeyError("first\nsecond \x1b[31m")

    monkeypatch.setattr(convert, "read_checkpoint", fail)
    assert run("a.pth", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert_one_line(error, r"^error: a\.pth: KeyError: 'first\\nsecond \\x1b\[31m'", "--debug shows where")
    assert run("a.pth", tmp_path / "out", "--debug") == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith(error)


def test_names_of_a_file_do_not_change_the_terminal(converted, capsys):
    printed = (converted / "printed").read_text()
    assert r"left in the file: epoch\x1b[2J\x07" in printed and r"saved\x1b[31m" in printed
    assert run(converted / "b\x1b[31m.pth", converted / "none") == 1
    printed += capsys.readouterr().err
    assert all(character.isprintable() or character == "\n" for character in printed)


@pytest.mark.parametrize(
    ("field", "value"),
    [("backbone_config", "abc"), ("strides", "unknown"), ("anchor_ratios", []), ("backbone_config", {"depths": -1})],
)
def test_configuration_that_makes_no_detector_leaves_no_file(field, value, tmp_path, capfd):
    """transformers has a table for tensors that do not fit, which is not shown."""
    build_dense_model("retinanet", depths=[1, 1, 1, 1]).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    known = json.loads(path.read_text())
    value = known[field] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(known | {field: value}))
    capfd.readouterr()
    assert run("--to", "official", tmp_path / "saved", tmp_path / "new" / "a.pth") == 1
    assert_one_line(capfd.readouterr().err, "(does not hold a|no object)")
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


def test_debug_shows_where_any_variant_failed(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise ConversionError("no such thing")

    monkeypatch.setattr(command, "VARIANTS", {"pvt_tiny": None})
    monkeypatch.setattr(command, "convert", fail)
    assert run("--all", tmp_path / "zoo") == 1
    assert "| pvt_tiny | | | | no such thing |" in capsys.readouterr().out
    assert run("--all", tmp_path / "zoo", "--debug") == 1
    assert "in fail" in capsys.readouterr().err
