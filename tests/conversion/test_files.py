"""Files that are damaged, forged or odd: each is read as it is meant, or refused in one line that names it."""

import _codecs
import argparse
import collections
import hashlib
import json
import os
import pathlib
import random
import sys
import types
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

import pvt_hf
from pvt_hf.conversion import rename
from pvt_hf.conversion.architectures.classifier import Classifier
from pvt_hf.conversion.checkpoint import load_file, read_checkpoint, read_json
from pvt_hf.conversion.rename import ConversionError
from tests.support.checkpoints import TINY, equal, official_weights, save
from tests.support.small_models import randomize, small_config

WEIGHTS = {"a.weight": torch.arange(12.0).view(4, 3), "b": torch.arange(5), "c": torch.ones(2, 2).half()}
FORMATS = {
    "safetensors": save,
    "pth": save,
    "legacy.pth": lambda weights, path: torch.save(weights, path, _use_new_zipfile_serialization=False),
}

ONES = torch.ones(3)


def assert_refused(path, message: str | None = None) -> None:
    with pytest.raises(ConversionError, match=message) as error:
        read_checkpoint(str(path))
    assert path.name in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("ending", FORMATS)
def test_every_truncation_is_refused(ending, tmp_path):
    path = tmp_path / f"x.{ending}"
    FORMATS[ending](WEIGHTS, path)
    content = path.read_bytes()
    for length in range(0, len(content), 17):
        path.write_bytes(content[:length])
        assert_refused(path)


@pytest.mark.parametrize("ending", FORMATS)
def test_every_damage_is_refused_or_harmless(ending, tmp_path):
    """A zip file has checksums: what is read of one is what was written."""
    path = tmp_path / f"x.{ending}"
    FORMATS[ending](WEIGHTS, path)
    content, generator = path.read_bytes(), random.Random(0)
    for _ in range(100):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            read = read_checkpoint(str(path)).weights
        except ConversionError as error:
            assert path.name in str(error) and len(str(error).splitlines()) == 1
        else:
            assert ending != "pth" or equal(read, WEIGHTS)


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_are_read_as_torch_reads_them(legacy, tmp_path):
    """Views, transposed and shared ones, parameters, all dtypes, none of several elements, and nothing at all."""
    base = torch.arange(24.0)
    dtypes = ("float64", "float16", "bfloat16", "int64", "int16", "int8", "uint8", "bool")
    weights = {
        "transposed": base.view(4, 6).T,
        "part": base[3:9:2],
        "parameter": torch.nn.Parameter(base[:2]),
        "attributes": torch.nn.Parameter(torch.ones(3)),
        "scalar": torch.tensor(3),
        "empty": torch.ones(0, 3),
        **{dtype: torch.arange(5).to(getattr(torch, dtype)) for dtype in dtypes},
    }
    weights["attributes"].tag = "mine"
    torch.save(weights, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    read = load_file(tmp_path / "a.pth")
    assert equal(read, weights) and read["transposed"].stride() == weights["transposed"].stride()
    assert read["part"].untyped_storage().data_ptr() == read["transposed"].untyped_storage().data_ptr()


class Made:
    """What is pickled as a call."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


def nested(depth: int):
    entry = ()
    for _ in range(depth):
        entry = (entry, entry)
    return entry


def doubled(depth: int):
    """A text that is encoded again and again, and becomes twice as long each time."""
    text = "ab"
    for _ in range(depth):
        text = Made(_codecs.encode, text, "hex")
    return text


def test_bombs_are_read_in_the_time_of_their_size(tmp_path):
    """Each of them took hours or all memory."""
    path = Made(pathlib.PurePosixPath, "ab")
    for _ in range(50):
        path = Made(pathlib.PurePosixPath, path, path)
    beside = {"nested": nested(60), "hex": doubled(60), "path": path, "bytes": Made(bytearray, 10**12)}
    beside["itself"] = beside
    torch.save({"state_dict": WEIGHTS, "meta": beside, "model": beside}, tmp_path / "a.pth")
    assert equal(read_checkpoint(str(tmp_path / "a.pth")).weights, WEIGHTS)


REFUSED = {
    "expanded": ({"x": torch.ones(1).expand(10**12)}, "claims more numbers than the file has"),
    "shared": (dict.fromkeys("abcdefgh", torch.ones(10**4)), "claim more content than the file has"),
    "keys": ({"state_dict": WEIGHTS, "o": {nested(3): 1}}, "nested keys"),
    "nested": (
        lambda: {"x": torch.nested.nested_tensor([ONES, ONES])},
        "other things than plain tensors",
    ),
    "quantized": (
        lambda: {"x": torch.quantize_per_tensor(ONES, 0.1, 0, torch.qint8)},
        "other things than plain",
    ),
    "complex": ({"x": torch.ones(2, dtype=torch.complex64)}, "things than plain tensors"),
    "sparse": (lambda: {"x": torch.ones(2, 2).to_sparse_csr()}, "things than plain tensors"),
    "meta": ({"x": torch.ones(2, device="meta")}, "things than plain tensors"),
    "escape": ({"\x1b[31m\n\u202e": 3}, r"\\x1b\[31m\\n\\u202e"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_tensor_is_refused(name, tmp_path):
    content, message = REFUSED[name]
    torch.save(content() if callable(content) else content, tmp_path / f"{name}.pth")
    assert_refused(tmp_path / f"{name}.pth", message)


def rewrite(path, change) -> None:
    """A zip file again, with valid checksums, and with members `(name, content)` that `change` makes of each."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (item for member in members for item in change(*member)):
            archive.writestr(name, content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, content: [(name, content[:4] if "/data/0" in name else content)], "4 of the 48 bytes"),
        (lambda name, content: [] if "/data/0" in name else [(name, content)], "none of the 48 bytes"),
        (lambda name, content: [(name, content)] * 2, "refused: (a name in its archive|it claims more)"),
        (lambda name, content: [(name, content)], None),
        (lambda name, content: [(name, content.replace(b"\1\0\0\0c", b"\1\0\0\0b"))], "has the name 'b' twice"),
    ],
)
def test_forged_archive_is_refused(change, message, tmp_path):
    path = save(WEIGHTS, tmp_path / "x.pth")
    rewrite(path, change)
    if message is None:  # unaligned members are fine
        assert equal(read_checkpoint(str(path)).weights, WEIGHTS)
    else:
        assert_refused(path, message)


class AttributeDict(dict):
    """As Lightning has it."""


@pytest.mark.parametrize("hyper_parameters", ["dict", "AttributeDict", "Namespace", "omegaconf"])
def test_lightning_checkpoint_is_read(hyper_parameters, tmp_path, monkeypatch):
    """Whatever its hyper-parameters and callbacks are, nothing of them is made."""
    for name in ("lightning.fabric.utilities.data", "omegaconf.dictconfig"):
        module = types.ModuleType(name)
        for index in range(name.count(".") + 1):
            monkeypatch.setitem(sys.modules, name.rsplit(".", index)[0], module)
        module.AttributeDict = AttributeDict
    module_name = "omegaconf.dictconfig" if hyper_parameters == "omegaconf" else "lightning.fabric.utilities.data"
    monkeypatch.setattr(AttributeDict, "__module__", module_name)
    content = {"lr": 0.1, "sizes": [1, 2], "path": pathlib.Path("x"), "kinds": collections.defaultdict(list, a=[1])}
    config = AttributeDict(content)
    if hyper_parameters == "omegaconf":
        config.__dict__ |= {"_parent": config, "_content": content}
    made = {"dict": content, "Namespace": argparse.Namespace(**content)}.get(hyper_parameters, config)
    weights = official_weights(TINY["v2"])
    checkpoint = {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"net.{key}": value for key, value in weights.items()},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best": torch.tensor(1.0), "score": np.float64(1)}},
        "hparams_name": "kwargs",
        "hyper_parameters": made,
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    read = read_checkpoint(str(tmp_path / "last.ckpt"))
    assert equal(read.weights, weights) and "hyper_parameters" in read.set_aside


def test_odd_inputs_are_refused(tmp_path):
    """A pipe would be waited for, and a device has no end."""
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "loop.pth").symlink_to(tmp_path / "loop.pth")
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    assert_refused(tmp_path / "pipe.pth", "is no regular file")
    assert_refused(pathlib.Path("/dev/zero"), "is no regular file")
    assert_refused(tmp_path / "loop.pth", "no such file")
    assert_refused(tmp_path / "index.json", "is JSON, not weights")
    undecodable = save(WEIGHTS, tmp_path / "a.pth").rename(tmp_path / "\udcff.pth")
    with pytest.raises(ConversionError, match="a name that is not UTF-8"):
        read_checkpoint(str(undecodable))
    for name in ("a\0.pth", "b" * 5000 + ".pth", "~nobody-of-this-name/c.pth"):
        with pytest.raises(ConversionError):
            read_checkpoint(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": ' + "[" * 10**5, "nested too deeply"),
        ('{"a": 1, "a": 2}', "it has 'a' twice"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": ' + "1" * 5000 + "}", "is not JSON"),
        ("\ud800", "is not JSON"),
        ("3", "must hold an object, got int"),
    ],
)
def test_json_is_read_strictly(content, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ConversionError, match=rf"config\.json .*{message}"):
        read_json(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConversionError, match="is no regular file"):
        read_json(path)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(ConversionError, match="cannot be read"):
        read_json(path)


@pytest.mark.parametrize("number", ["²", "٣", "00", "+1", "1" * 5000])  # noqa: RUF001
def test_numbers_in_names_are_those_of_programs(number):
    with pytest.raises(ConversionError, match="No rule renames 1 tensors"):
        rename.from_official({f"block1.{number}.norm1.weight": torch.ones(2)})


@pytest.mark.parametrize("odd", [torch.tensor(1.0), torch.ones(0), torch.ones(2, 2, 2), None], ids=str)
def test_tensors_of_odd_shapes_are_refused(odd, saved):
    """Wherever they are: the names of transformers, whose keys and values are fused on the way."""
    weights = safetensors.torch.load_file(saved / "model.safetensors")
    classifier = Classifier()
    for name in (name for name in weights if ".3." in name or "classifier" in name):
        changed = {key: odd if key == name else tensor for key, tensor in weights.items()}
        with pytest.raises(ConversionError):
            official = rename.to_official({key: tensor for key, tensor in changed.items() if tensor is not None})
            config = classifier.read_config(official, {})
            rename.check_complete(classifier.from_official(official), classifier.build_empty(config).state_dict())


def test_file_is_held_against_the_hash_in_its_name(tmp_path):
    content = save(WEIGHTS, tmp_path / "a.safetensors").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    for name, check in ((f"pvt-{sha256[:8]}.pth", "as its name says"), ("run-20240102.pth", "no other is known")):
        (tmp_path / name).write_bytes(content)
        read = read_checkpoint(str(tmp_path / name))
        assert read.sha256 == sha256 and read.hash_check.endswith(check)
    (tmp_path / "pvt-0123abcd.pth").write_bytes(content)
    assert_refused(tmp_path / "pvt-0123abcd.pth", f"its sha256 begins with 0123abcd, and it is {sha256}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    randomize(pvt_hf.PvtV2ForImageClassification(small_config("v2"))).save_pretrained(folder)
    return folder


SETTINGS = {
    "size": [0, -5, "abc", {"shortest_edge": 10**9}, {"height": 224}],
    "crop_size": [{"height": 10**9, "width": 10**9}, {"height": 0, "width": 5}, [1, 2, 3, 4]],
    "image_mean": ["abc", [0.5, 0.5], [0.5, 0.5, "a"], None],
    "image_std": [[0, 0, 0], [1, 1], [-1, 1, 1], 1e-320, []],
    "resample": [99, -1, "bicubic", True],
    "rescale_factor": [0, "a", 10**400],
    "do_resize": ["yes", 3],
}


def test_unusable_image_settings_are_refused(saved):
    path = saved / "preprocessor_config.json"
    plain = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    classifier, settings = Classifier(), [(key, value) for key, values in SETTINGS.items() for value in values]
    for key, value in [("resample", 2), *settings]:
        path.write_text(json.dumps(plain | {key: value}))
        checkpoint = read_checkpoint(str(saved / "model.safetensors"))
        if (key, value) == ("resample", 2):
            assert classifier.image_processor(checkpoint, small_config("v2"))[0].resample == 2
            continue
        with pytest.raises(ConversionError, match=r"image settings .* make no image processor: "):
            classifier.image_processor(checkpoint, small_config("v2"))
    path.unlink()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "unknown"),
        ("model_type", "pvt"),
        ("num_attention_heads", "abc"),
        ("num_attention_heads", [0, 0, 0, 0]),
        ("drop_path_rate", 1e308),
        ("hidden_dropout_prob", -1),
        ("id2label", {"²": "a"}),
        ("layer_norm_eps", {}),
    ],
)
def test_unusable_configuration_is_refused(field, value, saved):
    weights = rename.to_official(safetensors.torch.load_file(saved / "model.safetensors"))
    known = json.loads((saved / "config.json").read_text()) | {field: value}
    with pytest.raises(ConversionError):
        Classifier().build_empty(Classifier().read_config(weights, known))
