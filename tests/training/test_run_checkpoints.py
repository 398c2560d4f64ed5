"""Run checkpoints that are damaged or forged: they are refused by name, before torch reads them."""

import _codecs
import json
import os
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pvt_hf.commands.shared import check_resume
from pvt_hf.training import machines, run_checkpoints
from pvt_hf.training.run_checkpoints import (
    CheckpointError,
    check_states,
    incompleteness,
    last_complete_checkpoint,
    mark_incomplete,
    read_run,
    recall_incompleteness,
    replace_file,
)
from tests.support.classification_run import build
from tests.support.run_checkpoints import RUN, STATES, write_checkpoint


class Made:
    """What is pickled as a call."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


OBJECTS = (3, "|", None, None, None, -1, -1, 0)  # an array of objects that says it has none: bytes become addresses
PLAIN = (3, "<", None, None, None, -1, -1, 0)
words = np.random.get_state()[1]


def nested(depth):
    entry = ()
    for _ in range(depth):
        entry = (entry, entry)
    return entry


def holding_itself():
    state = {}
    state["state"] = state
    return state


FORGED = {
    "dtype": ({"x": Made(np.dtype, "O8", False, True, state=OBJECTS)}, "calls `numpy.dtype`"),
    "scalar": ({"x": np.float64(1)}, r"asks for `numpy\._?core\.multiarray\.scalar`"),
    "array of its own size": ({"x": np.zeros(3, dtype=np.uint32)}, r"calls `numpy\._?core\.multiarray\._reconstruct`"),
    "arrays": ({"x": [words, words.copy()]}, "more of NumPy than"),
    "huge array": ({"x": Made(np.ndarray, (10**9,))}, r"calls `numpy\.ndarray`"),
    "position": ({"numpy": ("MT19937", words, 10**6, 0, 0.0)}, "another state of NumPy's random generator"),
    "codec": ({"x": Made(_codecs.encode, "ab" * 99, "hex")}, r"calls `_codecs\.encode`"),
    "bytes": ({"x": Made(bytearray, 10**9)}, r"asks for `(builtins|__builtin__)\.bytearray`"),
    "code": ({"x": Made(random.seed, 3)}, "asks for `random.Random.seed|asks for `(builtins|__builtin__).getattr"),
    "itself": (holding_itself(), "nested without end"),
    "nested": ({"x": [nested(40)]}, "nested without end"),
    "keys": ({nested(4): 1}, "nested keys"),
    "expanded": ({"x": torch.ones(1).expand(10**9)}, r"calls `torch\._utils\._rebuild_tensor_v2`"),
}


class OldReader:
    """torch's reader of files as it was before torch 2.12."""

    def __init__(self, path):
        reader = torch_reader(path)
        self.get_all_records, self.get_record = reader.get_all_records, reader.get_record


torch_reader = torch._C.PyTorchFileReader


@pytest.fixture(params=["of this torch", "before 2.12"])
def reader(request, monkeypatch):
    if request.param == "before 2.12":
        monkeypatch.setattr(torch._C, "PyTorchFileReader", OldReader)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("name", FORGED)
def test_forged_state_is_refused(name, tmp_path):
    state, message = FORGED[name]
    torch.save(state, tmp_path / "rng_state.pth")
    with pytest.raises(CheckpointError, match=rf"rng_state\.pth is refused: .*{message}"):
        check_states(tmp_path)


@pytest.mark.usefixtures("reader")
def test_honest_states_are_accepted(tmp_path):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.sum().backward()
    optimizer = torch.optim.AdamW([{"params": [weight], "betas": (0.9, 0.99)}])
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    random_states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(schedule.state_dict(), tmp_path / "scheduler.pt")
    torch.save(random_states | {"cuda": [torch.get_rng_state()] * 2}, tmp_path / "rng_state_0.pth")
    torch.save({"weight": weight}, tmp_path / "pytorch_model.bin")
    torch.save(object, tmp_path / "training_args.bin")  # which nothing reads
    save_file({"weight": weight.detach()}, tmp_path / "ema.safetensors")
    check_states(tmp_path)


@pytest.mark.usefixtures("reader")
def test_damaged_states_are_refused(tmp_path):
    """A storage of fewer bytes than its tensor is read beyond its end by torch, checksum or not."""
    path = tmp_path / "optimizer.pt"
    torch.save({"x": torch.arange(100)}, path)
    content = path.read_bytes()
    start = content.index(torch.arange(100).numpy().tobytes())
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member[:8] if name.endswith("data/0") else member)
    shortened = path.read_bytes()
    flipped = content[:start] + b"\1" + content[start + 1 :]
    unnamed = content.replace(b"/data.pkl", b"/\xefata.pkl")
    for damaged in (shortened, flipped, unnamed, content[:-30], b"PK\3\4", b"", b"\x80\2}."):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"optimizer\.pt is (refused|.*damaged): ") as error:
            check_states(tmp_path)
        assert len(str(error.value).splitlines()) == 1
    path.unlink()
    save_file({"x": torch.ones(9)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        check_states(tmp_path)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("layout", 3),
        ("run", None),
        ("skipped", "0"),
        ("skipped", True),
        ("step offset", None),
        ("last logged step", "3"),
        ("unlogged loss", 1),
    ],
)
def test_run_that_is_none_is_refused(name, wrong, tmp_path):
    write_checkpoint(tmp_path, RUN | {name: wrong})
    with pytest.raises(CheckpointError, match=rf"run\.json must say `{name}`, an? (object|integer|number), got "):
        read_run(tmp_path)


def listed(folder: Path) -> dict:
    return json.loads((folder / "complete.json").read_text())


def test_damage_that_keeps_the_size_is_seen(tmp_path):
    """A bit of any file that is listed: weights of the EMA in a folder too, which nothing but a list knows."""
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "optimizer_0").mkdir(parents=True)
    (checkpoint / "optimizer_0" / "0.distcp").write_bytes(b"shard")
    (checkpoint / "ema.safetensors").write_bytes(b"weights")
    write_checkpoint(checkpoint)
    assert incompleteness(checkpoint) is None
    names = [*STATES, "run.json", "ema.safetensors", "optimizer_0/0.distcp"]
    assert sorted(names) == sorted(listed(checkpoint)["files"])
    for name in names:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        assert incompleteness(checkpoint) == f"{name} is damaged: it has another checksum than when it was written"
        (checkpoint / name).write_bytes(content[:-1])
        assert incompleteness(checkpoint) == f"{name} is damaged: it has another size than when it was written"
        (checkpoint / name).unlink()
        assert incompleteness(checkpoint) == f"{name} is missing"
        (checkpoint / name).write_bytes(content)
    assert last_complete_checkpoint(tmp_path) == str(checkpoint)


ENTRY = {"size": 7, "xxh3_128": "0" * 32}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{}", r"complete\.json must say `files`, an object, got \[\]"),
        ("[]", r"complete\.json must hold an object, got list"),
        ('{"files": []}', "must say `files`, an object"),
        ('{"files": {}, "replaced": 1}', "must say `files`, an object"),
        ('{"files": {"optimizer.pt": 7}}', r"must say `size`, an integer, and `xxh3_128`, of 'optimizer\.pt'"),
        ('{"optimizer.pt": 7}', r"must say `files`, an object, got \['optimizer\.pt'\]"),  # sizes alone
        (json.dumps({"files": {"optimizer.pt": ENTRY | {"size": "7"}}}), "must say `size`, an integer"),
        (json.dumps({"files": {"optimizer.pt": ENTRY | {"size": True}}}), "must say `size`, an integer"),
        (json.dumps({"files": {"optimizer.pt": ENTRY | {"xxh3_128": None}}}), "must say `size`, an integer"),
        ('{"files": {}}', "lists no run.json and no state of the trainer and no weights and no state of the optimiser"),
        ("{", "is not JSON"),
        ("\xff", "is not JSON"),
        ("[" * 10**5, "nested too deeply"),
    ],
)
def test_list_that_is_none_makes_a_checkpoint_incomplete(content, reason, tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "complete.json").write_bytes(content.encode("latin-1"))
    assert re.search(reason, incompleteness(tmp_path) or "")
    with pytest.raises(CheckpointError, match="is not a complete checkpoint: complete.json"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", STATES)
def test_list_without_a_state_makes_a_checkpoint_incomplete(name, tmp_path):
    """Whether that is there or not: `Trainer` would leave it at random, or would not see that it is damaged."""
    write_checkpoint(tmp_path)
    files = {other: entry for other, entry in listed(tmp_path)["files"].items() if other != name}
    (tmp_path / "complete.json").write_text(json.dumps({"files": files}))
    assert "complete.json lists no " in incompleteness(tmp_path)
    (tmp_path / name).unlink()
    assert "complete.json lists no " in incompleteness(tmp_path)


def test_file_that_trainer_would_read_unlisted_makes_a_checkpoint_incomplete(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "trainer_state.json.partial").touch()  # of a program that was killed
    assert incompleteness(tmp_path) is None
    for name in ("scaler.pt", "adapter_model.safetensors", "optimizer.bin", "model.safetensors.index.json"):
        (tmp_path / name).touch()
        assert incompleteness(tmp_path) == f"{name} is not in the list of its files"
        (tmp_path / name).unlink()


def test_checkpoint_is_complete_while_a_file_of_it_is_replaced(tmp_path, monkeypatch):
    """At every moment: a program that is killed then leaves what was there, or what was to be there."""
    write_checkpoint(tmp_path)
    replace, seen = Path.replace, []

    def look(path, target):
        for step in (None, lambda: replace(path, target)):
            if step:
                step()
            seen.append((incompleteness(tmp_path), (tmp_path / "trainer_state.json").read_text()))

    monkeypatch.setattr(Path, "replace", look)
    replace_file(tmp_path, "trainer_state.json", "new")
    assert seen == [(None, "content")] * 3 + [(None, "new")] * 3
    (tmp_path / "trainer_state.json").write_text("content")
    assert incompleteness(tmp_path) == "trainer_state.json is damaged: it has another size than when it was written"


def test_what_is_waited_for_is_refused(tmp_path):
    os.mkfifo(tmp_path / "trainer_state.json")
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is no regular file"):
        check_states(tmp_path)


def test_folders_of_others_are_passed_over(tmp_path):
    for name in ("checkpoint-2", "checkpoint-\u00b2", "checkpoint-", "checkpoint-a-3"):
        write_checkpoint(tmp_path / name)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    mark_incomplete(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "complete.json").write_text(json.dumps({"files": {"a" * 300: ENTRY}}))
    assert last_complete_checkpoint(tmp_path) is None


def count_checksums(folder: Path, monkeypatch) -> list[str]:
    """The names of the files of which checksums are computed from now on. None was written a moment ago."""
    describe, names = run_checkpoints._describe_file, []
    monkeypatch.setattr(run_checkpoints, "_describe_file", lambda path: names.append(path.name) or describe(path))
    for path in folder.rglob("*"):
        os.utime(path, (0, path.stat().st_mtime - 60))
    return names


def test_program_that_resumes_computes_each_checksum_once(tmp_path, monkeypatch):
    """It asks before it looks at the data, and when it trains; the states too are looked at once."""
    settings = {"images": 8, "max_steps": 1, "save_strategy": "epoch"}
    trainer = build(tmp_path, **settings)
    trainer.train()
    listed_names, looks = sorted(listed(tmp_path / "checkpoint-1")["files"]), []
    monkeypatch.setattr(machines, "check_states", looks.append)
    names = count_checksums(tmp_path, monkeypatch)
    resumed = build(tmp_path, **settings, resume_from_checkpoint=True)
    check_resume(resumed.args, resumed.recipe)
    resumed.train(True)
    assert sorted(names) == listed_names and len(looks) == 1


def test_file_that_has_changed_since_is_looked_at_again(tmp_path, monkeypatch):
    """Whatever has changed of it, also in the same moment; and another file in its place."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint-1", RUN)
    names, model = count_checksums(tmp_path, monkeypatch), checkpoint / "model.safetensors"
    assert last_complete_checkpoint(tmp_path) == str(checkpoint) and read_run(checkpoint) == RUN
    assert len(names) == len(STATES) + 1
    times = model.stat().st_mtime_ns
    for content in (b"another content", b"CONTENT"):  # the second is as large, and has been written since
        model.write_bytes(content)
        assert last_complete_checkpoint(tmp_path) is None
    model.rename(tmp_path / "former")
    model.write_bytes(b"CONTENT")
    os.utime(model, ns=(times, times))
    assert last_complete_checkpoint(tmp_path) is None


def test_best_model_that_is_damaged_is_not_loaded(tmp_path):
    """Though the run has looked at it before: it is read again, hours later."""
    trainer, best = build(tmp_path), write_checkpoint(tmp_path / "checkpoint-1")
    assert recall_incompleteness(best) is None
    (best / "model.safetensors").write_bytes(b"CONTENT")
    trainer.state.best_model_checkpoint = str(best)
    with pytest.raises(
        CheckpointError, match=r"The best checkpoint, .*-1, cannot be loaded on .*: model\.safetensors is"
    ):
        trainer._load_best_model()
