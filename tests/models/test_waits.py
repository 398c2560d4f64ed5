"""When Python has to know what a tensor holds, it waits for a GPU: never in classifiers, backbones and Semantic FPN, in
detectors once for a batch. On fake CUDA tensors, asking is an error."""

from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pvt_hf
from pvt_hf.models import boxes, chunks, rois, rpn
from tests.support.dense_models import build_dense_model, dense_inputs
from tests.support.small_models import (
    STAGES,
    build_backbone,
    build_classifier,
    build_segmenter,
    draw_inputs,
    small_config,
)
from tests.support.waits import OnDevice, on_device

VERSIONS = ("v1", "v2", "v2_linear")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("build", [build_classifier, build_backbone, build_segmenter])
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_loss(build, version, training):
    with torch.device("meta"):
        model = build(version).train(training)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cuda")
        pixels = torch.randn(2, 3, 64, 96, device="cuda")
        shape = {build_classifier: (2,), build_segmenter: (2, 64, 96)}.get(build)
        labels = {} if shape is None else {"labels": torch.zeros(shape, dtype=torch.int64, device="cuda")}
        outputs = model(pixels, **labels)
        assert (outputs.loss if labels else outputs.feature_maps[0]).device.type == "cuda"


@pytest.mark.parametrize("loss_normalization", ["valid", "all"])
def test_losses_of_accumulated_batches(loss_normalization):
    with torch.device("meta"):
        models = [build_segmenter("v2", loss_normalization=loss_normalization), build_classifier("v2")]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for model, shape in zip(models, [(2, 64, 96), (2,)], strict=True):
            labels = torch.zeros(shape, dtype=torch.int64, device="cuda")
            pixels = torch.randn(2, 3, 64, 96, device="cuda")
            loss = model.to_empty(device="cuda")(pixels, labels=labels, num_items_in_batch=labels.sum()).loss
            assert loss.shape == ()


@pytest.mark.parametrize("build", [build_classifier, build_segmenter])
def test_the_test_sees_what_waits(build, monkeypatch):
    with torch.device("meta"):
        model = build("v2")
    module = {build_classifier: "modeling_common", build_segmenter: "modeling_semantic_fpn"}[build]
    monkeypatch.setattr(
        f"pvt_hf.models.{module}.check_label_values", lambda labels, is_wrong, wanted: bool(is_wrong.any())
    )
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException):
        shape = (2,) if build is build_classifier else (2, 64, 96)
        labels = torch.zeros(shape, dtype=torch.int64, device="cuda")
        model.to_empty(device="cuda")(torch.randn(2, 3, 64, 96, device="cuda"), labels=labels)


@pytest.mark.parametrize("version", VERSIONS)
def test_training_step(version):
    """Backward pass and optimiser too, on meta tensors, whose values cannot be asked for either. (Without a GPU the
    backward pass of fake CUDA tensors does not start.)"""
    with torch.device("meta"):
        model = build_classifier(version).train()
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        pixels, labels = torch.randn(2, 3, 64, 96), torch.zeros(2, dtype=torch.int64)
        model(pixels, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize(
    ("config_class", "model_class", "stages"),
    [
        (pvt_hf.RetinaNetConfig, pvt_hf.RetinaNetForObjectDetection, STAGES[1:]),
        (pvt_hf.ATSSConfig, pvt_hf.ATSSForObjectDetection, STAGES[1:]),
        (pvt_hf.GFLConfig, pvt_hf.GFLForObjectDetection, STAGES[1:]),
        (pvt_hf.SparseRCNNConfig, pvt_hf.SparseRCNNForObjectDetection, STAGES),
    ],
)
def test_detectors_without_padding(config_class, model_class, stages):
    with torch.device("meta"):
        model = model_class(config_class(backbone_config=small_config("v2", out_features=stages), num_labels=5)).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        outputs = model.to_empty(device="cuda")(torch.randn(2, 3, 128, 160, device="cuda"))
        assert outputs.pred_boxes.device.type == "cuda"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_accelerators_store_large_maps(device, monkeypatch):
    """The MLP of a large map is recomputed in the backward pass on a CPU, and where `max_stored_tokens` says so."""
    recomputed = []

    def record(function, *args, use_reentrant, preserve_rng_state):
        recomputed.append(function)
        return function(*args)

    monkeypatch.setattr(chunks, "checkpoint", record)
    with torch.device("meta"):
        model = build_backbone("v2").train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device=device)
        pixels = torch.randn(1, 3, 256, 256, device=device)
        model(pixels)
        assert bool(recomputed) == (device == "cpu")
        monkeypatch.setitem(pvt_hf.models.modeling_pvt_v2.PvtV2ConvFeedForwardNetwork.max_stored_tokens, "cuda", 100)
        recomputed.clear()
        model(pixels)
        assert recomputed


class TensorsOfTheCPU(TorchDispatchMode):
    """The operators that see a tensor which is not on the GPU, as one is that is copied there, and those that write to
    an input or a parameter."""

    def __init__(self, model: torch.nn.Module, inputs: dict):
        super().__init__()
        self.found, self.given = set(), {id(value) for value in inputs.values()}
        self.given |= {id(value) for value in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        seen = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
        written = [value for value in args if id(value) in self.given] if func._schema.is_mutable else []
        if written or any(value.device.type == "cpu" for value in seen):
            self.found.add(str(func))
        return result


def find_tensors_of_the_cpu(model: torch.nn.Module, inputs: dict) -> set[str]:
    """Of a model without weights, which is run as compiled code."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cuda")
        inputs = {key: value.to("cuda") for key, value in inputs.items()}
        with TensorsOfTheCPU(model, inputs) as watched, mock.patch.object(torch.compiler, "is_compiling", lambda: True):
            model(**inputs)
    return watched.found


@pytest.mark.parametrize(("version", "training"), [("v1", True), ("v2", False), ("v2_linear", True)])
@pytest.mark.parametrize("build", [build_classifier, build_backbone, build_segmenter])
def test_a_cuda_graph_can_be_made(build, version, training):
    """Of what a compiler sees: nothing is copied to the GPU, and no input is changed."""
    fields = {"drop_path_rate": 0.1, "hidden_dropout_prob": 0.1}
    with torch.device("meta"):
        model = build(version, **({"backbone": fields} if build is build_segmenter else fields)).train(training)
    inputs = draw_inputs(build)
    assert not find_tensors_of_the_cpu(model, inputs if training else {"pixel_values": inputs["pixel_values"]})


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["retinanet", "atss", "gfl", "sparse_rcnn", "mask_rcnn", "faster_rcnn", "cascade_mask_rcnn"]
)
def test_a_cuda_graph_can_be_made_of_a_detector(name):
    model = build_dense_model(name, "resnet")
    assert not find_tensors_of_the_cpu(model.to("meta"), dense_inputs(model, 2, 128, 160))


@torch.no_grad()
def test_the_test_sees_tensors_of_the_cpu(monkeypatch):
    monkeypatch.setattr(boxes, "place_numbers", lambda values, dtype, device: torch.tensor(values).to(device, dtype))
    model = build_dense_model("retinanet", "resnet")
    assert find_tensors_of_the_cpu(model.to("meta"), dense_inputs(model, 2, 128, 160))


def run_step(model, batch_size):
    """The waits of a training step with two objects in each image but the last, which has none."""
    inputs = on_device(dense_inputs(model, batch_size, 96, 128))
    labels = []
    for count in (*[2] * (batch_size - 1), 0):
        boxes = torch.tensor([[0.4, 0.5, 0.5, 0.6], [0.6, 0.4, 0.3, 0.5]])[:count]
        label = {"class_labels": torch.tensor([2, 1])[:count], "boxes": boxes, "masks": torch.ones(count, 96, 128)}
        labels.append(on_device(label))
    OnDevice.waits.clear()
    model(**inputs, labels=labels).loss.backward()
    return list(OnDevice.waits)


# The sizes of the images, whether the labels are right, and the sizes once more.
READS = ["tolist", "cpu", "tolist"]


@pytest.mark.parametrize(
    ("name", "waits"),
    [
        ("retinanet", READS),
        ("atss", READS),
        ("gfl", READS),
        ("sparse_rcnn", [*READS[:2], "cpu"]),  # the costs of the matching
        ("mask_rcnn", [*READS, *["cpu"] * 2]),  # which anchors and which proposals there are to draw from
        ("cascade_mask_rcnn", [*READS, *["cpu"] * 4]),
    ],
)
def test_training_step_waits_once_for_a_batch(name, waits, monkeypatch):
    """Not once for an image. The suppression of proposals, whose result has any size, is not counted."""
    monkeypatch.setattr(rois, "runs_transformed", lambda: True)  # as on a GPU
    suppress = rpn.suppress

    def suppress_uncounted(*args):
        plain = [arg.as_subclass(torch.Tensor) if isinstance(arg, torch.Tensor) else arg for arg in args]
        return suppress(*plain).as_subclass(OnDevice)

    monkeypatch.setattr(rpn, "suppress", suppress_uncounted)
    model = build_dense_model(name, "resnet").train()
    assert run_step(model, 2) == run_step(model, 4) == waits
