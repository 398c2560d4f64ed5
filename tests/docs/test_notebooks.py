"""The notebooks run from top to bottom, learn something, and are kept without outputs."""

import json
import os
import re
import sys

import pytest

from tests.support.small_models import ROOT

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
# What each of them prints: a number, and the least that it has to be.
RESULTS = {
    "classification": (r"validation accuracy ([\d.]+)", 0.9),
    "detection": (r"AP50 ([\d.]+)", 0.5),
    "segmentation": (r"Dice of foreground \(mean over images\) ([\d.]+)", 0.7),
}


def test_every_notebook_is_run():
    assert NOTEBOOKS.keys() == RESULTS.keys()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_outputs_are_kept(name):
    for cell in json.loads(NOTEBOOKS[name].read_text())["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, tmp_path, monkeypatch):
    nbclient, nbformat, _ = map(pytest.importorskip, ("nbclient", "nbformat", "ipykernel"))
    program = tmp_path / "bin" / "pvt-hf"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m pvt_hf.commands.main "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    nbclient.NotebookClient(notebook, timeout=3000, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    pattern, least = RESULTS[name]
    assert float(re.findall(pattern, printed)[-1]) >= least, printed[-2000:]
