"""Inference of the detectors of one stage, compiled and exported."""

import pytest
import torch
from torch.export import Dim

from tests.support.detection_run import small_detector
from tests.support.small_models import randomize

pytestmark = pytest.mark.slow
DETECTORS = pytest.mark.parametrize("architecture", ["retinanet", "atss", "gfl"])
# From here on no level is a single row or column, of which torch makes a special case.
SMALLEST, SIZES = 129, [(1, 129, 161), (3, 288, 192)]


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


def dynamic_shapes():
    return {0: Dim("batch"), 2: Dim("height", min=SMALLEST, max=4096), 3: Dim("width", min=SMALLEST, max=4096)}


@torch.no_grad()
@DETECTORS
def test_exported_program_takes_any_size(architecture):
    model, dynamic = build(architecture), {"pixel_values": dynamic_shapes()}
    program = torch.export.export(model, (images(2, 160, 290),), dynamic_shapes=dynamic).module()
    for size in SIZES:
        pixels = images(*size)
        actual, expected = program(pixels), model(pixels)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5)


@torch.no_grad()
@DETECTORS
@pytest.mark.filterwarnings("ignore")
def test_onnx_program_gives_equal_numbers(architecture, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = build(architecture), str(tmp_path / "model.onnx")
    expected = model(images(2, 160, 290))
    torch.onnx.export(
        model,
        (images(2, 160, 290),),
        path,
        input_names=["pixel_values"],
        output_names=list(expected),
        dynamic_shapes={"pixel_values": dynamic_shapes()},
        dynamo=True,
    )
    session = onnxruntime.InferenceSession(path)
    for size in SIZES:
        pixels = images(*size)
        values = dict(zip(expected, session.run(None, {"pixel_values": pixels.numpy()}), strict=True))
        for name, value in model(pixels).items():
            torch.testing.assert_close(torch.from_numpy(values[name]), value, rtol=0, atol=2e-5)
