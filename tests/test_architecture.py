"""The rules that keep the packages apart: who imports whom, the size of a file, what stays out of the library."""

import ast

import pytest
from models import ROOT

LIBRARY = sorted((ROOT / "pvt_hf").glob("*.py"))
ALL = LIBRARY + sorted((ROOT / "conversion").glob("*.py")) + sorted((ROOT / "examples").glob("*.py"))

# The siblings that each file of pvt_hf may import. A file that is not here may import none.
SIBLINGS = {
    "__init__": {"variants"},
    "configuration_pvt_v2": {"configuration_pvt"},
    "arguments": {"checkpointing", "recipes"},
    "augmentation": {"colors", "objects", "resize"},
    "canvases": {"data", "objects"},
    "coco": {"data", "objects"},
    "image_processing_dense": {"resize"},
    "image_processing_detection": {
        *("detection", "detr", "image_processing_dense", "masks", "objects", "resize"),
    },
    "image_processing_segmentation": {"image_processing_dense", "resize"},
    "label_maps": {"data", "image_processing_segmentation"},
    "metrics": {"objects"},
    "objects": {"resize"},
    "overlays": {"image_processing_segmentation"},
    "pretrained": {"layers"},
    "published": {"variants"},
    "recipes": {"variants"},
    "reports": {"recipes"},
    "training": {"checkpointing", "data", "reports"},
    "training_classification": {"data", "metrics", "recipes", "training"},
    "training_dense": {"training"},
    "training_segmentation": {
        *("image_processing_segmentation", "label_maps", "metrics", "modeling_semantic_fpn", "overlays", "recipes"),
        *("resize", "sliding_window", "training_dense"),
    },
    "training_detection": {
        *("coco", "detr", "image_processing_detection", "metrics", "recipes", "training_dense", "visualization"),
    },
    "visualization": {"coco", "objects"},
    "detection": {"boxes"},
    "masks": {"boxes", "detection"},
    "rpn": {"boxes", "configuration_mask_rcnn", "detection"},
    "modeling_mask_rcnn": {"boxes", "configuration_mask_rcnn", "dense_prediction", "detection", "fpn", "rpn"},
    "modeling_retinanet": {"boxes", "configuration_retinanet", "dense_prediction", "detection", "fpn"},
    "modeling_pvt": {"configuration_pvt", "layers", "pretrained"},
    "modeling_pvt_v2": {"configuration_pvt_v2", "layers", "pretrained"},
    "modeling_semantic_fpn": {"configuration_semantic_fpn", "dense_prediction", "fpn", "layers"},
}


def imports(path) -> tuple[set[str], set[str]]:
    """The siblings (from `.name import`) and the top-level packages that run time imports from a file."""
    siblings, packages = set(), set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module, f"{path.name}: only `from .name import` can be published to the Hub"
            siblings.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.split(".")[0])
    return siblings, packages


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_library_imports_downwards(path):
    siblings, packages = imports(path)
    assert siblings <= SIBLINGS.get(path.stem, set())
    assert not packages & {"conversion", "examples", "tests", "pvt_hf"}


@pytest.mark.parametrize("path", [path for path in ALL if path not in LIBRARY], ids=lambda path: path.stem)
def test_programs_do_not_import_each_other(path):
    _, packages = imports(path)
    forbidden = {"conversion": {"examples", "tests"}, "examples": {"conversion", "tests"}}[path.parent.name]
    assert not packages & forbidden


@pytest.mark.parametrize("name", ["reference", "reference_systems"])
def test_reference_is_independent(name):
    assert imports(ROOT / "conversion" / f"{name}.py") == (set(), {"collections", "torch"})


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_optional_packages_are_imported_where_they_are_used(path):
    top_level = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    heavy = (
        "torchvision",
        "datasets",
        "accelerate",
        "timm",
        "sklearn",
        "scipy",
        "matplotlib",
        "evaluate",
        "faster_coco_eval",
    )
    assert not [name for name in top_level if name.startswith(heavy)]


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 450
