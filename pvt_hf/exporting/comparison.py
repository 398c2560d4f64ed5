"""How near a program of another runtime is to its model: the largest difference, and what they agree on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchvision.ops import box_iou
from transformers import BaseImageProcessor, PreTrainedModel

from .programs import Run
from .targets import Batch

# Detections with a larger score are compared. Two are one if their boxes overlap at least by the second number.
_SCORE, _OVERLAP = 0.3, 0.5


@dataclass(frozen=True)
class Comparison:
    """What a program has of its model.

    Attributes:
        difference: The largest difference of two values, as a share of the largest value of their output.
        output: Where that is.
        images: Number of images of which the results were compared.
        agreement: Share of results that are the same, from 0 to 1; `None` without images, or if the model has none.
        subject: What the results are, in words.
    """

    difference: float
    output: str
    images: int = 0
    agreement: float | None = None
    subject: str = ""


def flatten(outputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a model's outputs by the names that programs give them: those of a tuple with their number.

    Args:
        outputs: Of a model.
    """
    tensors: dict[str, Any] = {}
    for name, value in outputs.items():
        parts = {f"{name}.{index}": part for index, part in enumerate(value)} if isinstance(value, tuple | list) else {}
        tensors |= parts or {name: value}
    return {name: torch.as_tensor(value) for name, value in tensors.items() if value is not None}


def find_difference(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[float, str]:
    """The largest difference of two outputs, as a share of the largest value of the same one, and the name of that
    output. Outputs of other names or shapes differ infinitely.

    Args:
        actual: Outputs of a program.
        expected: Those of the model.
    """
    found, wanted = flatten(actual), flatten(expected)
    if found.keys() != wanted.keys():
        return float("inf"), ", ".join(sorted(found.keys() ^ wanted.keys()))
    differences = {name: _find_share(found[name], value) for name, value in wanted.items()}
    name = max(differences, key=lambda name: differences[name])
    return differences[name], name


def _find_share(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.double(), expected.double()
    largest = expected[expected.isfinite()].abs()
    differences = (actual - expected)[actual != expected].abs()  # Mask R-CNN has logits of minus infinity
    if not differences.numel():
        return 0.0
    difference = (differences.max() / (largest.max() if largest.numel() else 0)).item()
    return difference if difference == difference else float("inf")  # what is no number


Agreement = tuple[int, int]


def _compare_classes(actual: Any, expected: Any, processor: BaseImageProcessor) -> Agreement:
    same = actual["logits"].argmax(dim=-1) == expected["logits"].argmax(dim=-1)  # (images,)
    return int(same.sum()), same.numel()


def _compare_label_maps(actual: Any, expected: Any, processor: BaseImageProcessor) -> Agreement:
    same = actual["logits"].argmax(dim=1) == expected["logits"].argmax(dim=1)  # (images, height / 4, width / 4)
    return int(same.sum()), same.numel()


def _compare_detections(actual: Any, expected: Any, processor: BaseImageProcessor) -> Agreement:
    """Detections of both that have a partner in the other: each has one at most."""
    together = total = 0
    for found, wanted in zip(
        *(processor.post_process_object_detection(outputs, _SCORE) for outputs in (actual, expected)), strict=True
    ):
        total += len(found["boxes"]) + len(wanted["boxes"])
        overlaps = box_iou(found["boxes"], wanted["boxes"]).nan_to_num(0)  # of boxes without an area
        overlaps *= found["labels"][:, None] == wanted["labels"]
        while overlaps.numel() and overlaps.max() >= _OVERLAP:
            row, column = divmod(int(overlaps.argmax()), overlaps.shape[1])
            overlaps[row], overlaps[:, column] = 0, 0
            together += 2
    return together, total


@dataclass(frozen=True)
class Results:
    """What the results of a model are.

    Attributes:
        tag: As the Hub calls it.
        subject: What is compared, in words.
        compare: Of the outputs of a program and of its model for images, how many results are the same, and of how
            many.
    """

    tag: str
    subject: str = ""
    compare: Callable[[Any, Any, BaseImageProcessor], Agreement] | None = None


CLASSIFICATION = Results("image-classification", "the best class of an image", _compare_classes)
SEGMENTATION = Results("image-segmentation", "the class of a pixel", _compare_label_maps)
DETECTION = Results("object-detection", f"detections with a score above {_SCORE}", _compare_detections)
FEATURES = Results("image-feature-extraction")


def find_results(outputs: Mapping[str, Any]) -> Results:
    """What the results of a model are, by its outputs.

    Args:
        outputs: Of a model in evaluation mode.
    """
    if "pred_boxes" in outputs:
        return DETECTION
    if "logits" not in outputs:
        return FEATURES
    return SEGMENTATION if outputs["logits"].ndim == 4 else CLASSIFICATION


@torch.no_grad()
def compare(
    model: PreTrainedModel,
    run: Run,
    batches: Sequence[Batch],
    samples: Sequence[Batch],
    image_processor: BaseImageProcessor | None,
) -> Comparison:
    """Runs a program beside its model.

    Args:
        model: In evaluation mode.
        run: The program.
        batches: Of which all outputs are compared.
        samples: Images of which the results are compared too; may be empty.
        image_processor: Of the model; not needed without samples.
    """
    difference, output = max(find_difference(run(batch), model(**batch)) for batch in batches)
    pairs: Iterator[tuple[Any, Any]] = ((run(sample), model(**sample)) for sample in samples)
    same = total = 0
    results = FEATURES
    for actual, expected in pairs:
        results = find_results(expected)
        if results.compare is None:
            difference, output = max((difference, output), find_difference(actual, expected))
            continue
        counted = results.compare(actual, expected, image_processor)
        same, total = same + counted[0], total + counted[1]
    return Comparison(difference, output, len(samples), same / total if total else None, results.subject)
