"""How often a training step of a detector waits for a GPU: whenever Python has to know what a tensor holds."""

from typing import ClassVar

import pytest
import torch

from pvt_hf.models import rois, rpn
from tests.support.dense_models import build_dense_model, dense_inputs

# What gives Python a value, or a tensor whose size depends on values.
WAITS = {"__bool__", "__float__", "__index__", "__int__", "cpu", "item", "masked_select", "nonzero", "numpy", "tolist"}
WAITS |= {"nms", "unique"}


class OnDevice(torch.Tensor):
    """Stands for a tensor on a GPU, and so does what is computed of it; on the CPU it is one as any other."""

    waits: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("__getitem__", "__setitem__") and has_mask(args[1]):
            name = "nonzero"
        if name in WAITS:
            cls.waits.append(name)
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(torch.Tensor) if name == "cpu" else result


def has_mask(index):
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


def on_device(values):
    return {key: value.as_subclass(OnDevice) for key, value in values.items()}


def run_step(model, batch_size):
    """The waits of a training step with two objects in each image but the last, which has none."""
    inputs = on_device(dense_inputs(model, batch_size, 96, 128))
    labels = []
    for count in (*[2] * (batch_size - 1), 0):
        boxes = torch.tensor([[0.4, 0.5, 0.5, 0.6], [0.6, 0.4, 0.3, 0.5]])[:count]
        label = {"class_labels": torch.tensor([2, 1])[:count], "boxes": boxes, "masks": torch.ones(count, 96, 128)}
        labels.append(on_device(label))
    OnDevice.waits.clear()
    model(**inputs, labels=labels).loss.backward()
    return list(OnDevice.waits)


# The sizes of the images, whether the labels are right, and the sizes once more.
READS = ["tolist", "cpu", "tolist"]


@pytest.mark.parametrize(
    ("name", "waits"),
    [
        ("retinanet", READS),
        ("atss", READS),
        ("gfl", READS),
        ("sparse_rcnn", [*READS[:2], "cpu"]),  # the costs of the matching
        ("mask_rcnn", [*READS, *["cpu"] * 2]),  # which anchors and which proposals there are to draw from
        ("cascade_mask_rcnn", [*READS, *["cpu"] * 4]),
    ],
)
def test_training_step_waits_once_for_a_batch(name, waits, monkeypatch):
    """Not once for an image. The suppression of proposals, whose result has any size, is not counted."""
    monkeypatch.setattr(rois, "runs_transformed", lambda: True)  # as on a GPU
    suppress = rpn.suppress

    def suppress_uncounted(*args):
        plain = [arg.as_subclass(torch.Tensor) if isinstance(arg, torch.Tensor) else arg for arg in args]
        return suppress(*plain).as_subclass(OnDevice)

    monkeypatch.setattr(rpn, "suppress", suppress_uncounted)
    model = build_dense_model(name, "resnet").train()
    assert run_step(model, 2) == run_step(model, 4) == waits
