"""The wheel and the source distribution, built and used in a fresh environment outside of the clone."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support.checkpoints import TINY, official_weights
from tests.support.small_models import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.process]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Of each folder of the tests, a file that takes seconds.
SOME_TESTS = (
    "tests/test_architecture.py",
    "tests/test_tables.py",
    "tests/test_workflows.py",
    "tests/commands/test_parser.py",
    "tests/conversion/test_model_card.py",
    "tests/data/test_class_names.py",
    "tests/evaluation/test_metrics.py",
    "tests/models/test_boxes.py",
    "tests/training/test_report.py",
)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"  # a build leaves files beside the sources
    subprocess.run(["cp", "-r", ROOT, source], check=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, source], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def unpacked(distributions, tmp_path_factory) -> Path:
    """The source distribution."""
    folder = tmp_path_factory.mktemp("unpacked")
    (source,) = distributions.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    (found,) = folder.iterdir()
    return found


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


def test_the_wheel_is_the_package_and_nothing_else(distributions):
    (wheel,) = distributions.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {path for path in (ROOT / "pvt_hf").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    info = next(name.split("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
    assert {name for name in names if not name.startswith(f"{info}/")} == {
        str(path.relative_to(ROOT)) for path in files
    }
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= names


def test_the_source_distribution_is_the_repository(unpacked):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("these are not the files of a repository")
    inside = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert {file for file in listed.stdout.splitlines() if (ROOT / file).is_file()} <= inside
    made = {file for file in inside if ".egg-info/" not in file} - {"PKG-INFO", "setup.cfg"}
    assert made == {file for file in listed.stdout.splitlines() if (ROOT / file).is_file()}


def test_metadata_are_complete_and_shown_as_they_are(distributions):
    files = sorted(map(str, [*distributions.glob("*.whl"), *distributions.glob("*.tar.gz")]))
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True
    )
    assert checked.returncode == 0 and checked.stdout.count("PASSED") == 2, checked.stdout
    with zipfile.ZipFile(files[0] if files[0].endswith(".whl") else files[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(wheel.read(name))
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Requires-Python"] == PROJECT["requires-python"] and metadata["Summary"] == PROJECT["description"]
    extras = set(metadata.get_all("Provides-Extra"))
    assert extras == PROJECT["optional-dependencies"].keys() > {"demo", "docs", "examples", "export", "lora"}
    assert {line.split(", ")[0] for line in metadata.get_all("Project-URL")} == PROJECT["urls"].keys()
    assert metadata["Version"] == re.search(r'__version__ = "(.+)"', (ROOT / "pvt_hf/__init__.py").read_text())[1]


@pytest.mark.timeout(1200)
def test_the_tests_of_the_source_distribution_run(unpacked):
    """All are found, and some of every folder pass, against the package beside them."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "PYTHONPATH"))}

    def pytest_run(*arguments: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-n0", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=unpacked, env=variables)
        assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
        return result.stdout

    found = pytest_run("--collect-only", "-m", "slow or not slow")
    assert all(f"{name}::" in found for name in SOME_TESTS)
    assert "passed" in pytest_run("-m", "not process", *SOME_TESTS)
    place = "import pvt_hf, sys; sys.exit(not pvt_hf.__file__.startswith(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", place, unpacked], cwd=unpacked, env=variables, check=True)


@pytest.mark.timeout(1800)
def test_every_command_runs_outside_of_the_clone(run, tmp_path):
    assert "train-detection" in run("pvt-hf", "--help")
    torch.save(official_weights(TINY["v2"]), tmp_path / "tiny.pth")
    assert "converted/tiny" in run("pvt-hf", "convert", "tiny.pth", "converted/tiny")
    assert "model, image processor, card and predictions.png are in runs/quickstart" in run(
        "pvt-hf", "quickstart", "--epochs", "1", "--image_size", "32"
    )
    run("pvt-hf", "train-classification", "--smoke", "--output_dir", "runs/smoke")
    assert "accuracy" in run("pvt-hf", "evaluate", "--smoke", "--model_name_or_path", "runs/smoke")
    run("pvt-hf", "train-detection", "--smoke", "--output_dir", "runs/detection")
    run("pvt-hf", "train-segmentation", "--smoke", "--output_dir", "runs/segmentation")
    run("python", "-m", "pvt_hf.commands.train_detection", "--help")
    Image.linear_gradient("L").convert("RGB").resize((96, 64)).save(tmp_path / "image.png")
    for model in ("quickstart", "detection", "segmentation"):
        run("pvt-hf", "info", f"runs/{model}")
        run("pvt-hf", "predict", f"runs/{model}", "image.png", "--output_dir", f"found/{model}")
        assert (tmp_path / "found" / model / "predictions.json").is_file()
        assert [path.name for path in (tmp_path / "found" / model / "pictures").iterdir()]
    run("pvt-hf", "export", "converted/tiny", "exported")
    assert (tmp_path / "exported" / "onnx" / "model.onnx").is_file()
    run("pvt-hf", "demo", "--help")
