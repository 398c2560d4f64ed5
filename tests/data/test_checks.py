"""Checks before the first step: what they find, and that a file is checked once until it changes."""

import os
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from pvt_hf.data import checks
from pvt_hf.data.checks import check_all, check_images, describe_problems
from pvt_hf.data.images import ImageError


@pytest.fixture
def images(tmp_path):
    """Two images, a turned one, a truncated one, a text and a missing one."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (6, 4)).save(tmp_path / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no image")
    return [str(tmp_path / name) for name in ("a.png", "b.png", "turned.jpg", "cut.jpg", "text.png", "missing.png")]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.process)])
def test_images_are_opened_or_decoded(images, workers):
    a, _, turned, cut, text, missing = check_images(images, workers=workers)
    assert a.value == {"height": 4, "width": 6, "turned": False} and turned.value["turned"]
    assert cut.value["width"] == 64 and cut.problem is None
    assert f"{images[4]} cannot be read: UnidentifiedImageError" in text.problem
    assert f"{images[5]} cannot be read: FileNotFoundError" in missing.problem
    a, _, turned, cut, text, missing = check_images(images, decoded=True, workers=workers)
    assert a.value == {"height": 4, "width": 6, "turned": False} and "truncated" in cut.problem
    problems = [found.problem for found in (text, cut, missing)]
    assert describe_problems(problems, 6, "images", shown=2) == (
        f"3 of 6 images cannot be used:\n  {text.problem}\n  {cut.problem}\n  ... and 1 others"
    )


def test_rows_of_a_data_set_are_images_too(images):
    """Files or bytes, in the order of a selection."""
    features = datasets.Features({"image": datasets.Image(decode=False)})
    stored = {
        "files": [{"bytes": None, "path": path} for path in images],
        "bytes": [{"bytes": Path(path).read_bytes(), "path": None} for path in images[:5]] + [None],
    }
    for cells in stored.values():
        rows = datasets.Dataset.from_dict({"image": cells}, features=features)
        found = check_images(rows.select([5, 4, 3, 2, 0]), decoded=True)
        assert [bool(one.problem) for one in found] == [True, True, True, False, False]
        assert found[3].value["turned"] and found[4].value == {"height": 4, "width": 6, "turned": False}
    assert found[0].problem == "row 0 has no image." and "row 1 cannot be read" in found[1].problem
    assert check_images(rows.select([5]))[0] == found[0]


def test_files_are_checked_once_until_they_change(tmp_path, monkeypatch):
    """By size and time; problems are kept as well, those of missing files are not."""
    monkeypatch.setattr(checks, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(checks, "_CACHED_FROM", 2)
    files = [str(tmp_path / name) for name in "abcd"]
    for file in files[:3]:
        Path(file).write_text(file[-1])
    looked_at = []

    def read(item):
        paths = (item,) if isinstance(item, str) else item
        looked_at.append("".join(path[-1] for path in paths))
        if not os.path.exists(paths[0]) or looked_at[-1] == "b":
            raise ValueError(f"no {paths[0]}")
        return [Path(path).read_text() for path in paths]

    def check(items, description="letters"):
        looked_at.clear()
        return [found.value or found.problem for found in check_all(read, items, description)], "".join(looked_at)

    expected = [["a"], f"no {files[1]}", ["c"], f"no {files[3]}"]
    assert check(files) == (expected, "abcd")
    assert check(files) == (expected, "d")
    Path(files[2]).write_text("other")
    assert check(files[::-1]) == ([expected[3], ["other"], *expected[1::-1]], "dc")
    os.utime(files[0], ns=(1, 1))
    assert check(files)[1] == "ad" and check(files, "others")[1] == "abcd"
    pairs = [(files[0], files[2]), (files[2], files[0])]
    assert check(pairs) == ([["a", "other"], ["other", "a"]], "acca")
    Path(files[2]).write_text("c")
    assert check(pairs)[1] == "acca" and check(pairs)[1] == ""
    assert not list((tmp_path / "home").rglob("*.partial"))


def test_checks_leave_the_random_state_alone(images):
    state = torch.get_rng_state()
    check_images(images)
    assert torch.equal(torch.get_rng_state(), state)


def test_names_of_files_do_not_change_the_terminal():
    problems = describe_problems(["a\x1b[2J.png cannot be read\nall is well", "b"], 3, "images")
    assert problems == r"2 of 3 images cannot be used:" "\n  " r"a\x1b[2J.png cannot be read\nall is well" "\n  b"
    assert str(ImageError("a\x1b[2J.png\n  b\ud800")) == r"a\x1b[2J.png" "\n" r"  b\ud800"
