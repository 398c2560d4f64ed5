"""Detectors of one stage compiled, exported, and in several processes."""

import pytest
import torch
from torch.export import Dim

from tests.support.detection_run import small_detector
from tests.support.small_models import randomize

pytestmark = pytest.mark.process
DETECTORS = pytest.mark.parametrize("architecture", ["retinanet", "atss", "gfl"])
SIZES = [(1, 64, 64), (3, 160, 96)]


def build(architecture):
    return randomize(small_detector(architecture, num_labels=3)).eval()


def images(batch=2, height=96, width=128):
    return torch.randn(batch, 3, height, width)


@torch.no_grad()
@DETECTORS
def test_compiled_equals_eager(architecture):
    model, pixels = build(architecture), images()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    actual, expected = compiled(pixels), model(pixels)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5)


@torch.no_grad()
@DETECTORS
def test_exported_program_takes_any_size(architecture):
    model = build(architecture)
    dynamic = {0: Dim("batch"), 2: Dim("height", min=64, max=4096), 3: Dim("width", min=64, max=4096)}
    program = torch.export.export(model, (images(),), dynamic_shapes={"pixel_values": dynamic}).module()
    for size in SIZES:
        pixels = images(*size)
        actual, expected = program(pixels), model(pixels)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5)
