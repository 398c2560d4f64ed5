"""Losses and gradients of four images in one process (`compute`), or of two of them in each of two (`main`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.detection_run import small_detector
from tests.support.small_models import randomize

# Class and box of the objects, cxcywh relative to the image: one image has none.
OBJECTS = [
    [(1, [0.5, 0.5, 0.8, 0.7])],
    [(0, [0.3, 0.4, 0.4, 0.5]), (2, [0.6, 0.6, 0.7, 0.6]), (1, [0.5, 0.3, 0.9, 0.4])],
    [],
    [(2, [0.4, 0.6, 0.6, 0.7])],
]


def compute(architecture: str, images: Sequence[int]) -> dict[str, torch.Tensor]:
    """The loss terms, and the gradients by the names of the parameters."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(len(OBJECTS), 3, 64, 96, generator=generator, dtype=torch.double)
    torch.manual_seed(0)
    model = randomize(small_detector(architecture, num_labels=3)).double().eval()
    labels = [
        {
            "class_labels": torch.tensor([label for label, _ in OBJECTS[image]], dtype=torch.long),
            "boxes": torch.tensor([box for _, box in OBJECTS[image]], dtype=torch.double),
        }
        for image in images
    ]
    outputs = model(pixels[list(images)], labels=labels)
    outputs.loss.backward()
    terms = {name: loss.detach() for name, loss in outputs.loss_dict.items()}
    return terms | {name: parameter.grad for name, parameter in model.named_parameters()}


def main(output_dir: Path, settings: dict[str, Any]) -> None:
    """The means over the processes, as DDP makes them, are in `means.pt` afterwards."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank()
    means = compute(settings["architecture"], [2 * rank, 2 * rank + 1])
    for tensor in means.values():
        dist.all_reduce(tensor)
        tensor /= 2
    output_dir.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        torch.save(means, output_dir / "means.pt")
