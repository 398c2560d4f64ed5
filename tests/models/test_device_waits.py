"""A GPU is not waited for. On fake CUDA tensors everything that asks the device for a value is an error."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from transformers import AutoBackbone, AutoModelForImageClassification

import pvt_hf
from pvt_hf.models import layers
from tests.support.small_models import STAGES, small_config

VERSIONS = ("v1", "v2", "v2_linear")


def build_classifier(version: str):
    return AutoModelForImageClassification.from_config(small_config(version))


def build_backbone(version: str):
    return AutoBackbone.from_config(small_config(version, out_features=STAGES))


def build_segmenter(version: str, **settings):
    backbone = small_config(version, out_features=STAGES)
    return pvt_hf.SemanticFPNForSemanticSegmentation(
        pvt_hf.SemanticFPNConfig(backbone_config=backbone, num_labels=5, neck_channels=16, **settings)
    )


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

    monkeypatch.setattr(layers, "checkpoint", record)
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
