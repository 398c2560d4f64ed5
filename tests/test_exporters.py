"""transformers' exporters: their programs give the numbers of our classes under the names of their outputs, at sizes
and batches that they were not traced with.

(`pvt_hf[executorch]` brings many packages: an environment of its own is best.)
"""

import pytest
import torch
from torch.export import Dim
from transformers import exporters

import pvt_hf
from tests.support.detection_run import small_detector
from tests.support.small_models import STAGES, randomize, small_config

pytestmark = pytest.mark.slow

FORMATS = {  # the exporter, its configuration, the packages that it needs, and what its runner is told
    "onnx": ("OnnxExporter", "OnnxConfig", ("onnx", "onnxscript", "onnxruntime"), {}),
    # By default OpenVINO computes in bfloat16 where the CPU can.
    "openvino": ("OpenVINOExporter", "OpenVINOConfig", ("openvino",), {"config": {"INFERENCE_PRECISION_HINT": "f32"}}),
    "executorch": ("ExecutorchExporter", "ExecutorchConfig", ("executorch",), {}),
}
# What cannot be had, by model and format.
MISSING = {
    ("mask_rcnn", "openvino"): "OpenVINO converts no torchvision::nms",
    ("mask_rcnn", "executorch"): "ExecuTorch has no torchvision::nms and no torchvision::roi_align",
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


def describe_sizes(name, target):
    """The dimensions that are not fixed."""
    if target != "executorch":
        return {2: Dim.AUTO, 3: Dim.AUTO} | ({} if name == "mask_rcnn" else {0: Dim.AUTO})
    # XNNPACK runs DETR's attention at the traced size only, and takes no end to lower RetinaNet for any size.
    if name in ("detr", "retinanet"):
        return {}
    return {2: Dim("height", min=64, max=512), 3: Dim("width", min=64, max=512)}  # memory is planned for the largest


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
    if reason := MISSING.get((name, target)):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    exporter, config, packages, runner = FORMATS[target]
    for package in packages:
        pytest.importorskip(package)
    torch.manual_seed(0)
    model = randomize(MODELS[name]()).eval()
    sizes = describe_sizes(name, target)
    batches = (2, 3) if 0 in sizes else (1, 1)
    pixels = torch.randn(batches[0], 3, 160, 192)
    settings = getattr(exporters, config)(dynamic_shapes={"pixel_values": sizes} if sizes else None)
    exported = getattr(exporters, exporter)().export(model, {"pixel_values": pixels}, config=settings)
    exported.to(**runner)
    for given in (pixels, torch.randn(batches[1], 3, 256, 160))[: 2 if sizes else 1]:
        found, wanted = flatten(exported(pixel_values=given)), flatten(model(given))
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(
                torch.as_tensor(found[key]), value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
            )
