"""Nothing in a training step waits for a GPU, to which batches are copied while it works."""

from typing import ClassVar

import pytest
import torch
from transformers import TrainingArguments

from pvt_hf.data.digits import write_scenes
from pvt_hf.training import trainer as trainer_module
from pvt_hf.training.segmentation_losses import SegmentationLoss
from pvt_hf.training.waits import QueueingTrainer, start_reading
from tests.support import classification_run, segmentation_run
from tests.support.waits import OnDevice, on_device


@pytest.fixture
def find_waits(monkeypatch):
    """What Python asks of a batch in the steps of a run."""
    # A GPU's loss is read a step later.
    monkeypatch.setattr(trainer_module, "start_reading", lambda loss: lambda: 0.0)

    def train(trainer) -> list[str]:
        prepare, step, waits = trainer._prepare_inputs, trainer.training_step, []

        def training_step(*args):
            OnDevice.waits.clear()
            loss = step(*args)
            waits.append(list(OnDevice.waits))
            return loss.as_subclass(torch.Tensor)

        trainer._prepare_inputs = lambda inputs: on_device(prepare(inputs))
        trainer.training_step = training_step
        trainer.train()
        assert len(waits) == 2
        return sum(waits, [])

    return train


RECIPE = {"mixup": 0.8, "cutmix": 1.0}


def test_step_of_a_classifier_waits_for_nothing(find_waits, tmp_path):
    """Mixup, model, loss, backward pass."""
    settings = {"recipe": RECIPE, "model": {"drop_path_rate": 0.2}, "max_steps": 2}
    assert find_waits(classification_run.build(tmp_path, **settings)) == []


def test_the_test_sees_what_waits(find_waits, tmp_path):
    trainer = classification_run.build(tmp_path, max_steps=2)
    mix = trainer.mix
    trainer.mix = lambda images, labels: mix(images, labels) if labels.max() < 10 else None
    assert find_waits(trainer) == ["__bool__"] * 2


def test_step_of_a_segmenter_waits_for_nothing(find_waits, tmp_path):
    """With another loss than its own, which looks at labels on a CPU and asserts on a GPU."""
    data = write_scenes(tmp_path / "scenes", images=8, validation=1)
    loss = SegmentationLoss("cross_entropy+dice", [1.0] * 11)
    assert find_waits(segmentation_run.build(tmp_path, data, trainer={"loss": loss}, max_steps=2)) == []


class Pinned(torch.Tensor):
    """Stands for a tensor in pinned memory."""

    copies: ClassVar[list[dict]] = []

    def is_pinned(self):
        return True

    def to(self, *args, **kwargs):
        self.copies.append(kwargs)
        return torch.Tensor(self)


def test_batches_in_pinned_memory_are_not_waited_for(tmp_path):
    """Labels are counted where they are copied to."""
    trainer = QueueingTrainer(torch.nn.Linear(1, 1), TrainingArguments(tmp_path, use_cpu=True, report_to="none"))
    trainer.model_accepts_loss_kwargs = True
    images, labels = (torch.zeros(2).as_subclass(Pinned) for _ in range(2))
    batch = {"labels": labels, "pixel_values": images}
    assert trainer._get_num_items_in_batch([batch], torch.device("cpu")) == 2
    assert Pinned.copies == [{"non_blocking": True}] and type(batch["labels"]) is torch.Tensor
    assert type(trainer._prepare_inputs({"labels": [batch]})["labels"][0]["pixel_values"]) is torch.Tensor
    assert Pinned.copies == [{"non_blocking": True}] * 2


def test_loss_is_read_when_it_is_asked_for():
    loss = torch.tensor(2.5, requires_grad=True)
    read = start_reading(loss * 2)
    assert read() == 5.0
