"""The wheel and the source distribution, built and used in a fresh environment outside of the clone."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import TINY, official_weights
from tests.support.small_models import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.process]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"  # a build leaves files beside the sources
    subprocess.run(["cp", "-r", ROOT, source], check=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, source], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def environment(distributions, tmp_path_factory) -> Path:
    """A virtual environment with the wheel. What it depends on is taken from the environment of the tests."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (wheel,) = distributions.glob("*.whl")
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(paths))
    return folder


@pytest.fixture
def run(environment, tmp_path):
    def run(*command: str) -> str:
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        program, *arguments = command
        result = subprocess.run(
            [environment / "bin" / program, *arguments], capture_output=True, text=True, cwd=tmp_path, env=variables
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    return run


def test_it_is_the_wheel_that_runs(run, environment):
    assert run("python", "-c", "import pvt_hf; print(pvt_hf.__file__)").startswith(str(environment))


def test_distributions_are_complete(distributions):
    """Everything of the package in the wheel and nothing else on top; tests and what they need in the source."""
    (wheel,), (source,) = distributions.glob("*.whl"), distributions.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "pvt_hf").rglob("*.py")}
    assert names >= expected | {"pvt_hf/py.typed", "pvt_hf/conversion/model_card.md.jinja"}
    assert {name.split("/")[0] for name in names} == {
        "pvt_hf",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }
    with tarfile.open(source) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert inside >= {"README.md", "CHANGELOG.md", "tests/conftest.py", "tests/keys/cls_pvt_tiny.tsv"}
    assert inside >= {"conversion/convert.py", "examples/quickstart.py", "docs/generate_tables.py"}


def test_every_command_runs_outside_of_the_clone(run, tmp_path):
    assert "train-detection" in run("pvt-hf", "--help")
    torch.save(official_weights(TINY["v2"]), tmp_path / "tiny.pth")
    assert "converted/tiny" in run("pvt-hf", "convert", "tiny.pth", "converted/tiny")
    run("pvt-hf", "train-classification", "--smoke", "--output_dir", "runs/smoke")
    assert "accuracy" in run("pvt-hf", "evaluate", "--smoke", "--model_name_or_path", "runs/smoke")
    run("pvt-hf", "train-detection", "--smoke", "--output_dir", "runs/detection")
    run("pvt-hf", "train-segmentation", "--smoke", "--output_dir", "runs/segmentation")
    run("python", "-m", "pvt_hf.commands.train_detection", "--help")
