"""A Space: what is in it, that it runs where pvt_hf is not installed, and its upload to the Hub."""

import os
import subprocess
import sys
import tomllib

import pytest
import yaml

gradio = pytest.importorskip("gradio", reason="the extra demo is not installed")

from pvt_hf.commands.demo import main  # noqa: E402 (where there is no gradio, there is no page)
from pvt_hf.demo import space as demo_space  # noqa: E402
from pvt_hf.demo.space import REQUIREMENTS, SpaceError, push_space, write_space  # noqa: E402
from pvt_hf.writing.hub import UploadError  # noqa: E402
from tests.support.small_models import ROOT  # noqa: E402


@pytest.fixture
def space(models, tmp_path):
    write_space([str(models / "v2"), "someone/pvt"], tmp_path / "space", 'A "title": of mine')
    return tmp_path / "space"


def test_requirements_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(REQUIREMENTS) == {*project["dependencies"], *project["optional-dependencies"]["demo"]}


def test_a_space_has_all_that_the_hub_needs(space, models):
    assert {path.name for path in space.iterdir()} == {"README.md", "app.py", "models", "pvt_hf", "requirements.txt"}
    header = yaml.safe_load((space / "README.md").read_text().split("---\n")[1])
    assert header["sdk"] == "gradio" and header["sdk_version"] == gradio.__version__ and header["app_file"] == "app.py"
    assert header["title"] == 'A "title": of mine' and header["models"] == ["someone/pvt"]
    app = (space / "app.py").read_text()
    assert 'serve(["models/v2", "someone/pvt"], title="A \\"title\\": of mine")' in app
    assert (space / "requirements.txt").read_text().split() == list(REQUIREMENTS)
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "pvt_hf").rglob("*") if "__pycache__" not in path.parts}
    assert {str(path.relative_to(space)) for path in (space / "pvt_hf").rglob("*")} == code - {"pvt_hf"}


def test_only_the_files_of_a_model_are_published(models, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (folder / name).write_bytes((models / "v2" / name).read_bytes())
    for name in ("training_args.bin", "notes.txt"):
        (folder / name).write_text("mine")
    (folder / "checkpoint-1").mkdir()
    write_space([str(folder)], tmp_path / "space", "title")
    copied = {path.name for path in (tmp_path / "space" / "models" / "run").iterdir()}
    assert copied == {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_two_models_of_one_name_are_an_error(models, tmp_path):
    (tmp_path / "v2").symlink_to(models / "v1")
    with pytest.raises(SpaceError, match="one name"):
        write_space([str(models / "v1"), str(tmp_path / "v2")], tmp_path / "space", "title")
    assert not (tmp_path / "space").exists()


def test_nothing_is_written_over(models, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(SystemExit, match="must be new or an empty folder|cannot be written"):
            main([str(models / "v2"), "--space", str(folder)])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_space_that_fails_leaves_nothing(models, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_space, "_copy_model", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_space([str(models / "v2")], tmp_path / "space", "title")
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_a_space_is_uploaded_in_one_commit(space, online):
    url = push_space(space, "me/page")
    files = {str(path.relative_to(space)): path.read_bytes() for path in space.rglob("*") if path.is_file()}
    assert online.repos["me/page"] == files and url.startswith(f"{online.url}/spaces/me/page/commit/")
    assert sum("/commit/" in request for request in online.requests) == 1
    assert any(request.startswith("POST /api/spaces/me/page/commit") for request in online.requests)
    online.repos["me/page"] |= {"pvt_hf/former.py": b"", "models/former/config.json": b"", "notes.md": b"mine"}
    push_space(space, "me/page")
    assert online.repos["me/page"] == files | {"notes.md": b"mine"}


@pytest.mark.process
def test_an_upload_that_fails_says_where_everything_is(space, online):
    online.fault = {"commit": 403}
    with pytest.raises(UploadError, match="your token may not write there") as caught:
        push_space(space, "me/page")
    assert f"everything is in {space}" in str(caught.value) and "--repo-type space" in str(caught.value)
    online.fault = {}
    with pytest.raises(UploadError, match="is public"):
        push_space(space, "me/page", private=True)


RUN = """
import runpy, sys
sys.path.insert(0, ".")
import gradio, pvt_hf
gradio.Blocks.block_thread = lambda page: print("served", page.local_url, page.title, pvt_hf.__file__)
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.mark.process
@pytest.mark.slow
def test_a_space_runs_where_pvt_hf_is_not_installed(models, tmp_path):
    """As the Hub runs it: the folder is the working directory, and nothing else of pvt_hf is there."""
    assert main([str(models / "v2"), str(models / "retinanet"), "--space", str(tmp_path / "space")]) == 0
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", RUN], capture_output=True, text=True, cwd=tmp_path / "space", env=environment
    )
    assert result.returncode == 0, result.stderr
    assert "served http://127.0.0.1:" in result.stdout
    assert str(tmp_path / "space" / "pvt_hf" / "__init__.py") in result.stdout
