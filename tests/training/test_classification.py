"""Training: the same result however it is split, interrupted or computed, and a clear end where it cannot continue."""

import errno
import io
import json
import re
import shutil
from unittest import mock

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save
from transformers import AutoModelForImageClassification

from pvt_hf.data.images import ImageError
from pvt_hf.training import resumable
from pvt_hf.training.optimization import freeze_stages, scheduled_learning_rate
from pvt_hf.training.run_checkpoints import CheckpointError, incompleteness, last_complete_checkpoint
from pvt_hf.training.streams import restore_stream
from pvt_hf.writing.files import explain_write_error
from pvt_hf.writing.hub import UploadError
from tests.support import classification_run
from tests.support.classification_run import build
from tests.support.disk import full_disk
from tests.support.run_checkpoints import RUN, write_checkpoint
from tests.support.small_models import assert_close, small_config
from tests.support.training_processes import kill_after, read_result

RICH = {"mixup": 0.8, "cutmix": 1.0, "repeats": 3, "auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25}


def trained(tmp_path, name: str, **settings) -> tuple[list[float], dict]:
    """Losses and final weights of a run in this process."""
    trainer = build(tmp_path / name, **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {key: value.clone() for key, value in trainer.model.state_dict().items()}


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """One process, batches of 8, two epochs: what the other ways of computing it are compared with."""
    return trained(tmp_path_factory.mktemp("plain"), "plain", optim="sgd", learning_rate=0.1)


@pytest.mark.process
@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"model": {"attn_implementation": "eager"}},
        {"activation_checkpointing": True},
        {"trainer": {"channels_last": True}},
        {"dataloader_num_workers": 2},
    ],
    ids=["accumulation 2", "accumulation 4", "eager", "checkpointing", "channels last", "workers"],
)
def test_other_ways_of_computing_give_the_same_losses_and_weights(settings, plain_run, tmp_path):
    """Losses at every step, and the weights in the end. (SGD: Adam's first steps are signs, which rounding turns.)"""
    losses, final = trained(tmp_path, "other", optim="sgd", learning_rate=0.1, **settings)
    assert losses == pytest.approx(plain_run[0], rel=1e-4) and len(losses) == 16
    assert losses[-1] < losses[0]
    assert_close(final, plain_run[1])


def test_sharding_that_accelerate_would_ignore_is_an_error(tmp_path):
    """On CPUs it does, and every process would have the whole model."""
    trainer = build(tmp_path)
    trainer.args.fsdp = True
    with pytest.raises(ValueError, match="`fsdp` is set, but accelerate does not shard here"):
        trainer._check_arguments()


@pytest.mark.process
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 16}, r"images per step are 16, not 8 \(--allow_batch_change"),
        ({"trainer": {"ema_decay": 0.9}}, "EMA decay is 0.9, not None"),
        ({"data_seed": 7}, "seed of the data is 7, not None"),
    ],
)
def test_resuming_another_run_is_an_error(settings, message, tmp_path):
    """Another batch size would skip images, or end at once."""
    build(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    with pytest.raises(CheckpointError, match=message):
        build(tmp_path, **settings).train(True)


def test_training_resumes_from_no_forged_state(tmp_path):
    """An array of NumPy in the optimiser's state, which torch refuses with the advice to run the file's code."""
    trainer, state = build(tmp_path), io.BytesIO()
    torch.save({"state": np.zeros(3)}, state)
    weights = save({"weight": torch.ones(1)})
    run = RUN | {"layout": trainer._layout(), "run": trainer.describe_run()}
    folder = write_checkpoint(tmp_path / "checkpoint-1", run, optimizer=state.getvalue(), model=weights)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is refused: it calls `numpy\."):
        trainer.train(str(folder))


def test_data_seed_changes_the_order_only(tmp_path):
    """It changes the order of the images, and nothing else."""
    orders = []
    for seed in (None, 5, 5):
        sampler = build(tmp_path, data_seed=seed).build_sampler()
        orders.append([key[0] for key in sampler])
    assert orders[0] != orders[1] == orders[2] and sorted(orders[0]) == sorted(orders[1])


def test_skipped_step_does_not_shift_the_schedule(tmp_path, monkeypatch):
    """fp16 skips a step whose gradients overflow; the rate of the next epoch still begins with that epoch."""
    trainer = build(tmp_path, recipe={"warmup_epochs": 1}, num_train_epochs=3)
    skipped = property(lambda accelerator: trainer.state.global_step in (2, 3))
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", skipped)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([scheduled_learning_rate(step // 8, 3, 1, 1e-3, 1e-6, 1e-5) for step in range(24)])


class Streamed(torch.utils.data.IterableDataset):
    """A stream of the first `corrupt_at` images of a data set, and then an error."""

    def __init__(self, images, corrupt_at=10**9):
        self.images, self.corrupt_at, self.epoch = images, corrupt_at, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.images)

    def __iter__(self):
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        for position, index in enumerate(order):
            if self.epoch * len(order) + position == self.corrupt_at:
                raise ImageError("A shard of the stream cannot be read: train-3.tar")
            yield self.images[index, 0, self.epoch, position]


@pytest.mark.process
def test_stream_resumes_where_a_corrupt_shard_ended_it(tmp_path):
    """A resumed stream has the same images; an unreadable shard ends the run, with the last checkpoint intact."""
    settings = {"save_strategy": "steps", "save_steps": 3}

    def streamed(folder, **options):
        trainer = build(folder, **settings)
        trainer.train_dataset = Streamed(trainer.train_dataset, **options)
        return trainer

    uninterrupted = streamed(tmp_path / "uninterrupted")
    uninterrupted.train()
    corrupt = streamed(tmp_path / "corrupt", corrupt_at=64 + 5 * 8)
    with pytest.raises(ImageError, match=r"train-3\.tar"):
        corrupt.train()
    assert last_complete_checkpoint(tmp_path / "corrupt") == str(tmp_path / "corrupt" / "checkpoint-12")
    repaired = streamed(tmp_path / "corrupt")
    repaired.train(True)
    final = uninterrupted.model.state_dict()
    assert all(torch.equal(value, final[key]) for key, value in repaired.model.state_dict().items())


def streamed(folder, **settings):
    """A trainer on a stream of the digits, with two steps of two batches in an epoch."""
    saved = {"save_strategy": "steps", "save_steps": 1}
    return build(folder, streaming=True, images=32, gradient_accumulation_steps=2, **saved, **settings)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_sharded_stream_resumes_bit_for_bit(workers, tmp_path):
    """In the middle of an epoch and at its end. No image is decoded again."""
    settings = {"dataloader_num_workers": workers, "recipe": {"random_erasing": 0.25}}
    uninterrupted = streamed(tmp_path, **settings)
    uninterrupted.train()
    expected = {key: value.clone() for key, value in uninterrupted.model.state_dict().items()}
    for step in (1, 2):
        resumed = streamed(tmp_path, **settings)
        resumed.train_dataset.augment = mock.Mock(wraps=resumed.train_dataset.augment)
        resumed.train(str(tmp_path / f"checkpoint-{step}"))
        assert resumed.train_dataset.augment.call_count == (0 if workers else 64 - step * 16)
        assert all(torch.equal(value, expected[key]) for key, value in resumed.model.state_dict().items())


def test_place_in_a_stream_that_does_not_fit_is_refused(tmp_path):
    """The checkpoint is named."""
    trainer = streamed(tmp_path, dataloader_num_workers=2)
    trainer.get_train_dataloader()
    stream, file = trainer.train_dataset, tmp_path / "checkpoint-1" / "stream.json"
    with pytest.raises(CheckpointError, match=r"stream\.json cannot be read"):
        restore_stream(stream, file.parent, trainer.args)
    for content, message in (
        ("[", r"stream\.json is not JSON"),
        ("{}", "checkpoint-1 cannot be resumed from: The place in the stream must be epoch, images of an epoch"),
        ({"lanes": 3}, r"checkpoint-1 cannot be resumed from: .* dealt to 3 workers .* not with 2 \(1 x 2\)"),
        ({"images of an epoch": 33}, "checkpoint-1 cannot be resumed from: .* images of an epoch is 32, not 33"),
    ):
        file.parent.mkdir(exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(stream.state() | content))
        with pytest.raises(CheckpointError, match=message):
            restore_stream(stream, file.parent, trainer.args)


def test_evaluation_draws_no_random_numbers_of_training(tmp_path):
    """Evaluation, which lies between that checkpoint and the next epoch, draws no random numbers of training."""
    settings = {"model": {"drop_path_rate": 0.3}, "save_strategy": "steps", "save_steps": 8, "eval_strategy": "epoch"}
    uninterrupted = build(tmp_path, **settings)
    uninterrupted.train()
    expected = {key: value.clone() for key, value in uninterrupted.model.state_dict().items()}
    resumed = build(tmp_path, **settings)
    resumed.train(str(tmp_path / "checkpoint-8"))
    assert all(torch.equal(resumed.model.state_dict()[key], value) for key, value in expected.items())


@pytest.mark.process
def test_killed_run_resumes_bit_for_bit(tmp_path):
    """SIGKILL within an epoch, everything random: same batches, augmentations, mixup, drop-path, rates, EMA."""
    settings = {
        "recipe": RICH,
        "model": {"drop_path_rate": 0.2},
        "trainer": {"ema_decay": 0.9},
        "save_strategy": "steps",
        "save_steps": 3,
    }
    classification_run.main(tmp_path / "uninterrupted", settings)
    killed = tmp_path / "killed"
    kill_after(killed / "checkpoint-12", "classification", settings)  # of 16, the epoch has 8
    assert not (killed / "result-0.json").exists()
    assert last_complete_checkpoint(killed) == str(killed / "checkpoint-12")
    classification_run.main(killed, settings | {"resume": True})
    expected, resumed = read_result(tmp_path / "uninterrupted"), read_result(killed)
    assert resumed["losses"][-4:] == expected["losses"][-4:]
    for file in ("model.safetensors", "checkpoint-15/ema.safetensors"):
        actual, expected = (load_file(tmp_path / name / file) for name in ("killed", "uninterrupted"))
        assert all(torch.equal(actual[key], value) for key, value in expected.items()), file
    actual, expected = (torch.load(tmp_path / name / "ema.pt") for name in ("killed", "uninterrupted"))
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def test_incomplete_checkpoint_is_never_used(tmp_path, caplog, monkeypatch):
    """It is never used; the last good one is, and the log says so."""
    trainer = build(tmp_path, save_strategy="steps", save_steps=4, max_steps=8)
    trainer.train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8" / "complete.json").unlink()
    monkeypatch.setattr(transformers.utils.logging.get_logger("pvt_hf.training.run_checkpoints"), "propagate", True)
    monkeypatch.setattr(transformers.utils.logging._get_library_root_logger(), "propagate", True)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert "checkpoint-8 is not used: it was interrupted while it was written" in caplog.text
    with pytest.raises(CheckpointError, match="checkpoint-8 is not a complete checkpoint: it was interrupted"):
        build(tmp_path).train(str(tmp_path / "checkpoint-8"))
    with pytest.raises(CheckpointError, match="checkpoint-7 is not a complete checkpoint: there is no such folder"):
        build(tmp_path).train(str(tmp_path / "checkpoint-7"))
    optimizer = tmp_path / "checkpoint-4" / "optimizer.pt"
    content = optimizer.read_bytes()
    optimizer.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert incompleteness(tmp_path / "checkpoint-4").startswith("optimizer.pt is damaged: it has another checksum")
    assert last_complete_checkpoint(tmp_path) is None


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_is_called_so(monkeypatch, tmp_path):
    """torch says where it was in a file."""
    usage = type(shutil.disk_usage(tmp_path))(10**9, 10**9, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = explain_write_error(RuntimeError("[enforce fail] unexpected pos 64 vs 0"), tmp_path)
    assert message.startswith("the disk is full: torch's writer failed, [enforce fail]")


def test_full_disk_leaves_the_last_checkpoint(tmp_path):
    """Whatever is written when it is full: the error names the last checkpoint, which is untouched even when only one
    may be kept, and training resumes from it."""
    arguments = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1, "max_steps": 6}
    trainer = build(tmp_path, trainer={"ema_decay": 0.9}, **arguments | {"max_steps": 3})
    trainer.train()
    trainer.state.global_step = 6
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint-3").iterdir()}
    no_room = sizes["model.safetensors"] // 2, (sizes["model.safetensors"] + sizes["optimizer.pt"]) // 2
    places = [
        *(full_disk(room) for room in no_room),
        mock.patch.object(trainer, "_save_rng_state", full),
        mock.patch.object(transformers.TrainerState, "save_to_json", full),
        mock.patch.object(resumable, "save_file", full),  # of the EMA weights
        mock.patch.object(resumable, "mark_complete", full),
    ]
    for place in places:
        with place, pytest.raises(CheckpointError) as raised:
            trainer._save_checkpoint(trainer.model, None)
        pattern = r"checkpoint-6 could not be written: .*MiB are free there\)\. The last good .* is .*checkpoint-3\.$"
        assert re.search(pattern, str(raised.value)), raised.value
        assert incompleteness(tmp_path / "checkpoint-3") is None and not (tmp_path / "checkpoint-6").exists()
    resumed = build(tmp_path, trainer={"ema_decay": 0.9}, **arguments)
    resumed.train(True)
    assert resumed.state.global_step == 6 and last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")

    for name in ("save_model", "save_metrics", "create_model_card"):
        with full_disk(100), pytest.raises(CheckpointError, match=r"could not be written: .* is .*checkpoint-6\.$"):
            getattr(resumed, name)(*(["eval", {"eval_x": "x" * 200}] if name == "save_metrics" else []))
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.safetensors"))


def test_failed_upload_of_a_finished_run_tells_where_it_is(tmp_path, monkeypatch):
    trainer = build(tmp_path)
    trainer.hub_model_id = "me/run"

    def push():
        raise RuntimeError("Error while uploading 'model.safetensors' to the Hub.") from ConnectionError("reset")

    monkeypatch.setattr(trainer, "push_to_hub", push)
    message = (
        f"to me/run failed: the connection failed .* Everything is in {tmp_path}. .*: hf upload me/run {tmp_path}$"
    )
    with pytest.raises(UploadError, match=message):
        trainer._upload()


def test_evaluation_that_fails_costs_no_training(tmp_path, monkeypatch):
    """The checkpoint that is due is written before it; what it measures is added after it."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"metric_for_best_model": "accuracy", "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = build(tmp_path, images=32, evaluation=4, **settings)
    evaluate, save, seen, saved = trainer.evaluate, trainer._save_optimizer_and_scheduler, [], []
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", lambda folder: saved.append(folder) or save(folder))

    def fail_late(*args, **kwargs):
        seen.append(incompleteness(tmp_path / f"checkpoint-{trainer.state.global_step}"))
        if len(seen) == 2:
            raise ImageError("x.png cannot be read")
        return evaluate(*args, **kwargs)

    trainer.evaluate = fail_late
    with pytest.raises(ImageError, match=r"x\.png"):
        trainer.train()
    assert seen == [None, None] and last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    states = [json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text()) for step in (2, 4)]
    assert [["eval_accuracy" in entry for entry in state["log_history"]].count(True) for state in states] == [1, 1]
    assert [state["best_global_step"] for state in states] == [2, 2]
    assert states[0]["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
    assert len(saved) == 2  # once for each checkpoint


def test_only_as_many_checkpoints_as_wanted_are_kept(tmp_path):
    build(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=2, max_steps=8).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]


def test_loss_that_is_not_finite_ends_the_run(tmp_path):
    trainer = build(tmp_path, save_strategy="steps", save_steps=2)
    step, steps = trainer.training_step, []

    def poisoned(model, inputs, *args):
        steps.append(inputs["names"])
        if len(steps) == 4:
            trainer.model.classifier.weight.data.fill_(float("inf"))
        return step(model, inputs, *args)

    trainer.training_step = poisoned
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert "The loss is nan at step 4" in str(error.value) and "learning rate of 0.001" in str(error.value)
    assert all(name in str(error.value) for name in steps[3]) and "checkpoint-2" in str(error.value)


def test_loss_of_an_accelerator_is_checked_before_anything_is_saved(tmp_path):
    """It is asked for a step later, but no checkpoint and no evaluation comes in between."""
    trainer = build(tmp_path, save_strategy="steps", save_steps=2)
    for act in (
        lambda: trainer._save_checkpoint(trainer.model, None),
        lambda: trainer._evaluate(None, None),
        lambda: trainer.train(),
    ):
        trainer._unchecked = (lambda: float("inf"), 7, 0.5, ["a.png"])
        with pytest.raises(FloatingPointError, match=r"The loss is inf at step 7 .* learning rate of 0.5 .* a\.png"):
            act()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_every_step_has_the_rate_of_its_epoch(tmp_path):
    """Each step of an epoch has the epoch's rate, with layer-wise decay on top of it."""
    settings = {"recipe": {"warmup_epochs": 1}, "trainer": {"layer_decay": 0.5}, "num_train_epochs": 4}
    trainer = build(tmp_path, images=16, gradient_accumulation_steps=2, per_device_train_batch_size=4, **settings)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    expected = [scheduled_learning_rate(step // 2, 4, 1, 1e-3, 1e-6, 1e-5) for step in range(8)]
    groups = trainer.optimizer.param_groups
    assert rates == pytest.approx([rate * groups[0]["initial_lr"] / 1e-3 for rate in expected])
    assert len({group["lr"] for group in groups}) == 7 and {group["weight_decay"] for group in groups} == {0, 0.05}
    assert sum(len(group["params"]) for group in groups) == len(list(trainer.model.parameters()))


def test_mixup_gives_mixtures_and_probabilities(tmp_path):
    """Targets are probabilities with smoothing, images are mixtures; an odd image out stays alone."""
    trainer = build(tmp_path, recipe={"mixup": 0.8, "cutmix": 1.0})
    images, labels = torch.rand(7, 3, 8, 8), torch.arange(7)
    mixed, targets = trainer.mix(images.clone(), labels)
    assert targets.shape == (7, 10) and torch.allclose(targets.sum(1), torch.ones(7))
    assert torch.equal(mixed[6], images[6]) and not torch.equal(mixed[:6], images[:6])
    assert targets[6, 6] == pytest.approx(0.91) and targets[6, 0] == pytest.approx(0.01)
    _, plain = build(tmp_path, recipe={"label_smoothing": 0.2}).mix(images, labels)
    assert torch.allclose(plain, torch.nn.functional.one_hot(labels, 10) * 0.8 + 0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": RICH, "per_device_train_batch_size": 7}, "must be even for mixup"),
        ({"recipe": {"warmup_epochs": 2}}, "`warmup_epochs` must be less than the 2 epochs"),
        ({"recipe": {"warmup_epochs": 1}, "max_steps": 8}, "`warmup_epochs` must be less than the 1 epochs"),
        ({"warmup_steps": 5}, "`warmup_steps` .* has no effect"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size` would change the images per step"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` has no effect"),
        (
            {"per_device_train_batch_size": 100},
            r"has 100 images \(100 of `per_device_train_batch_size` x 1 .* the 64 of",
        ),
    ],
)
def test_arguments_that_would_be_ignored_are_errors(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **settings).train()


@pytest.mark.process
def test_corrupt_images_are_counted_and_named(tmp_path, caplog, monkeypatch):
    trainer = build(tmp_path, num_train_epochs=1)
    data = trainer.train_dataset
    data.skip_corrupt, rows = True, list(data.data)
    rows[5] = rows[5] | {"image": {"bytes": b"no image", "path": "broken.png"}}
    rows[9] = rows[9] | {"image": None}
    data.data = rows
    monkeypatch.setattr(transformers.utils.logging._get_library_root_logger(), "propagate", True)
    monkeypatch.setattr(transformers.utils.logging.get_logger("pvt_hf.data.classification"), "propagate", True)
    trainer.args.save_strategy = "epoch"
    trainer.train()
    assert trainer.skipped == trainer.skipped_images() == 2
    resumed = build(tmp_path, num_train_epochs=2)
    resumed.train_dataset = data
    resumed.train(True)
    assert resumed.skipped == 2 and resumed.skipped_images() == 4
    assert "broken.png cannot be read" in caplog.text and "image 9 is missing" in caplog.text


def test_frozen_stages_stay_as_they_are_at_another_resolution(tmp_path):
    """v1, pretrained at 64 pixels, takes 32: its position embeddings stay those of 64."""
    trainer = build(tmp_path, version="v1")
    frozen = freeze_stages(trainer.model, 2)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == before.keys() - set(frozen)


def test_adapter_is_saved_loaded_and_merged(tmp_path):
    """Adapters of query, key and value: trained, saved, loaded, merged."""
    trainer = build(tmp_path)
    config = peft.LoraConfig(r=2, target_modules=["query", "key", "value"], modules_to_save=["classifier"])
    base = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    model = peft.get_peft_model(trainer.model, config)
    trainer = type(trainer)(model=model, args=trainer.args, recipe=trainer.recipe, train_dataset=trainer.train_dataset)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    model.eval()
    pixels = torch.randn(2, 3, 32, 32)
    expected = model(pixels).logits
    fresh = AutoModelForImageClassification.from_config(small_config("v2", num_labels=10))
    fresh.load_state_dict(base)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(pixels).logits, expected, rtol=1e-4, atol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(pixels).logits, expected, rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == base.keys()
    assert not torch.equal(merged.state_dict()["classifier.weight"], base["classifier.weight"])
