"""`pvt-hf convert`: every format in, verified folders out, and back again."""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCard
from torchvision.models import ResNet50_Weights
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

import pvt_hf
from pvt_hf.commands import convert as command
from pvt_hf.conversion import convert, formats, rename, verify
from pvt_hf.variants import VARIANTS
from tests.support.checkpoints import TINY, equal, official_shapes, official_weights, run, save
from tests.support.small_models import ROOT, STAGES, randomize, small_config

VERSIONS = pytest.mark.parametrize("version", TINY)


@pytest.mark.parametrize("name", ["pvt_tiny", "pvt_v2_b0", "pvt_v2_b2_li"])
def test_official_files_have_these_names_and_shapes(name):
    """`../keys/*.tsv` list the official files, tensor by tensor, and where each goes."""
    rows = [line.split("\t") for line in (ROOT / "tests" / "keys" / f"cls_{name}.tsv").read_text().splitlines()[1:]]
    shapes = official_shapes(VARIANTS[name])
    assert shapes == {key: ast.literal_eval(shape) for key, shape, _ in rows}
    targets = [target for *_, cell in rows for target in cell.split("  (")[0].split(" ; ")]
    renamed = rename.from_official({key: torch.empty(shape) for key, shape in shapes.items()})
    assert sorted(renamed) == sorted(targets)


def test_official_files_have_these_numbers_of_tensors():
    counts = {name: len(official_shapes(variant)) for name, variant in VARIANTS.items()}
    assert [counts[f"pvt_{size}"] for size in ("tiny", "small", "medium", "large")] == [161, 301, 517, 751]
    assert [counts[f"pvt_v2_b{index}"] for index in range(6)] == [178, 178, 334, 574, 834, 1054]
    assert counts["pvt_v2_b2_li"] == 346


LARGE = ("pvt_medium", "pvt_large", "pvt_v2_b3", "pvt_v2_b4", "pvt_v2_b5")
MEDIUM = ("pvt_v2_b1", "pvt_v2_b2", "pvt_v2_b2_li")


@pytest.mark.process
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in VARIANTS]
)
def test_every_variant_becomes_a_verified_folder_and_back(name, tmp_path, monkeypatch, request):
    """The official format, and timm's for v2, of the real shapes: verified, loadable, and back bit for bit."""
    if name in MEDIUM:
        request.getfixturevalue("small_probes")
    source = official_weights(VARIANTS[name])
    done = convert.convert(str(save({"model": source}, tmp_path / "source.pth")), tmp_path / "out")
    assert done.variant.name == name and done.difference < 1e-10 and done.source_format.name == "official"

    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(model).__module__.startswith("pvt_hf.")
    assert list(model.config.id2label.values()) == ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    assert len(model.config.label2id) == 1000
    assert equal(model.state_dict(), rename.from_official(source))
    assert dict(AutoImageProcessor.from_pretrained(tmp_path / "out").size) == {"shortest_edge": 256}

    assert len({image.shape for image in verify.probe_images(model.config)}) == 2  # one is oblong

    assert run("--to", "official", tmp_path / "out", tmp_path / "back.pth") == 0
    assert equal(torch.load(tmp_path / "back.pth", mmap=True), source)

    if name.startswith("pvt_v2"):
        with torch.device("meta"):
            expected = {key: tensor.shape for key, tensor in timm.create_model(name).state_dict().items()}
        assert run("--to", "timm", tmp_path / "out", tmp_path / "timm.safetensors") == 0
        monkeypatch.delattr(convert, "reference_outputs")  # timm's checkpoint is compared with timm's model
        again = convert.convert(str(tmp_path / "timm.safetensors"), tmp_path / "again")
        assert again.source_format.name == "timm" and again.difference < 1e-10
        with safetensors.safe_open(tmp_path / "timm.safetensors", "pt") as file:
            assert {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()} == expected  # noqa: SIM118
        first, second = (tmp_path / folder / "model.safetensors" for folder in ("out", "again"))
        assert first.read_bytes() == second.read_bytes()


def namespaced(weights):
    arguments = argparse.Namespace(lr=1e-3, data=Path("x"))
    return {"model": weights, "epoch": 3, "best": np.float64(81.2), "optimizer": {"state": {}}, "args": arguments}


def shared_and_strided(weights):
    """In memory as `save_pretrained` would refuse it."""
    return {key: value.t().contiguous().t() if value.ndim == 2 else value for key, value in weights.items()}


ONE = torch.tensor(1)
PACKAGINGS = {
    "plain": lambda weights: weights,
    "model, optimizer and arguments": namespaced,
    "state_dict": lambda weights: {"state_dict": weights, "meta": {"epoch": 12, "CLASSES": ("a", "b")}},
    "module.": lambda weights: {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
    "model.": lambda weights: {"state_dict": {f"model.{key}": value for key, value in weights.items()}, "epoch": 1},
    "nested": lambda weights: {"model": {"state_dict": weights}, "state_dict": {}},
    "averaged": lambda weights: {f"module.{key}": value for key, value in weights.items()} | {"n_averaged": ONE},
    "shared and strided": shared_and_strided,
    "_orig_mod.": lambda weights: {f"module._orig_mod.{key}": value for key, value in weights.items()},
}


@pytest.mark.parametrize("packaging", PACKAGINGS)
@VERSIONS
def test_weights_are_found_in_every_packaging(version, packaging, tmp_path):
    source = official_weights(TINY[version])
    if packaging == "shared and strided" and version != "v1":
        source["norm1.bias"] = source["norm1.weight"]
    done = convert.convert(str(save(PACKAGINGS[packaging](source), tmp_path / "a.pth")), tmp_path / "out")
    beside = {"model, optimizer and arguments": "left in the file: epoch, best, optimizer, args", "model.": "epoch"}
    assert beside.get(packaging, "") in "\n".join(done.notes)
    assert equal(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"), rename.from_official(source))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("file", ["a.pth", "a.safetensors", "safetensors.pth", "legacy.pth"])
def test_dtype_stays_and_content_tells_the_file_format(file, dtype, tmp_path):
    """The dtype stays, and the kind of file is told from its content."""
    source, path = {key: value.to(dtype) for key, value in official_weights(TINY["v2"]).items()}, tmp_path / file
    if "safetensors" in file:
        safetensors.torch.save_file(source, path)
    else:
        torch.save(source, path, _use_new_zipfile_serialization=file != "legacy.pth")
    done = convert.convert(str(path), tmp_path / "out")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype and f"torch.{done.dtype}" == str(dtype)
    assert equal(model.state_dict(), rename.from_official(source))


def test_mixed_dtypes_become_the_widest(tmp_path):
    source = official_weights(TINY["v1"])
    source["head.weight"] = source["head.weight"].half()
    convert.convert(str(save(source, tmp_path / "a.pth")), tmp_path / "out")
    weights = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert torch.equal(weights["classifier.weight"], source["head.weight"].float())


@pytest.mark.parametrize(
    ("version", "fields"),
    [
        ("v1", {"image_size": 96, "num_labels": 3, "num_channels": 4}),
        ("v1", {"depths": [1, 1, 3, 1], "mlp_ratios": [1, 2, 3, 1.5], "qkv_bias": False, "image_size": 64}),
        ("v1", {"sequence_reduction_ratios": [4, 2, 2, 1], "hidden_sizes": [16, 24, 40, 80]}),
        ("v2", {"num_channels": 1, "num_labels": 2}),
        ("v2", {"depths": [2, 1, 1, 1], "mlp_ratios": [1, 2, 3, 1.5], "qkv_bias": False}),
        ("v2", {"sr_ratios": [4, 4, 2, 1], "patch_sizes": [3, 3, 5, 3], "strides": [4, 2, 2, 2]}),
        ("v2_linear", {"hidden_sizes": [16, 24, 40, 80]}),
    ],
)
def test_architecture_is_read_from_the_tensors(version, fields, tmp_path):
    shape = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 40, 64], "num_attention_heads": [1, 2, 5, 8]}
    config = small_config(version, **(shape | {"num_labels": 7, "mlp_ratios": [2, 2, 2, 2]} | fields))
    model = randomize(AutoModelForImageClassification.from_config(config))
    source = {key: tensor.detach() for key, tensor in rename.to_official(model.state_dict()).items()}
    done = convert.convert(str(save(source, tmp_path / "a.pth")), tmp_path / "out")
    loaded = AutoConfig.from_pretrained(tmp_path / "out")
    ignored = {
        "_name_or_path",
        "dtype",
        "architectures",
        "transformers_version",
        "image_size" if version != "v1" else "",
    }
    ignored |= {"sr_ratios"} if version == "v2_linear" else set()
    expected, actual = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (config, loaded))
    assert actual == expected
    assert version != "v1" or loaded.image_shape == config.image_shape
    assert done.variant is None and done.has_image_processor == (config.num_channels == 3)
    assert (tmp_path / "out" / "preprocessor_config.json").exists() == (config.num_channels == 3)


@VERSIONS
def test_folder_of_save_pretrained_becomes_itself(version, tmp_path):
    """What shapes do not tell comes from its files: labels, heads, image size, rates, and its own preprocessing."""
    names = {0: "cat", 1: "dog", 2: "owl"}
    config = small_config(version, drop_path_rate=0.2, num_labels=3)  # with 1, 2, 3, 4 heads
    config.id2label, config.label2id = names, {name: index for index, name in names.items()}
    if version == "v1":
        config.image_size = (64, 96)
    model = randomize(AutoModelForImageClassification.from_config(config))
    model.save_pretrained(tmp_path / "in")
    pvt_hf.PvtImageProcessor(size={"height": 64, "width": 96}, image_mean=[0.5] * 3).save_pretrained(tmp_path / "in")
    done = convert.convert(str(tmp_path / "in" / "model.safetensors"), tmp_path / "out")
    assert done.source_format.name == "transformers"
    for file in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / "in" / file).read_bytes() == (tmp_path / "out" / file).read_bytes(), file


@pytest.mark.parametrize("names", ['["no", "yes"]', '{"1": "yes", "0": "no"}'])
def test_labels_and_preprocessing_of_timm_are_kept(names, tmp_path):
    """Labels and preprocessing from timm's `config.json`."""
    weights = formats.official_to_timm(official_weights(TINY["v2"]))
    weights["head.weight"], weights["head.bias"] = torch.randn(2, 64), torch.randn(2)
    folder = tmp_path / "repo"
    folder.mkdir()
    save(weights, folder / "model.safetensors")
    image = {"input_size": [3, 384, 384], "crop_pct": 0.9, "interpolation": "bilinear"}
    image |= {"mean": [0.5, 0.4, 0.3], "std": [1, 1, 1]}
    settings = {"architecture": "pvt_v2_b0", "label_names": json.loads(names), "pretrained_cfg": image}
    (folder / "config.json").write_text(json.dumps(settings))
    done = convert.convert(str(folder / "model.safetensors"), tmp_path / "out")
    assert done.config.id2label == {0: "no", 1: "yes"} and done.config.label2id == {"no": 0, "yes": 1}
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.size.shortest_edge == 426 and processor.crop_size.height == 384 and processor.resample == 2
    assert list(processor.image_mean) == [0.5, 0.4, 0.3] and list(processor.image_std) == [1, 1, 1]


@pytest.mark.parametrize(
    ("fields", "edge", "origin"),
    [
        (
            {"size": {"height": 224, "width": 224}, "resample": 2},
            256,
            "the papers' evaluation, in place of the squashing default",
        ),
        ({"size": 224}, 256, "the papers' evaluation, in place of the squashing default"),
        ({"size": {"shortest_edge": 438}, "crop_size": {"height": 384, "width": 384}}, 438, "the checkpoint's own"),
        ({}, 256, "the papers' evaluation"),
    ],
)
def test_preprocessing_is_kept_but_for_the_squashing_default(fields, edge, origin, tmp_path, capsys):
    """Settings are kept, but for the squashing default with which the released weights are on the Hub."""
    folder = tmp_path / "repo"
    folder.mkdir()
    save(rename.from_official(official_weights(TINY["v2"])), folder / "old.pth")
    save({key: value.clone() for key, value in torch.load(folder / "old.pth").items()}, folder / "model.safetensors")
    if fields:
        code = {"auto_map": {"AutoImageProcessor": "elsewhere.Processor"}, "image_processor_type": "PvtImageProcessor"}
        (folder / "preprocessor_config.json").write_text(json.dumps(fields | code))
    assert run(folder / "model.safetensors", tmp_path / "out") == 0
    assert f"image processor: {origin}" in capsys.readouterr().out
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert processor.size.shortest_edge == edge and processor.do_center_crop


def test_size_of_v1_is_the_size_of_its_crop(tmp_path):
    weights = official_weights(TINY["v1"])
    for stage, side in enumerate((24, 12, 6, 3), start=1):
        weights[f"pos_embed{stage}"] = weights[f"pos_embed{stage}"][:, : side * side + (stage == 4)].clone()
    convert.convert(str(save(weights, tmp_path / "a.pth")), tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").image_size == 96
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").crop_size.height == 96


def test_tensors_of_a_gpu_are_read_without_one(tmp_path):
    """A file that was saved on a GPU is read without one."""
    source, path = official_weights(TINY["v2"]), tmp_path / "a.pth"
    torch.save(source, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "gpu.pth", "w") as new:
        for entry in old.infolist():
            cpu, cuda = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
            content = old.read(entry)
            assert entry.filename != "a/data.pkl" or cpu in content
            new.writestr("gpu" + entry.filename.removeprefix("a"), content.replace(cpu, cuda))
    assert run(tmp_path / "gpu.pth", tmp_path / "out") == 0


def test_bare_models_of_transformers_become_backbones(tmp_path, capsys):
    """Without a classifier there is a backbone in them, and what `--backbone-only` wrote can be read again."""
    for version, name in (("v1", "PvtModel"), ("v2", "PvtV2Model")):
        model = randomize(getattr(pvt_hf, name)(small_config(version)))
        model.save_pretrained(tmp_path / name)
        assert run(tmp_path / name / "model.safetensors", tmp_path / "classifier") == 1
        assert "lacks 2: 'classifier.bias'" in capsys.readouterr().err
        out, again = tmp_path / f"{name}_backbone", tmp_path / f"{name}_again"
        assert run(tmp_path / name / "model.safetensors", out, "--backbone-only") == 0
        assert run(out / "model.safetensors", again, "--backbone-only") == 0
        assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
        for key, value in safetensors.torch.load_file(out / "model.safetensors").items():
            assert torch.equal(value, model.state_dict()[key])


@pytest.mark.parametrize(
    ("version", "source_format"),
    [
        (version, source_format)
        for version in TINY
        for source_format in ("mmdetection", "mmsegmentation", "official", "timm")
        if (version, source_format) != ("v1", "timm")
    ],
)
def test_backbone_only_leaves_the_heads(version, source_format, tmp_path, capsys):
    source = official_weights(TINY[version])
    encoder = {key: value for key, value in source.items() if not key.startswith(("head.", "norm.", "cls_token"))}
    head = {"mmdetection": "bbox_head.retina_cls.weight", "mmsegmentation": "decode_head.scale_heads.0.0.conv.weight"}
    if source_format in head:
        source = {f"backbone.{key}": value for key, value in encoder.items()} | {head[source_format]: torch.zeros(3)}
        assert run(save({"state_dict": source}, tmp_path / "a.pth"), tmp_path / "out") == 1
        error = capsys.readouterr().err
        name = "RetinaNet" if source_format == "mmdetection" else "Semantic FPN"
        assert f"not a complete {name}. `--backbone-only` converts its backbone" in error
    elif source_format == "timm":
        source = formats.official_to_timm(source)
    done = convert.convert(str(save(source, tmp_path / "a.pth")), tmp_path / "out", backbone_only=True)
    assert done.source_format.name == source_format and done.difference < 1e-10
    backbone = getattr(pvt_hf, done.model_class).from_pretrained(tmp_path / "out")
    assert backbone.out_features == STAGES and done.model_class in ("PvtBackbone", "PvtV2Backbone")
    prefix = "pvt" if version == "v1" else "pvt_v2"
    assert equal({f"{prefix}.{k}": v for k, v in backbone.state_dict().items()}, rename.from_official(encoder))
    assert run("--to", "official", tmp_path / "out", tmp_path / "back.pth") == 0
    assert equal(torch.load(tmp_path / "back.pth"), encoder)


def test_another_variant_than_insisted_on_is_refused(tmp_path, capsys):
    path = save(official_weights(VARIANTS["pvt_v2_b0"]), tmp_path / "a.pth")
    assert run(path, tmp_path / "out", "--variant", "pvt_v2_b2_li") == 1
    error = capsys.readouterr().err
    assert "not a pvt_v2_b2_li" in error and not (tmp_path / "out").exists()
    for wrong in (
        "linear_attention is False, not True",
        "depths is [2, 2, 2, 2], not [3, 4, 6, 3]",
        "hidden_sizes is [32",
    ):
        assert wrong in error
    assert run(path, tmp_path / "out", "--variant", "pvt_tiny") == 1
    assert "model_type is pvt_v2, not pvt" in capsys.readouterr().err
    assert run(path, tmp_path / "out", "--variant", "pvt_v2_b0") == 0


@pytest.mark.process
def test_program_runs_from_another_directory(tmp_path):
    """As a newcomer runs it, without this repository on the path."""
    save(official_weights(TINY["v2"]), tmp_path / "a.pth")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "conversion" / "convert.py"), "a.pth", "out"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert re.search(r"all of them used\n  largest difference to the source, in float64: \d\.\de-1\d\n", result.stdout)
    assert "attention heads: 1, 2, 5, 8, the official numbers; the checkpoint does not tell" in result.stdout


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A server in place of the official one, with the files of this folder."""
    folder = tmp_path / "release"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("pvt_hf.variants._RELEASE_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
        yield folder
        server.shutdown()


def test_release_is_downloaded_once(release, tmp_path, capsys, monkeypatch):
    source = save(official_weights(VARIANTS["pvt_v2_b0"]), release / "pvt_v2_b0.pth")
    assert run("pvt_v2_b0", tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert "Downloading http" in captured.out and "100%" in captured.err
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict()["conversion"]["source"] == VARIANTS["pvt_v2_b0"].checkpoint_url
    assert card.data.license == "apache-2.0" and "trained on\nImageNet-1k" in card.content
    source.unlink()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pvt_v2_b0").mkdir()  # a folder of that name does not hide the variant
    assert run("pvt_v2_b0", "pvt_v2_b0") == 0  # from the cache

    assert run("pvt_v2_b1", tmp_path / "b1") == 1
    assert "pvt_v2_b1.pth could not be downloaded: HTTP Error 404" in capsys.readouterr().err
    (release / "pvt_v2_b2.pth").write_bytes(b"<html>moved</html>")
    for _ in range(2):  # the damaged file is not kept
        assert run("pvt_v2_b2", tmp_path / "b2") == 1
    assert re.search("damaged and was deleted; run this again.*HTML page", capsys.readouterr().err)
    save(official_weights(VARIANTS["pvt_v2_b0"]), release / "pvt_v2_b3.pth")
    assert run("pvt_v2_b3", tmp_path / "b3") == 1
    assert "not a pvt_v2_b3: depths is" in capsys.readouterr().err
    assert not any((tmp_path / name).exists() for name in ("b1", "b2", "b3"))


@pytest.mark.process
def test_one_failure_leaves_the_other_variants(release, tmp_path, capsys, monkeypatch):
    names = ["pvt_tiny", "pvt_v2_b0", "pvt_v2_b1"]
    monkeypatch.setattr(command, "VARIANTS", {name: VARIANTS[name] for name in names})
    for name in names[:2]:
        save(official_weights(VARIANTS[name]), release / f"{name}.pth")
    assert run("--all", tmp_path / "zoo") == 1  # one is missing; the others are there
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 5 and re.search(r"pvt_tiny \| 177 \| 13\.2 \| \d\.\de-1\d \| .*zoo/pvt_tiny", table[2])
    assert "404" in table[4]
    assert sorted(path.name for path in (tmp_path / "zoo").iterdir()) == names[:2]
    save(official_weights(VARIANTS["pvt_v2_b1"]), release / "pvt_v2_b1.pth")
    assert run("--all", tmp_path / "zoo", "--overwrite") == 0


MEASURE = """
import resource, sys, threading, time
sys.path.insert(0, sys.argv[1])
from pvt_hf.commands import convert

def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

start, peak, done = resident(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, resident())
watcher = threading.Thread(target=watch)
watcher.start()
clock = time.perf_counter()
assert convert.main(sys.argv[2:]) == 0
seconds = time.perf_counter() - clock
done.set()
watcher.join()
print("MEASURED", seconds, peak - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("source_format", ["official", "timm"])
def test_largest_variant_is_quick_and_small(source_format, tmp_path):
    weights = official_weights(VARIANTS["pvt_v2_b5"])
    path = save(formats.official_to_timm(weights) if source_format == "timm" else weights, tmp_path / "b5.pth")
    command = [sys.executable, "-c", MEASURE, str(ROOT), str(path), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    seconds, peak = map(float, re.search(r"MEASURED (\S+) (\S+)", result.stdout).groups())
    print(f"{source_format}: {seconds:.1f} s, {peak / path.stat().st_size:.2f} of the checkpoint's size")
    assert seconds < 20 and peak < 3 * path.stat().st_size
