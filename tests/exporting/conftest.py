"""A small model to export, and an exporter that takes no time."""

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

import pvt_hf
from pvt_hf.exporting import export, programs
from tests.support.exports import Exporter, small_classifier


@pytest.fixture
def classifier():
    return small_classifier()


@pytest.fixture
def processor():
    return pvt_hf.PvtImageProcessor(crop_size=64)


@pytest.fixture
def exporter(monkeypatch):
    """In place of transformers' exporters: files with a word in them, whose programs are the model itself."""
    fake = Exporter()
    monkeypatch.setattr(export, "write_program", fake)
    monkeypatch.setattr(programs, "_CHECKED", ((1, 64, 64), (2, 64, 96), (3, 96, 64)))
    monkeypatch.setattr(export.Target, "import_packages", lambda *_: None)
    return fake


@pytest.fixture
def photos(tmp_path):
    """A folder of three images."""
    folder = tmp_path / "photos" / "inside"
    folder.mkdir(parents=True)
    for index in range(3):
        pixels = torch.rand(3, 5, 7).repeat_interleave(16, 1).repeat_interleave(16, 2)
        to_pil_image(pixels).save(folder / f"{index}.png")
    return folder.parent
