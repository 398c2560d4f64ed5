"""All that can be wrong with a checkpoint, a configuration or an output folder. Nothing is left of a failure."""

import json
import os
import re
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForImageClassification

from pvt_hf.conversion import convert, formats, rename
from pvt_hf.conversion.checkpoint import load_file
from pvt_hf.untrusted import Call
from tests.support.checkpoints import TINY, equal, official_weights, run, save, without
from tests.support.small_models import randomize, small_config

ONES = torch.ones(2)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def cut(path, weights):
    save(weights, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def raw(content):
    return lambda path, _: path.write_bytes(content)


def adding(**tensors):
    return changed(lambda weights: weights | tensors)


def lacking(*names):
    return changed(lambda weights: without(weights, *names))


def changed(change):
    return lambda path, weights: save(change(weights), path)


def pickled(thing, **options):
    """Beside the weights, and in the place that `thing` makes of the file's folder."""
    return lambda path, weights: torch.save(weights | {"x": thing(path.parent)}, path, **options)


def malicious(folder):
    return Malicious(folder / "harm")


class ForgedDtype:
    """A dtype of objects whose state says that it holds none, and a scalar of it whose bytes are an address."""

    def __reduce__(self):
        return np._core.multiarray.scalar, (_ForgedState(), (0xDEADBEEF).to_bytes(8, "little"))


class _ForgedState:
    def __reduce__(self):
        return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)


def flip_a_byte(path, weights):
    """Of the largest tensor: the size stays, and so does all that tells where tensors begin."""
    save(weights, path)
    content = bytearray(path.read_bytes())
    largest = max(weights.values(), key=torch.numel).numpy().tobytes()
    content[content.index(largest) + len(largest) // 2] ^= 1
    path.write_bytes(content)


def zip_bomb(path, _):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(10**7))


def odd_pickle(path, _):
    """With an instruction that torch's restricted reader does not know."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("odd/data.pkl", b"\x80\x02\xff.")
        archive.writestr("odd/version", "3\n")


def holding_itself(path, weights):
    content = {"state_dict": weights}
    content["state_dict"] = content
    torch.save(content, path)


WRONG_FILES = {
    "flipped.pth": (flip_a_byte, "is damaged: '.*data/.*' in it does not have the checksum"),
    "bomb.pth": (zip_bomb, "refused: it claims more content than the file has"),
    "odd_pickle.pth": (odd_pickle, "refused or damaged: "),
    "itself.pth": (holding_itself, "refused: its 'state_dict' holds itself"),
    "malicious.pth": (pickled(malicious), r"refused.*`posix\.system`.*could run code"),
    "legacy.pth": (pickled(malicious, _use_new_zipfile_serialization=False), r"refused.*`posix\.system`"),
    "module.pth": (
        pickled(lambda _: torch.nn.Linear(2, 2)),
        r"refused.*`torch\.nn\.modules\.linear.*state_dict",
    ),
    "pickle.safetensors": (lambda path, weights: torch.save(weights, path), "under the name of a `.safetensors` file"),
    "truncated.pth": (cut, "truncated or damaged"),
    "truncated.safetensors": (cut, "truncated or damaged"),
    "page.pth": (raw(b"\n<!DOCTYPE html><html><body>Sign in</body></html>"), "is an HTML page"),
    "pointer.pth": (raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"), "Git LFS pointer"),
    "empty.pth": (raw(b""), "is empty"),
    "text.pth": (raw(b"hello world, this is a text"), "neither a file of `torch.save` nor"),
    "list.pth": (changed(lambda w: list(w.values())), "must hold a dictionary of tensors, got list"),
    "numbers.pth": (adding(epoch=3), "other things than plain tensors.*'epoch'"),
    "nothing.pth": (changed(lambda w: {}), "there are none"),
    "resnet.pth": (changed(lambda w: {"conv1.weight": ONES, "fc.bias": ONES}), "'conv1.weight', 'fc.bias'"),
    "mmdet3.pth": (
        changed(lambda w: {"backbone.layers.0.0.projection.weight": ONES}),
        "mmdetection 3 checkpoint of an architecture with",
    ),
    "unknown_detector.pth": (
        changed(lambda w: {f"backbone.{key}": value for key, value in w.items()} | {"query_head.x": ONES}),
        "an architecture with 'query_head', which pvt_hf does not have",
    ),
    "lacking.pth": (lacking("block2.1.attn.q.bias"), r"lacks 1: '.*blocks\.1\.attention\.query\.bias"),
    "headless.pth": (lacking("head.weight", "head.bias"), "lacks 2: 'classifier.bias'"),
    "flat.pth": (adding(**{"head.weight": ONES}), r"'head.weight' must have 2 dimensions, got shape \(2,\)"),
    "none.pth": (adding(**{"head.weight": torch.ones(0, 64)}), r"2 dimensions that are not 0, got shape \(0, 64\)"),
    "sparse.pth": (adding(**{"norm3.bias": ONES.to_sparse()}), "other things than plain tensors.*'norm3.bias'"),
    "float8.pth": (adding(**{"norm3.bias": ONES.to(torch.float8_e5m2)}), "other things than plain tensors"),
    "numbered.pth": (changed(lambda w: dict(enumerate(w.values()))), "plain tensors with names"),
    "twice.pth": (
        changed(lambda w: formats.official_to_timm(w) | {"stages.0.downsample.proj.weight": ONES}),
        "Several tensors would get the same name: 'patch_embed1.proj.weight'",
    ),
    "no_mlp.pth": (lacking("block1.0.mlp.fc1.weight"), "lacks 'block1.0.mlp.fc1.weight'"),
    "additional.pth": (adding(**{"block2.1.attn.gate": ONES}), "No rule renames 1 tensors: 'block2"),
    "homeless.pth": (adding(**{"block2.0.attn.q.scale": ONES}), "1 have no place: '.*query.scale"),
    "reshaped.pth": (adding(**{"norm3.bias": ONES}), r"another shape: .*\(2,\) for \(40,\)"),
    "odd_kv.pth": (adding(**{"block1.0.attn.kv.bias": torch.ones(3)}), r"must hold keys and values.*\(3,\)"),
    "integers.pth": (adding(**{"norm3.bias": torch.ones(40, dtype=torch.int8)}), "no floating-point"),
    "nan.pth": (adding(**{"norm3.bias": torch.full((40,), float("nan"))}), "not finite numbers"),
    "indivisible.pth": (
        adding(**{"patch_embed3.proj.weight": torch.ones(41, 16, 3, 3)}),
        "no PVT with.*41",
    ),
}


def test_values_of_numpy_are_never_made(tmp_path):
    """With NumPy's own types this file ends the process, or adds one to a word of its memory."""
    torch.save(official_weights(TINY["v2"]) | {"loss": ForgedDtype()}, tmp_path / "forged.pth")
    assert type(load_file(tmp_path / "forged.pth")["loss"]) is Call


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_file_is_refused_and_nothing_is_left(name, tmp_path, capsys):
    write, message = WRONG_FILES[name]
    write(tmp_path / name, official_weights(TINY["v2"]))
    assert run(tmp_path / name, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message, error, flags=re.DOTALL), error
    assert "weights_only" not in error  # torch advises to read the file in a way that runs its code
    assert [path.name for path in tmp_path.iterdir()] == [name]  # no output, no rest of it, and no harm


def test_v1_positions_that_are_no_square_are_refused(tmp_path, capsys):
    weights = official_weights(TINY["v1"])
    weights["pos_embed1"] = torch.ones(1, 24 * 16, 8)
    assert run(save(weights, tmp_path / "a.pth"), tmp_path / "out") == 1
    assert "384 positions, which is no square" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.pth", "no such file"),
        ("pvt_v2_b9", "Nearest variants: pvt_v2_b5"),
        ("a/b/c", "must be a file, a variant or a repo id"),
        ("owner/repository", "could not be downloaded from the Hub"),
        (".", "must be a file, got the directory"),
    ],
)
def test_wrong_source_is_refused(source, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(source, "out") == 1
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("model_type", "pvt"), "says model_type 'pvt', but the tensors are those of a 'pvt_v2'"),
        (("depths", [1, 1, 1, 1]), r"does not describe the tensors: depths \[1, 1, 1, 1\] for \[1, 2, 1, 1\]"),
        (("id2label", {"0": "a", "1": "b"}), "does not name the 5 labels"),
        (("hidden_act", "relu"), "differs from its source by"),
        (("hidden_act", 3), "no PVT with these shapes and this `config.json`"),
        (("id2label", "abc"), "does not name the 5 labels"),
    ],
)
def test_config_that_contradicts_the_tensors_is_refused(change, message, tmp_path, capsys):
    randomize(AutoModelForImageClassification.from_config(small_config("v2"))).save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict([change])))
    assert run(tmp_path / "in" / "model.safetensors", tmp_path / "out") == 1
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "out").exists()
    for content, message in (("{", "config.json is not JSON"), ("[]", "must hold an object")):
        path.write_text(content)
        assert run(tmp_path / "in" / "model.safetensors", tmp_path / "out") == 1
        assert message in capsys.readouterr().err


def test_output_directory_is_replaced_by_overwrite_only(tmp_path, capsys):
    first, second = (save(official_weights(TINY["v2"]), tmp_path / name) for name in ("1.pth", "2.pth"))
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)  # an empty one is fine
    assert run(first, out) == 0
    content = {path.name: path.read_bytes() for path in out.iterdir()}
    assert content.keys() == {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    (tmp_path / "ordinary").mkdir()
    assert out.stat().st_mode == (tmp_path / "ordinary").stat().st_mode

    assert run(second, out) == 1
    assert "is not empty; use --overwrite" in capsys.readouterr().err
    (out / "notes.txt").write_text("mine")
    assert run(second, out, "--overwrite") == 1
    assert "is not what a conversion left" in capsys.readouterr().err and (out / "notes.txt").exists()
    (out / "notes.txt").unlink()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == content
    assert run(second, out, "--overwrite") == 0
    assert (out / "model.safetensors").read_bytes() != content["model.safetensors"]
    assert run(first, second) == 1 and "must be a new or an empty directory" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_overwriting_deletes_conversions_only(tmp_path, capsys, monkeypatch):
    source = save(official_weights(TINY["v2"]), tmp_path / "a.pth")
    for name, content in (("README.md", "# My project"), ("config.json", "{}"), ("modeling_pvt.py", "mine")):
        project = tmp_path / name.replace(".", "_")
        project.mkdir()
        (project / name).write_text(content)
        assert run(source, project, "--overwrite") == 1
        assert "--overwrite would delete it" in capsys.readouterr().err and (project / name).read_text() == content

    assert run(source, tmp_path / "out", "--with-code") == 0
    (tmp_path / "link").symlink_to(tmp_path / "out")
    assert run(tmp_path / "out" / "model.safetensors", tmp_path / "link", "--overwrite") == 1
    assert "holds the checkpoint itself" in capsys.readouterr().err
    assert run(source, tmp_path / "link", "--overwrite") == 0
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "out" / "modeling_pvt.py").exists()
    monkeypatch.chdir(tmp_path / "out")
    assert run(source, ".", "--overwrite") == 1 and "a name of its own" in capsys.readouterr().err


@pytest.fixture
def ctrl_c():
    """Ctrl-C interrupts, also where the tests run in the background of a shell, which ignores it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("occasion", ["while it is verified", "while it takes its place"])
def test_interrupted_conversion_leaves_the_former_one(occasion, tmp_path, monkeypatch, capsys):
    path, out = save(official_weights(TINY["v2"]), tmp_path / "a.pth"), tmp_path / "out"
    assert run(path, out) == 0
    content = {file.name: file.read_bytes() for file in out.iterdir()}

    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)

    if occasion == "while it is verified":
        monkeypatch.setattr(convert, "render", interrupt)
    else:
        move = Path.rename
        monkeypatch.setattr(Path, "rename", lambda old, new: interrupt() if old.name == "new" else move(old, new))
    assert run(path, out, "--overwrite") == 130
    assert capsys.readouterr().err == f"error: {path}: interrupted; nothing half-written is left\n"
    assert {file.name: file.read_bytes() for file in out.iterdir()} == content
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pth", "out"]


def test_export_is_exact_or_refused(tmp_path, capsys):
    assert run("--to", "official", tmp_path / "none", tmp_path / "x.pth") == 1
    assert "has no ['config.json', 'model.safetensors']" in capsys.readouterr().err
    source = official_weights(TINY["v1"])
    assert run(save(source, tmp_path / "a.pth"), tmp_path / "out") == 0
    assert run("--to", "timm", tmp_path / "out", tmp_path / "x.pth") == 1
    assert "timm has no PVT v1" in capsys.readouterr().err
    assert run("--to", "official", tmp_path / "out", tmp_path / "new" / "x.safetensors") == 0
    assert equal(safetensors.torch.load_file(tmp_path / "new" / "x.safetensors"), source)
    assert run("--to", "official", tmp_path / "out", tmp_path / "new" / "x.safetensors") == 1
    assert "exists; use --overwrite" in capsys.readouterr().err
    assert run("--to", "official", tmp_path / "out", tmp_path / "out" / "model.safetensors", "--overwrite") == 1
    assert "would lie in `SAVED_DIR`" in capsys.readouterr().err
    weights = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    save(without(weights, "classifier.bias"), tmp_path / "out" / "model.safetensors")
    assert run("--to", "official", tmp_path / "out", tmp_path / "y.pth") == 1
    assert "lacks 1: 'classifier.bias'" in capsys.readouterr().err and not (tmp_path / "y.pth").exists()
    lost = next(key for key in weights if key.endswith("value.bias"))
    save(without(weights, lost), tmp_path / "out" / "model.safetensors")
    assert run("--to", "official", tmp_path / "out", tmp_path / "y.pth") == 1
    assert "has no 'block" in capsys.readouterr().err and not (tmp_path / "y.pth").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--all", "root", "checkpoint.pth"],
        ["checkpoint.pth"],
        ["--to", "official", "a", "b", "--with-code"],
        ["a.pth", "b", "--private"],
        ["a.pth", "b", "--push-to-hub", "not/a/repo"],
        ["a.pth", "b", "--variant", "pvt_v3"],
    ],
)
def test_wrong_arguments_show_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2 and capsys.readouterr().err.startswith("usage: pvt-hf convert")


@pytest.mark.parametrize("version", TINY)
def test_wrong_rule_is_found_by_the_comparison(version, tmp_path, monkeypatch, capsys):
    """Keys and values swapped: every name and shape is right, and the model is wrong."""
    table = "_V1_RULES" if version == "v1" else "_V2_RULES"
    swapped = {".k.": ".v.", ".v.": ".k."}
    rules = [(source[:-3] + swapped.get(source[-3:], source[-3:]), target) for source, target in getattr(rename, table)]
    monkeypatch.setattr(rename, table, rules)
    assert run(save(official_weights(TINY[version]), tmp_path / "a.pth"), tmp_path / "out") == 1
    assert re.search(
        r"differs from its source by \d\.\de.* more than 1e-08\. Nothing was written", capsys.readouterr().err
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth"]
