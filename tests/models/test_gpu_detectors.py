"""Detectors on a GPU: the CPU's losses, gradients and boxes, its own operators of torchvision, and half precision."""

import warnings

import pytest
import torch
from torchvision.ops import batched_nms

from pvt_hf.models import boxes as boxes_module
from pvt_hf.models.boxes import suppress
from pvt_hf.models.rois import pool_rois
from tests.support.dense_models import build_dense_model, dense_inputs
from tests.support.waits import forbid_waits

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

NAMES = pytest.mark.parametrize(
    "name", ["retinanet", "atss", "gfl", "sparse_rcnn", "mask_rcnn", "faster_rcnn", "cascade_mask_rcnn", "detr"]
)


IMAGE_BY_IMAGE = {"mask_rcnn", "faster_rcnn", "cascade_mask_rcnn", "detr"}


def move(value, device, dtype):
    """Inputs of a detector on a device, images and boxes in this type."""
    if isinstance(value, dict):
        return {key: move(part, device, dtype) for key, part in value.items()}
    if isinstance(value, list):
        return [move(part, device, dtype) for part in value]
    return value.to(device, dtype if value.is_floating_point() else None)


def draw_batch(model, batch_size: int = 3) -> dict:
    """Images of which the last has padding and no object."""
    inputs, labels = dense_inputs(model, batch_size, 96, 128), []
    for count in (*[2] * (batch_size - 2), 1, 0):
        boxes = torch.tensor([[0.4, 0.5, 0.5, 0.6], [0.6, 0.4, 0.3, 0.5]])[:count]
        masks = torch.zeros(count, 96, 128, dtype=torch.bool)
        masks[:, 20:60, 30:90] = True
        labels.append({"class_labels": torch.tensor([2, 1])[:count], "boxes": boxes, "masks": masks})
    return inputs | {"labels": labels}


def differentiate(model, inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(**inputs).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(names, gradients, strict=True)
    return loss.detach().cpu(), {name: gradient.cpu() for name, gradient in pairs if gradient is not None}


@NAMES
def test_losses_and_gradients_are_the_cpus(name, device):
    model = build_dense_model(name).double()
    inputs = draw_batch(model)
    expected_loss, expected = differentiate(model, move(inputs, "cpu", torch.float64))
    loss, found = differentiate(model.to(device), move(inputs, device, torch.float64))
    # (The boxes of some, and their overlaps, are computed in float32.)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert found.keys() == expected.keys()
    scale = max(value.abs().max() for value in expected.values())
    for key, value in expected.items():
        assert (found[key] - value).abs().max() <= 1e-4 * scale, key


@NAMES
@torch.no_grad()
def test_outputs_are_the_cpus(name, device):
    model = build_dense_model(name).double()
    inputs = move(dense_inputs(model, 2, 96, 128), "cpu", torch.float64)
    expected = model(**inputs)
    found = model.to(device)(**move(inputs, device, torch.float64))
    compared = [key for key in ("logits", "pred_boxes", "scores", "pred_masks") if key in expected]
    assert compared
    for key in compared:
        torch.testing.assert_close(found[key].cpu(), expected[key], rtol=1e-4, atol=1e-4, equal_nan=True)


@NAMES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_step_under_autocast_is_finite(name, dtype, device):
    model = build_dense_model(name).to(device).train()
    inputs = move(draw_batch(model), device, torch.float32)
    with torch.autocast(device.type, dtype):
        loss = model(**inputs).loss
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@NAMES
def test_optimiser_takes_steps(name, device):
    """In training mode, with what is drawn at random."""
    model = build_dense_model(name).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = move(draw_batch(model), device, torch.float32)
    losses = []
    for _ in range(6):
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["retinanet", "atss", "gfl", "sparse_rcnn"])
@torch.no_grad()
def test_detection_does_not_wait(name, device):
    """In images without padding, whose sizes are known. (transformers' DETR asks its mask whether it is needed.)"""
    model = build_dense_model(name).to(device)
    inputs = {"pixel_values": torch.randn(2, 3, 96, 128, device=device)}
    model(**inputs)
    with forbid_waits(device):
        model(**inputs)


def count_waits(model, inputs) -> int:
    """How often the forward pass and the loss wait for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@NAMES
def test_training_waits_as_often_for_larger_batches(name, device):
    """But for the suppression of proposals, and what transformers' DETR does, image by image."""
    if device.type == "cpu":
        pytest.skip("nothing waits for a CPU")
    model = build_dense_model(name).to(device).train()
    batches = [move(draw_batch(model, size), device, torch.float32) for size in (3, 6)]
    model(**batches[0])
    counts = [count_waits(model, inputs) for inputs in batches]
    print(f"{name} waits {counts[0]} times for 3 images and {counts[1]} times for 6")
    assert name in IMAGE_BY_IMAGE or counts[0] == counts[1] <= 12


def test_compiled_detector_is_a_cuda_graph(device):
    if device.type == "cpu":
        pytest.skip("CUDA graphs are a GPU's")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = build_dense_model("retinanet", "resnet").to(device)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        inputs = move(dense_inputs(model, 2, 96, 128), device, torch.float32)
        with torch.no_grad():
            found, expected = compiled(**inputs), model(**inputs)
        for key in ("logits", "pred_boxes"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-3)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def test_operators_of_torchvision_are_the_cpus(device):
    """RoI align of many levels, in all precisions, and suppression, as an operator for compilers too."""
    levels = [torch.randn(2, 4, 64 // 2**index, 96 // 2**index, dtype=torch.double) for index in range(4)]
    corners = torch.rand(40, 2, dtype=torch.double) * 150
    boxes = torch.cat((corners, corners + torch.rand(40, 2, dtype=torch.double) * 150), dim=1)
    rois = torch.cat((torch.arange(40)[:, None] % 2, boxes), dim=1)
    expected = pool_rois(levels, rois, (4, 8, 16, 32), 7)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        roi_type = torch.float64 if dtype == torch.float64 else torch.float32
        on_device = [level.to(device, dtype) for level in levels]
        found = pool_rois(on_device, rois.to(device, roi_type), (4, 8, 16, 32), 7)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double().cpu(), expected, rtol=tolerance, atol=tolerance)

    scores, ids = torch.rand(40), torch.arange(40) % 3
    kept = batched_nms(boxes.float(), scores, ids, 0.3)
    arguments = (boxes.float()[None], scores[None], ids, torch.ones(1, 40, dtype=torch.bool), 0.3, 12)
    arguments = tuple(value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments)
    for function in (suppress, boxes_module._suppress_as_operator):
        assert function(*arguments)[0].tolist()[: len(kept)] == kept[:12].tolist()


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn"])
@torch.no_grad()
def test_exported_program_equals_the_model(name, device):
    """Of a model that is on the GPU."""
    model = build_dense_model(name, "resnet").to(device)
    inputs = move(dense_inputs(model, 1, 96, 128), device, torch.float32)
    program = torch.export.export(model, (), kwargs=inputs).module()
    found, expected = program(**inputs), model(**inputs)
    for key in ("logits", "pred_boxes"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-3)
