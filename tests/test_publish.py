"""Uploads over HTTP to a local Hub, loading from it, and every way in which the network fails."""

import os
import subprocess
import sys

import huggingface_hub
import pytest
import safetensors.torch
import torch
from checkpoints import TINY, equal, official_weights, run, save
from hub import TOKEN, LocalHub
from models import ROOT

from conversion import rename


@pytest.fixture
def hub():
    with LocalHub() as hub:
        yield hub


@pytest.fixture
def python(hub, tmp_path):
    """Runs Python in a process of its own, for which the local Hub is the Hub."""

    def run(*arguments, **variables) -> subprocess.CompletedProcess:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": TOKEN,
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment | variables, cwd=tmp_path)

    return run


@pytest.fixture
def online(hub, tmp_path, monkeypatch):
    """Makes the local Hub the Hub of this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name, value in {
        "ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "home"),
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)  # between attempts
    return hub


CONVERT = ROOT / "conversion" / "convert.py"
LOAD = """
import sys
if sys.argv[1] == "without pvt_hf":
    sys.modules["pvt_hf"] = None
else:
    import pvt_hf
from transformers import AutoImageProcessor, AutoModelForImageClassification
trust = {"trust_remote_code": True} if sys.argv[1] == "without pvt_hf" else {}
model = AutoModelForImageClassification.from_pretrained("me/pvt", **trust)
processor = AutoImageProcessor.from_pretrained("me/pvt", **trust)
model.save_pretrained(sys.argv[2])
print(type(model).__module__, type(processor).__module__, processor.size)
"""


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_upload_and_load(version, python, hub, tmp_path):
    source = official_weights(TINY[version])
    path = save(source, tmp_path / "a.pth")
    result = python(CONVERT, path, "out", "--push-to-hub", "me/pvt", "--with-code")
    assert result.returncode == 0, result.stderr
    assert f"published: {hub.url}/me/pvt/commit/{hub.commit_id('me/pvt')}" in result.stdout
    local = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert hub.repos == {"me/pvt": local} and len(hub.objects) == 1 and not hub.private
    assert sum("commit" in request for request in hub.requests) == 1  # all or nothing
    assert any("validate-yaml" in request for request in hub.requests)
    assert 'pipeline("image-classification", model="me/pvt")' in local["README.md"].decode()

    for mode, home in (("with pvt_hf", "pvt_hf"), ("without pvt_hf", "transformers_modules")):
        result = python("-c", LOAD, mode, tmp_path / mode)
        assert result.returncode == 0, result.stderr
        model, processor = result.stdout.split()[:2]
        assert model.startswith(f"{home}.") and processor.startswith(f"{home}.")
        weights = safetensors.torch.load_file(tmp_path / mode / "model.safetensors")
        assert equal(weights, rename.from_official(source))


def test_repository_as_source(online, tmp_path, capsys):
    """timm's files from the Hub, and a repository of transformers, private and with the labels of its config."""
    weights = official_weights(TINY["v2"])
    content = safetensors.torch.save(rename.official_to_timm(weights))
    online.repos["timm/pvt"] = {"model.safetensors": content, "config.json": b'{"architecture": "pvt_v2_b0"}'}
    assert run("timm/pvt", "out") == 0
    assert f"{online.url}/timm/pvt: " in capsys.readouterr().out
    assert equal(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"), rename.from_official(weights))

    online.repos["me/own"] = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    online.private.add("me/own")
    assert run("me/own", "again") == 0
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()

    torch.save(weights, tmp_path / "old.bin")
    online.repos["me/old"] = {"pytorch_model.bin": (tmp_path / "old.bin").read_bytes()}
    assert run("me/old", "old") == 0
    online.repos["me/none"] = {"README.md": b"hello"}
    for repo, message in (("me/none", "has none of model.safetensors"), ("me/unknown", "could not be downloaded")):
        assert run(repo, "none") == 1 and message in capsys.readouterr().err
        assert not (tmp_path / "none").exists()


def test_private(online, tmp_path, capsys):
    path = save(official_weights(TINY["v2"]), tmp_path / "a.pth")
    assert run(path, "out", "--push-to-hub", "org/pvt", "--private") == 0
    assert online.private == {"org/pvt"}
    assert run(path, "out", "--push-to-hub", "org/pvt", "--private", "--overwrite") == 0
    online.private.clear()
    online.repos["org/pvt"] = {}
    assert run(path, "out", "--push-to-hub", "org/pvt", "--private", "--overwrite") == 1
    assert "org/pvt exists and is public" in capsys.readouterr().err and online.repos["org/pvt"] == {}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"repos/create": 401}, "run `hf auth login`, or set HF_TOKEN"),
        ({"repos/create": 403}, "your token may not write there"),
        ({"/commit/": 409}, "in conflict with this upload"),
        ({"/commit/": 500}, "500"),
        ({"PUT /objects": "cut"}, "the connection failed"),
        ({"/commit/": "cut"}, "the connection failed"),
        ({"repos/create": "cut"}, "the connection failed"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_network_fails(fault, message, online, tmp_path, capsys):
    path = save(official_weights(TINY["v2"]), tmp_path / "a.pth")
    online.fault = fault
    assert run(path, "out", "--push-to-hub", "me/pvt") == 1
    error = capsys.readouterr().err
    error = error[error.index("error: ") :]
    assert message in error and "hf upload me/pvt out" in error and "Nothing was committed" in error, error
    names = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    assert not online.repos.get("me/pvt")
    online.fault = {}
    assert run(path, "out", "--push-to-hub", "me/pvt", "--overwrite") == 0
    assert sorted(online.repos["me/pvt"]) == names


def test_unknown_or_offline(online, tmp_path, capsys, monkeypatch):
    path = save(official_weights(TINY["v2"]), tmp_path / "a.pth")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert run(path, "out", "--push-to-hub", "me/pvt") == 1
    assert "hf auth login" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert run(path, "offline", "--push-to-hub", "me/pvt") == 1
    assert "offline" in capsys.readouterr().err.lower() and not online.repos
