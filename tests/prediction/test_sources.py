"""Files, folders and patterns, and what the images in them are called."""

import os
import re

import pytest
from PIL import Image

from pvt_hf.data.images import IMAGE_ENDINGS, ImageError
from pvt_hf.prediction.sources import find_images
from pvt_hf.prediction.videos import VIDEO_ENDINGS
from tests.support.small_models import ROOT


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Images and other files in two folders, beside which the process is."""
    for name in ("a/1.jpg", "a/deep/2.PNG", "a/.hidden.jpg", "a/notes.txt", "b/1.jpg", "b/3.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["a"], ["1.jpg", "deep/2.PNG"]),
        (["a/1.jpg"], ["1.jpg"]),
        (["b", "a/1.jpg"], ["b/1.jpg", "b/3.webp", "a/1.jpg"]),
        (["a/*"], ["1.jpg", "deep/2.PNG"]),
        (["*/1.jpg"], ["a/1.jpg", "b/1.jpg"]),
        (["**/*.jpg"], ["a/1.jpg", "b/1.jpg"]),
        (["b/1.jpg", "b/*", "./b"], ["1.jpg", "3.webp"]),
        (["a/notes.txt"], ["notes.txt"]),  # who names a file means it
    ],
)
def test_names_are_paths_in_the_common_folder(photos, sources, names):
    found = find_images(sources)
    assert [image.name for image in found] == names
    assert all(os.path.isabs(image.path) and os.path.samefile(image.path, image.path) for image in found)
    assert find_images([photos / source for source in sources]) == found


def test_results_of_a_former_run_are_no_images(photos):
    assert [image.name for image in find_images(["."], skipped="a")] == ["b/1.jpg", "b/3.webp"]
    with pytest.raises(ImageError, match="There are no images in a: "):
        find_images(["a"], skipped=".")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "There are no images: files, folders or patterns are needed"),
        (["c"], r"c is not there: images are files, folders or patterns such as 'photos/\*.jpg'"),
        (["*.gif"], r"There are no images in \*.gif: their names end with .bmp, .jpeg,"),
        (["clip.MP4"], "clip.MP4 is a video: images are needed"),
    ],
)
def test_sources_without_images_are_errors(photos, sources, message):
    (photos / "clip.MP4").touch()
    with pytest.raises(ImageError, match=message):
        find_images(sources)


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["clips/1.MP4"], ["1.MP4"]),
        (["clips/*.mp4"], ["2.mp4"]),
        (["**/*.mov", "a"], ["clips/deep/3.mov", "a/1.jpg", "a/deep/2.PNG"]),
        (["."], ["a/1.jpg", "a/deep/2.PNG", "b/1.jpg", "b/3.webp"]),
    ],
)
def test_videos_are_named(photos, sources, names):
    for name in ("clips/1.MP4", "clips/2.mp4", "clips/deep/3.mov", "clips/.4.mp4"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).touch()
    assert [image.name for image in find_images(sources, videos=True)] == names


@pytest.mark.parametrize("source", ["clips", "clips/*"])
def test_sources_of_videos_alone_are_errors(photos, source):
    (photos / "clips").mkdir()
    for name in (".0.mp4", "1.MP4"):
        (photos / "clips" / name).touch()
    message = rf"There are no images in {re.escape(source)}: .* have to be named, as clips/1\.MP4 or as 'clips/\*\.MP4'"
    with pytest.raises(ImageError, match=message):
        find_images([source], videos=True)


def test_results_of_one_name_are_an_error(photos):
    Image.new("RGB", (8, 8)).save("b/1.PNG")
    with pytest.raises(ImageError, match=r"1\.PNG and 1\.jpg differ in their endings only"):
        find_images(["b"])


def test_guide_lists_the_endings():
    text = " ".join((ROOT / "docs" / "guides" / "predict.md").read_text().split())
    for endings in (IMAGE_ENDINGS, VIDEO_ENDINGS):
        *others, last = (f"`{ending}`" for ending in sorted(endings))
        assert f"what ends with {', '.join(others)} or {last}." in text
