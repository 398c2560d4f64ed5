"""transformers' exporters: their programs give the numbers of our classes under the names of their outputs, at sizes
and batches that they were not traced with."""

import pytest
import torch
from torch.export import Dim

import pvt_hf
from tests.support.detection_run import small_detector
from tests.support.small_models import STAGES, randomize, small_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FORMATS = {  # the exporter, its configuration, the packages that it needs, and what its runner is told
    "onnx": ("OnnxExporter", "OnnxConfig", ("onnx", "onnxscript", "onnxruntime"), {}),
    # By default OpenVINO computes in bfloat16 where the CPU can.
    "openvino": ("OpenVINOExporter", "OpenVINOConfig", ("openvino",), {"config": {"INFERENCE_PRECISION_HINT": "f32"}}),
}


def small_segmenter():
    backbone = small_config("v2", out_features=STAGES)
    return pvt_hf.SemanticFPNForSemanticSegmentation(
        pvt_hf.SemanticFPNConfig(backbone_config=backbone, num_labels=3, neck_channels=8, head_channels=8)
    )


MODELS = {
    "v1": lambda: pvt_hf.PvtForImageClassification(small_config("v1")),
    "v2": lambda: pvt_hf.PvtV2ForImageClassification(small_config("v2")),
    "v2_linear": lambda: pvt_hf.PvtV2Backbone(small_config("v2_linear", out_features=STAGES)),
    "semantic_fpn": small_segmenter,
    "retinanet": lambda: small_detector("retinanet"),
    "detr": lambda: small_detector("detr"),
    "mask_rcnn": lambda: small_detector("mask_rcnn"),
}


def flatten(outputs):
    """The tensors by name, those of a tuple with their number."""
    tensors = {}
    for name, value in outputs.items():
        parts = {name: value} if torch.is_tensor(value) else {f"{name}.{i}": part for i, part in enumerate(value)}
        tensors |= parts
    return tensors


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", FORMATS)
@torch.no_grad()
def test_exported_program_gives_the_same(name, target, request):
    if (name, target) == ("mask_rcnn", "openvino"):
        reason = "OpenVINO converts no torchvision::nms"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    exporters = pytest.importorskip("transformers.exporters", reason="transformers has exporters from 5.24 on")
    exporter, config, packages, runner = FORMATS[target]
    for package in packages:
        pytest.importorskip(package)
    torch.manual_seed(0)
    model = randomize(MODELS[name]()).eval()
    fixed_batch = name == "mask_rcnn"
    batches = (1, 1) if fixed_batch else (2, 3)
    pixels = torch.randn(batches[0], 3, 160, 192)
    sizes = {2: Dim.AUTO, 3: Dim.AUTO} | ({} if fixed_batch else {0: Dim.AUTO})
    settings = getattr(exporters, config)(dynamic_shapes={"pixel_values": sizes})
    exported = getattr(exporters, exporter)().export(model, {"pixel_values": pixels}, config=settings)
    exported.to(**runner)
    for given in (pixels, torch.randn(batches[1], 3, 256, 160)):
        found, wanted = flatten(exported(pixel_values=given)), flatten(model(given))
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(
                torch.as_tensor(found[key]), value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
            )
