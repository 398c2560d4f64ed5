"""Trainer, resume, gradient accumulation and DistributedDataParallel on small models."""

import pytest
import torch
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from tests.support.small_models import small_config

VERSIONS = pytest.mark.parametrize("version", ["v1", "v2"])


def build(version: str):
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(small_config(version))


def examples(count: int = 16) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": index % 5} for index in range(count)
    ]


def train(model, folder, resume: bool = False, compute_metrics=None, **arguments) -> Trainer:
    defaults = {
        "output_dir": folder,
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**(defaults | arguments)),
        train_dataset=examples(),
        eval_dataset=examples(8),
        compute_metrics=compute_metrics,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_weights(first, second, **tolerances):
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, **(tolerances or {"rtol": 0, "atol": 0}), msg=name)


@VERSIONS
def test_accumulated_batches_train_as_one(version, tmp_path):
    """8 images at once, or 4 times 2: the same losses, gradient norms and weights. SGD, because Adam hides a factor."""
    whole = train(build(version), tmp_path, per_device_train_batch_size=8)
    parts = train(build(version), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for key in ("loss", "grad_norm"):
        losses = [[entry[key] for entry in trainer.state.log_history if key in entry] for trainer in (whole, parts)]
        assert len(losses[0]) == 4
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert_same_weights(whole.model, parts.model, rtol=1e-4, atol=1e-5)


@VERSIONS
def test_resume_restores_every_parameter(version, tmp_path):
    """Trainer loads with `load_state_dict(strict=False)`: only names that are those in the file come back."""
    straight = train(build(version), tmp_path / "straight")
    train(build(version), tmp_path / "resumed", max_steps=2, save_strategy="steps", save_steps=2)
    torch.manual_seed(1)
    other = AutoModelForImageClassification.from_config(small_config(version))
    resumed = train(other, tmp_path / "resumed", resume=True)
    assert_same_weights(resumed.model, straight.model, rtol=1e-5, atol=1e-6)


@VERSIONS
def test_best_model_is_loaded_at_the_end(version, tmp_path):
    """The first of two checkpoints is the best, so loading it has to undo the last steps in every parameter."""
    scores = iter([1.0, 0.0])
    trainer = train(
        build(version),
        tmp_path,
        compute_metrics=lambda _: {"score": next(scores)},
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    best, last = (AutoModelForImageClassification.from_pretrained(tmp_path / f"checkpoint-{step}") for step in (2, 4))
    assert_same_weights(trainer.model, best)
    assert not torch.equal(best.classifier.weight, last.classifier.weight)


@VERSIONS
def test_activation_checkpointing_trains_the_same(version, tmp_path):
    plain = train(build(version), tmp_path)
    checkpointed = train(build(version), tmp_path, activation_checkpointing=True)
    assert checkpointed.model.is_gradient_checkpointing
    assert_same_weights(plain.model, checkpointed.model, rtol=1e-4, atol=1e-6)
