"""Uploads over HTTP to a local Hub, loading from it, and every way in which the network fails."""

import hashlib
import importlib
import json
import re

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers

import pvt_hf
from pvt_hf.conversion import formats, rename
from pvt_hf.conversion.checkpoint import read_checkpoint
from pvt_hf.conversion.publish import publish
from pvt_hf.conversion.rename import ConversionError
from pvt_hf.writing.hub import explain_upload_error, hide_secrets, list_code, register_code
from tests.support.checkpoints import TINY, equal, official_weights, run, save
from tests.support.dense_models import build_dense_model
from tests.support.hub import TOKEN
from tests.support.small_models import ROOT, STAGES, randomize, small_config

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


@pytest.mark.parametrize("version", [pytest.param("v1", marks=pytest.mark.slow), "v2"])
def test_uploads_load_with_and_without_pvt_hf(version, python, hub, tmp_path):
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


AUTO_CLASSES = (
    transformers.AutoModel,
    transformers.AutoModelForImageClassification,
    transformers.AutoBackbone,
    transformers.AutoModelForObjectDetection,
    transformers.AutoModelForInstanceSegmentation,
    transformers.AutoModelForImageSegmentation,
    transformers.AutoModelForSemanticSegmentation,
)
ENCODERS = [name for name in pvt_hf.__all__ if name.startswith("Pvt") and not re.search("Config|Processor", name)]
SOME = (*ENCODERS, "retinanet", "mask_rcnn", "semantic_fpn")  # one that is built of each part
OTHERS = ("atss", "gfl", "cascade_mask_rcnn", "sparse_rcnn")
LOAD_CODE = """
import json, sys
sys.modules["pvt_hf"] = None  # not installed
import torch, transformers
from transformers import AutoConfig, AutoImageProcessor

for name, auto_classes in json.loads(sys.argv[1]).items():
    repo = f"me/{name}"
    auto_map = AutoConfig.from_pretrained(repo, trust_remote_code=True).auto_map
    assert set(auto_map) == {"AutoConfig", *auto_classes}, auto_map
    saved = torch.load(sys.argv[2] + f"/{name}.pt", weights_only=True)
    # A classifier gives the others what they need.
    for auto_class in (key for key in auto_classes if auto_classes[key] == name or name.endswith("Classification")):
        model = getattr(transformers, auto_class).from_pretrained(repo, trust_remote_code=True).eval()
        parts = [part for part in model.modules() if isinstance(part, transformers.PreTrainedModel)]
        assert all(type(part).__module__.startswith("transformers_modules.") for part in parts)
        assert all(type(part.config).__module__.startswith("transformers_modules.") for part in parts)
        assert type(model).__name__ == auto_classes[auto_class]
        if type(model).__name__ == name:
            with torch.no_grad():
                outputs = model(saved["pixels"])
            output = outputs.feature_maps[-1] if "feature_maps" in outputs else outputs[0]
            torch.testing.assert_close(output, saved["output"], rtol=1e-5, atol=1e-5)
            print(name)
    for backend, suffix in (("torchvision", ""), ("pil", "Pil")):
        processor = AutoImageProcessor.from_pretrained(repo, trust_remote_code=True, backend=backend)
        assert type(processor).__module__.startswith("transformers_modules.")
        assert type(processor).__name__ == saved["processor"] + suffix and processor.to_dict()["size"] == saved["size"]
"""


def build_published(name, index):
    """A small model, by the name of its class or architecture, and an image processor; v1, v2 and backends in turn."""
    backend = ("", "Pil")[index % 2]
    if name in ENCODERS:
        model = getattr(pvt_hf, name)(small_config("v2" if "V2" in name else "v1", out_features=STAGES))
        return randomize(model).eval(), getattr(pvt_hf, f"PvtImageProcessor{backend}")(crop_size=64)
    processor = f"Pvt{'Segmentation' if name == 'semantic_fpn' else 'Detection'}ImageProcessor{backend}"
    size = {"shortest_edge": 64, "longest_edge": 96}
    return build_dense_model(name, ("v1", "v2_linear")[index % 2]), getattr(pvt_hf, processor)(size=size)


@pytest.mark.parametrize("names", [SOME, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["some", "others"])
@torch.no_grad()
def test_saved_code_of_every_class_works_without_pvt_hf(names, python, hub, tmp_path):
    """For every Auto class that an installed pvt_hf registers, whatever the one that the code is saved for."""
    expected = {}
    for index, architecture in enumerate(names):
        model, processor = build_published(architecture, index)
        name, module = type(model).__name__, type(model).__module__
        known = {found.__name__: found._model_mapping.get(type(model.config), None) for found in AUTO_CLASSES}
        expected[name] = {auto_class: found.__name__ for auto_class, found in known.items() if found is not None}
        own = next(auto_class for auto_class, found in known.items() if found is type(model))
        with register_code(list_code(own, model, processor)):
            model.save_pretrained(tmp_path / name)
            processor.save_pretrained(tmp_path / name)
        assert (tmp_path / name / f"{module.split('.')[-1]}.py").exists() and type(model)._auto_class is None
        pixels = torch.randn(2, 3, 64, 64)
        outputs = model(pixels)
        saved = {"pixels": pixels, "output": outputs.feature_maps[-1] if "feature_maps" in outputs else outputs[0]}
        saved |= {"processor": type(processor).__name__.removesuffix("Pil"), "size": processor.to_dict()["size"]}
        torch.save(saved, tmp_path / f"{name}.pt")
        hub.repos[f"me/{name}"] = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
    assert len(expected) == len(names)
    result = python("-c", LOAD_CODE, json.dumps(expected), tmp_path)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) == set(expected)


def test_without_code_none_is_named(tmp_path):
    """What is loaded from a folder with code and saved without it names no file that is not there."""
    model, processor = build_dense_model("retinanet"), pvt_hf.PvtDetectionImageProcessor()
    with register_code(list_code("AutoModelForObjectDetection", model, processor)):
        model.save_pretrained(tmp_path / "code")
        processor.save_pretrained(tmp_path / "code")
    again = pvt_hf.RetinaNetForObjectDetection.from_pretrained(tmp_path / "code")
    again.config.backbone_config.auto_map = {"AutoBackbone": "modeling_pvt_v2.PvtV2Backbone"}  # of its checkpoint
    assert again.config.auto_map["AutoModelForObjectDetection"] == "modeling_retinanet.RetinaNetForObjectDetection"
    again.save_pretrained(tmp_path / "none")
    pvt_hf.PvtDetectionImageProcessor.from_pretrained(tmp_path / "code").save_pretrained(tmp_path / "none")
    assert all("auto_map" in file.read_text() for file in (tmp_path / "code").glob("*config.json"))
    assert not any("auto_map" in file.read_text() for file in (tmp_path / "none").glob("*config.json"))


def test_own_subclass_is_saved_as_everywhere(tmp_path, monkeypatch):
    """A class of somebody's own file has no siblings there for the other Auto classes."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_pvt.py").write_text("import pvt_hf\n\n\nclass MyPvt(pvt_hf.PvtModel):\n    pass\n")
    model_class = importlib.import_module("my_pvt").MyPvt
    model_class.register_for_auto_class("AutoModel")
    model_class(small_config("v1")).save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == {"AutoModel": "my_pvt.MyPvt"}


def test_hf_of_the_command_line_uploads_downloads_and_resumes(python, hub, converted, tmp_path):
    """What `hf upload`, of which a failed upload speaks, leaves is what was converted, and `hf download` brings it."""

    def hf(*arguments):
        result = python("-m", "huggingface_hub.cli.hf", *arguments)
        assert result.returncode == 0, result.stderr

    hf("upload", "me/pvt", converted / "saved")
    files = {file.name: file.read_bytes() for file in (converted / "saved").iterdir()}
    assert {name: data for name, data in hub.repos["me/pvt"].items() if name != ".gitattributes"} == files
    hub.repos["me/pvt"]["model.safetensors"] = files["model.safetensors"] = (
        bytes(range(256)) * 100_000
    )  # more than its chunks of 10 MiB
    hub.fault = {"/model.safetensors": "half"}
    hf("download", "me/pvt", "--local-dir", "downloaded")
    assert not hub.fault and len(hub.ranges) == 1 and int(hub.ranges[0][6:-1]) > 0
    found = (file for file in (tmp_path / "downloaded").iterdir() if file.is_file())
    assert {file.name: file.read_bytes() for file in found} == files


def test_repositories_of_the_hub_are_sources(online, tmp_path, capsys):
    """timm's files from the Hub, and a repository of transformers, private and with the labels of its config."""
    weights = official_weights(TINY["v2"])
    content = safetensors.torch.save(formats.official_to_timm(weights))
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


def test_uploading_again_deletes_former_code(online, tmp_path):
    """Code that the new upload does not bring would run with weights that are not its own."""
    path = save(official_weights(TINY["v2"]), tmp_path / "a.pth")
    assert run(path, "out", "--push-to-hub", "me/pvt", "--with-code") == 0
    assert {"modeling_pvt_v2.py", "layers.py"} <= online.repos["me/pvt"].keys()
    online.repos["me/pvt"]["notes.txt"] = b"mine"
    assert run(path, "out", "--push-to-hub", "me/pvt", "--overwrite") == 0
    assert online.repos["me/pvt"].keys() == {path.name for path in (tmp_path / "out").iterdir()} | {"notes.txt"}


def test_private_uploads_are_never_public(online, tmp_path, capsys):
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
        ({"repos/create": 401}, "answers 401: it does not accept your token: run `hf auth login`, or set HF_TOKEN"),
        ({"repos/create": 403}, "answers 403: your token may not write there"),
        ({"PUT /objects": 401}, "answers 401: it does not accept your token"),
        ({"PUT /objects": 403}, "answers 403: your token may not write there"),
        ({"/preupload/": 404}, "answers 404: there is no such repository or owner"),
        ({"/commit/": 409}, "answers 409: the repository is in conflict with this upload"),
        ({"/commit/": 413}, "answers 413: a file is larger than it takes"),
        ({"/commit/": 418}, "answers 418: it refuses this"),
        ({"PUT /objects": (429, {"Retry_After": "17"})}, "answers 429: too much was asked .*; try again in 17 s"),
        ({"/commit/": (429, {"RateLimit": '"api";r=0;t=55'})}, "answers 429: too much .*; try again in 55 s"),
        ({"/commit/": 500}, "answers 500: it has an error of its own"),
        ({"PUT /objects": 503}, "answers 503: it has an error of its own"),
        ({"PUT /objects": "cut"}, "the connection failed"),
        ({"/commit/": "cut"}, "the connection failed"),
        ({"repos/create": "cut"}, "the connection failed"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_failed_upload_tells_why_and_can_be_repeated(fault, message, online, converted):
    folder = converted / "saved"
    online.fault = fault
    with pytest.raises(rename.ConversionError) as raised:
        publish(folder, "me/pvt", private=False)
    error = str(raised.value)
    is_unknown = fault in ({"/commit/": "cut"}, {"/commit/": 500})  # all the other requests come before the commit
    outcome = "Whether the commit arrived is not known" if is_unknown else "Nothing was committed there"
    assert re.search(message, error) and f"hf upload me/pvt {folder}" in error and outcome in error, error
    assert TOKEN not in error and ("connection" in error) == ("cut" in fault.values())
    assert not online.repos.get("me/pvt")
    online.fault = {}
    assert publish(folder, "me/pvt", private=False).startswith(online.url)
    assert online.repos["me/pvt"] == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_conversion_whose_upload_fails_is_there(online, tmp_path, capsys, monkeypatch):
    """Also without a token, and with one that is not known, and where nothing may be asked."""
    path = save(official_weights(TINY["v2"]), tmp_path / "a.pth")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert run(path, "out", "--push-to-hub", "me/pvt") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: The upload to me/pvt") and error.count("\n") == 1 and "hf_wrong" not in error
    assert "it does not accept your token: run `hf auth login`" in error and (tmp_path / "out" / "README.md").exists()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(rename.ConversionError, match="there is no token: run `hf auth login`, or set HF_TOKEN"):
        publish(tmp_path / "out", "me/pvt", private=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(rename.ConversionError, match=r"(?i)the connection failed \(.*offline"):
        publish(tmp_path / "out", "me/pvt", private=False)
    assert not online.repos


def test_answers_to_the_transport_of_large_files_are_known_too():
    error = RuntimeError("Data processing error: HTTP status client error (403 Forbidden) for url (https://cas/x?y=z)")
    assert explain_upload_error(error) == ("the Hub answers 403: your token may not write there", False)
    assert explain_upload_error(RuntimeError("what?")) == ("RuntimeError: what?", True)


def test_secrets_are_not_in_messages(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    text = f"{TOKEN} 'Bearer xyz' hf_{'a' * 34} https://s3.host/object?X-Amz-Signature=abc&y=1 hf_hub_download(x)"
    assert hide_secrets(text) == "... '... ... https://s3.host/object?... hf_hub_download(x)"

    def fail(*_):
        raise OSError(text)

    monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", fail)
    with pytest.raises(ConversionError, match=r"of me/pvt could not be downloaded from the Hub: \.\.\. '\.") as raised:
        read_checkpoint("me/pvt")
    assert TOKEN not in str(raised.value) and "Signature" not in str(raised.value)


def test_downloads_are_held_against_the_hash_of_the_hub(online, tmp_path):
    """sha256 of large files, git's hash of small ones; what is stored under another hash is refused."""
    content = save(official_weights(TINY["v2"]), tmp_path / "a.safetensors").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    wrong, words = "is damaged: the Hub states the hash 0", "as the Hub states"
    for index, (etag, result) in enumerate(
        [(sha256, words), (git, words), ("0" * 64, wrong), ("0" * 40, wrong), ("W/abc", "the Hub states no hash")]
    ):
        repo = f"me/pvt{index}"
        online.repos[repo], online.etags["model.safetensors"] = {"model.safetensors": content}, etag
        if result is wrong:
            with pytest.raises(ConversionError, match=wrong):
                read_checkpoint(repo)
        else:
            checkpoint = read_checkpoint(repo)
            assert checkpoint.sha256 == sha256 and checkpoint.hash_check.endswith(result)
