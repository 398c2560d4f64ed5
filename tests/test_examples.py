"""The files in `examples/` that launch a command work in a clone without an installation. (What the quickstart
does is tested in `test_readme.py`.)"""

import runpy
import sys

import pytest

from tests.support.small_models import ROOT


@pytest.mark.parametrize(
    "name",
    ["quickstart", "train_classification", "train_detection", "train_segmentation", "evaluate", "predict", "benchmark"],
)
def test_example_launches_the_command_of_its_clone(name, monkeypatch, capsys):
    file = ROOT / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    monkeypatch.setattr(sys, "path", [str(file.parent), *sys.path])  # as Python starts a program
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(file), run_name="__main__")
    assert exit.value.code == 0 and sys.path[0] == str(ROOT)
    assert str(file.parent) not in sys.path  # `import evaluate` has to find the package
    assert capsys.readouterr().out.startswith(f"usage: pvt-hf {name.replace('_', '-')} ")
