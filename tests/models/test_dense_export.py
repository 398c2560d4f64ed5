"""The detectors and the segmenter as programs: compiled, exported, and in another runtime, for any batch and size."""

from unittest import mock

import pytest
import torch
from torch.export import Dim
from torch.testing import assert_close

from pvt_hf.models import boxes as boxes_module
from pvt_hf.models.boxes import batched_nms, suppress
from tests.support.dense_models import build_dense_model, dense_inputs

ONE_STAGE = ("retinanet", "atss", "gfl", "sparse_rcnn", "semantic_fpn", "detr")
TWO_STAGE = ("mask_rcnn", "faster_rcnn", "cascade_mask_rcnn")
MODELS = pytest.mark.parametrize("name", ONE_STAGE + TWO_STAGE)
# Below, the coarsest level of RetinaNet has a single row, which an exported program cannot have beside others.
SMALLEST = 129


def build_small(name, backbone="v2"):
    return build_dense_model(name, backbone, depths=[1, 1, 1, 1])


def describe_sizes(name, inputs, smallest=SMALLEST):
    sides = {"height": Dim("height", min=smallest, max=2048), "width": Dim("width", min=smallest, max=2048)}
    batch = {} if name in TWO_STAGE else {0: Dim("batch", max=64)}
    shapes = {"pixel_values": batch | {2: sides["height"], 3: sides["width"]}}
    if "pixel_mask" in inputs:
        shapes["pixel_mask"] = batch | {1: sides["height"], 2: sides["width"]}
    return shapes


def other_inputs(name, model):
    batch_size = 1 if name in TWO_STAGE else 3
    return dense_inputs(model, batch_size, 160, 256), dense_inputs(model, 1, 192, 160)


def assert_same(actual, expected, atol=1e-5):
    expected = {key: value for key, value in expected.items() if isinstance(value, torch.Tensor)}
    if "scores" in expected:
        assert (expected["scores"] > 0).sum() > 5
    for key, value in expected.items():
        assert_close(actual[key], value, rtol=1e-4, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


def export(name, model):
    inputs = dense_inputs(model, 1 if name in TWO_STAGE else 2, 160, 192)
    return torch.export.export(model, (), kwargs=inputs, dynamic_shapes=describe_sizes(name, inputs)).module()


# What is this package's own in every run, on the backbone that is traced fastest.
CASES = [("retinanet", "resnet"), ("mask_rcnn", "resnet")]
CASES += [pytest.param(name, "v2", marks=pytest.mark.slow) for name in ONE_STAGE + TWO_STAGE]


@pytest.mark.process
@pytest.mark.parametrize(("name", "backbone"), CASES)
@torch.no_grad()
def test_exported_program_takes_any_size(name, backbone):
    model = build_small(name, backbone)
    program = export(name, model)
    for inputs in other_inputs(name, model):
        assert_same(program(**inputs), model(**inputs))


@pytest.mark.slow
@MODELS
@torch.no_grad()
def test_compiled_equals_eager(name):
    torch.compiler.reset()  # Mask R-CNN and Faster R-CNN have their code, and its limit of programs, in common
    model = build_small(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for inputs in other_inputs(name, model):
        assert_same(compiled(**inputs), model(**inputs))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@MODELS
@torch.no_grad()
def test_onnx_has_names_and_the_same_numbers(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build_small(name)
    inputs = dense_inputs(model, 1 if name in TWO_STAGE else 2, 160, 192)
    names = list(model(**inputs))
    torch.onnx.export(
        model,
        (),
        tmp_path / "model.onnx",
        kwargs=inputs,
        dynamic_shapes=describe_sizes(name, inputs),
        output_names=names,
        dynamo=True,
        verbose=False,
    )
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    assert [output.name for output in session.get_outputs()] == names and "logits" in names
    for batch in (inputs, *other_inputs(name, model)):
        outputs = session.run(names, {key: value.numpy() for key, value in batch.items()})
        assert_same(dict(zip(names, map(torch.tensor, outputs), strict=True)), model(**batch), atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_level_of_one_row_is_not_dynamic():
    """Smaller images have a program of their own."""
    model = build_small("retinanet")
    inputs = dense_inputs(model, 2, 160, 192)
    with pytest.raises(Exception, match="129 <="):
        torch.export.export(model, (), kwargs=inputs, dynamic_shapes=describe_sizes("retinanet", inputs, smallest=64))
    small = dense_inputs(model, 2, 64, 96)
    assert_same(torch.export.export(model, (), kwargs=small).module()(**small), model(**small))


def test_suppression_has_a_result_of_known_size():
    """The same for a compiler, for which it is one operator, and for an exported program."""
    corners = torch.rand(2, 30, 2) * 40
    boxes = torch.cat((corners, corners + torch.rand(2, 30, 2) * 30), dim=-1)
    scores, ids = torch.rand(2, 30), torch.arange(30) % 3
    candidates = torch.rand(2, 30) > 0.3
    candidates[1] = False
    arguments = (boxes, scores, ids, candidates, 0.3, 12)
    kept = suppress(*arguments)
    rows = candidates[0].nonzero().flatten()
    expected = rows[batched_nms(boxes[0, rows], scores[0, rows], ids[rows], 0.3)]
    assert len(expected) > 5 and kept[0, : len(expected)].tolist() == expected[:12].tolist()
    assert (kept[0, len(expected) :] == -1).all() and (kept[1] == -1).all()
    assert suppress(*arguments[:-1], 3).tolist() == [expected[:3].tolist(), [-1] * 3]
    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        assert torch.equal(suppress(*arguments), kept)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(boxes_module._suppress_as_operator, arguments, test_utils=tests)
