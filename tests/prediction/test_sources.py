"""Files, folders and patterns, and what the images in them are called."""

import os

import pytest
from PIL import Image

from pvt_hf.data.images import ImageError
from pvt_hf.prediction.sources import find_images


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
        (["clip.MP4"], "clip.MP4 is a video: make images of its frames first"),
    ],
)
def test_sources_without_images_are_errors(photos, sources, message):
    (photos / "clip.MP4").touch()
    with pytest.raises(ImageError, match=message):
        find_images(sources)


def test_results_of_one_name_are_an_error(photos):
    Image.new("RGB", (8, 8)).save("b/1.PNG")
    with pytest.raises(ImageError, match=r"1\.PNG and 1\.jpg differ in their endings only"):
        find_images(["b"])
