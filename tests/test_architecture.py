"""The rules that keep the rooms of the house apart: who imports whom, and what is imported only where it is used."""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.support.small_models import ROOT

FILES = sorted(path for folder in ("pvt_hf", "conversion", "examples") for path in (ROOT / folder).rglob("*.py"))
LIBRARY = [path for path in FILES if path.relative_to(ROOT).parts[0] == "pvt_hf"]
REGISTRIES = {"variants", "recipes", "paper_results"}
BELOW_TRAINING = {"models", "data", "evaluation", "untrusted", "writing", *REGISTRIES}
# By room of pvt_hf: the rooms that its files may import. (A registry is a room of one file.)
MAY_IMPORT = {
    "__init__": {"models", *REGISTRIES},
    "models": {"models"},
    "variants": set(),
    "recipes": {"variants"},
    "paper_results": {"variants"},
    "untrusted": set(),
    "writing": {"writing"},
    "data": {"data", "models", "untrusted", "writing", "variants", "recipes"},
    "evaluation": {"evaluation", "data", "models", "writing"},
    "training": {"training", *BELOW_TRAINING},
    "prediction": {"prediction", "conversion", *BELOW_TRAINING},
    "benchmark": {"benchmark", "exporting", "data", "models", "writing", "variants", "recipes"},
    "exporting": {"exporting", "prediction", *BELOW_TRAINING},
    "demo": {"demo", "prediction", "data", "writing"},
    "commands": {
        *{"__init__", "commands", "training", "prediction", "exporting", "benchmark", "demo", "conversion"},
        *BELOW_TRAINING,
    },
    "conversion": {"conversion", "models", "untrusted", "writing", "variants", "paper_results"},
    "timm": {"models", "variants", "conversion"},  # imported by nobody, and by users who have timm
}
OPTIONAL = {"accelerate", "datasets", "evaluate", "faster_coco_eval", "matplotlib", "peft", "scipy", "sklearn", "timm"}
OPTIONAL |= {"executorch", "nncf", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "openvino"}
OPTIONAL |= {"av", "cv2", "gradio", "pytorch_grad_cam", "xxhash"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    """`models` of `pvt_hf.models.boxes`, `variants` of `pvt_hf.variants`, `__init__` of `pvt_hf` itself."""
    return (module.split(".")[1:] or ["__init__"])[0]


def read_imports(path: Path, top_level: bool = False) -> list[tuple[int, str]]:
    """The level and the absolute name of all modules that a file imports at run time, or while it is imported."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    package = module_name(path).split(".")
    package = package if path.stem == "__init__" else package[:-1]
    found = []
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            # `from . import name` and `from ..conversion import name` name modules.
            is_package = (ROOT / module.replace(".", "/")).is_dir()
            found += [(node.level, f"{module}.{alias.name}" if is_package else module) for alias in node.names]
    return found


def test_models_are_flat():
    """`save_pretrained` ships only what `from .name import` reaches."""
    assert not [path for path in (ROOT / "pvt_hf" / "models").iterdir() if path.is_dir() and path.name != "__pycache__"]
    for path in (ROOT / "pvt_hf" / "models").glob("*.py"):
        own = [(level, name) for level, name in read_imports(path) if name.split(".")[0] == "pvt_hf"]
        assert all(level == 1 and (ROOT / f"{name.replace('.', '/')}.py").is_file() for level, name in own), path


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_each_room_imports_only_what_it_may(path):
    modules = {name for _, name in read_imports(path)}
    assert not {name for name in modules if name.split(".")[0] in ("conversion", "examples", "tests")}
    rooms = {room(name) for name in modules if name.split(".")[0] == "pvt_hf"}
    assert rooms <= MAY_IMPORT[room(module_name(path))]


def test_every_room_has_a_rule():
    assert {room(module_name(path)) for path in LIBRARY} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("path", [path for path in FILES if path not in LIBRARY], ids=module_name)
def test_programs_import_the_library_only(path):
    assert not {name for _, name in read_imports(path) if name.split(".")[0] in ("conversion", "examples", "tests")}


@pytest.mark.parametrize("path", sorted((ROOT / "pvt_hf" / "conversion").glob("reference*.py")), ids=module_name)
def test_references_are_independent(path):
    assert {name.split(".")[0] for _, name in read_imports(path)} <= {"collections", "torch"}


@pytest.mark.parametrize("name", sorted({*REGISTRIES, "untrusted"}))
def test_registries_need_the_standard_library_only(name):
    path = ROOT / "pvt_hf" / f"{name}.py"
    packages = {module.split(".")[0] for _, module in read_imports(path, top_level=True)} - {"pvt_hf"}
    assert packages <= sys.stdlib_module_names


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_optional_packages_are_imported_where_they_are_used(path):
    if room(module_name(path)) in ("commands", "demo", "timm"):  # programs need them at once
        return
    assert not {name.split(".")[0] for _, name in read_imports(path, top_level=True)} & OPTIONAL


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_each_docstring_entry_is_of_one_parameter(path):
    """Editors and the documentation show a parameter's entry beside it, and cannot take one apart."""
    nodes = ast.walk(ast.parse(path.read_text()))
    documented = (node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module))
    docstrings = "\n".join(filter(None, (ast.get_docstring(node) for node in documented)))
    entries = re.findall(r"^ +(?:\*{0,2}\w+, )+\*{0,2}\w+(?: \(.*\))?:", docstrings, flags=re.MULTILINE)
    assert not [entry for entry in entries if "Error" not in entry]
