"""The guide's table of what can be exported is true."""

import re

import pytest
import torch

import pvt_hf
from pvt_hf.exporting.comparison import find_results
from pvt_hf.exporting.export import export_model
from pvt_hf.exporting.programs import list_inputs, plan_shapes
from pvt_hf.exporting.settings import describe_model
from pvt_hf.exporting.targets import TARGETS, ExportError
from tests.support.dense_models import build_dense_model
from tests.support.exports import TWO_STAGES
from tests.support.small_models import ROOT, randomize, small_config

COLUMNS = {"ONNX": "onnx", "OpenVINO": "openvino", "ExecuTorch": "executorch", "transformers.js": "web"}
DENSE = {
    "SemanticFPNForSemanticSegmentation": "semantic_fpn",
    "DetrForObjectDetection": "detr",
    "SparseRCNNForObjectDetection": "sparse_rcnn",
    "RetinaNetForObjectDetection": "retinanet",
    "ATSSForObjectDetection": "atss",
    "GFLForObjectDetection": "gfl",
    "MaskRCNNForInstanceSegmentation": "mask_rcnn",
    "CascadeMaskRCNNForInstanceSegmentation": "cascade_mask_rcnn",
}


def read_table() -> dict[str, dict[str, str]]:
    rows = re.findall(r"^\| (.*) \|$", (ROOT / "docs/guides/export.md").read_text(), flags=re.MULTILINE)
    cells = [row.split(" | ") for row in rows]
    names = next(row for row in cells if row[0] == "class")
    return {row[0].strip("`"): dict(zip(names, row, strict=True)) for row in cells if len(row) == len(names)}


TABLE = {name: row for name, row in read_table().items() if name != "class"}
EXPORTED = [(name, target) for name, row in TABLE.items() for column, target in COLUMNS.items() if row[column] == "yes"]


def build(name: str):
    """A small model of a class, with its image processor."""
    torch.manual_seed(0)
    size = {"height": 160, "width": 192}
    if name in DENSE:
        model = build_dense_model(DENSE[name], depths=[1, 1, 1, 1])
        kind = "Segmentation" if DENSE[name] == "semantic_fpn" else "Detection"
        return model, getattr(pvt_hf, f"Pvt{kind}ImageProcessor")(size=size)
    version = "v2" if name.startswith("PvtV2") else "v1"
    config = small_config(version, out_features=["stage1", "stage2"], **TWO_STAGES[version])
    return randomize(getattr(pvt_hf, name)(config), std=0.2).eval(), pvt_hf.PvtImageProcessor(size=size)


def test_table_has_every_class():
    public = {name for name in pvt_hf.__all__ if isinstance(getattr(pvt_hf, name), type)}
    models = {name for name in public if issubclass(getattr(pvt_hf, name), torch.nn.Module)}
    assert set(TABLE) == models | {"DetrForObjectDetection"}


@pytest.mark.parametrize("name", TABLE)
@torch.no_grad()
def test_row_says_what_a_program_takes(name):
    (model, processor), row = build(name), TABLE[name]
    assert type(model).__name__ == name
    shapes = plan_shapes(model, TARGETS["onnx"])
    assert (row["batch"], row["sides from"]) == ("any" if shapes.any_batch else "1", str(shapes.least_side))
    is_detector = name in DENSE and DENSE[name] != "semantic_fpn"
    assert list_inputs(model, TARGETS["onnx"]) == ["pixel_values", "pixel_mask"][: 1 + is_detector]
    task = find_results(model(torch.randn(1, 3, 64, 64)))
    try:
        describe_model(model, processor, task, "web", "fp32")
        known = "yes"
    except ExportError:
        known = "no"
    assert row["transformers.js"] == known


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "target"), EXPORTED)
def test_what_the_table_says_is_exported(name, target, tmp_path):
    """The export compares three inputs itself, and leaves nothing that differs."""
    pytest.importorskip({"web": "onnxruntime", "onnx": "onnxruntime"}.get(target, target))
    model, processor = build(name)
    report = export_model(model, tmp_path / "out", target, "fp32", processor)
    assert (tmp_path / "out" / report.file).exists() and report.difference < 1e-4
