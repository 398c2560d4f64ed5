"""What a model finds in one image: its class, its objects, or the class of every pixel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image


class ScoredLabel(NamedTuple):
    """A class and how sure the model is of it.

    Attributes:
        label: Of the class, from 0.
        name: Of the class.
        score: In [0, 1].
    """

    label: int
    name: str
    score: float


@dataclass(frozen=True, eq=False)
class Classification:
    """What a classifier says about an image.

    Attributes:
        label_names: The name of each class of the model.
        scores: Probability of each class, float32 `(num_labels,)`.
        top_k: How many of the best classes are shown (default: 5).
    """

    label_names: Sequence[str]
    scores: torch.Tensor
    top_k: int = 5

    def list_best(self) -> list[ScoredLabel]:
        """The `top_k` best classes, best first; all of them where there are fewer."""
        best = self.scores.topk(min(self.top_k, len(self.scores)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [ScoredLabel(label, self.label_names[label], score) for label, score in pairs]

    def describe(self) -> str:
        """The best classes in a line."""
        return ", ".join(f"{name} {score:.2f}" for _, name, score in self.list_best())

    def to_list(self) -> list[dict[str, Any]]:
        """The best classes for json, with the fields of transformers' pipeline and `label_id`."""
        return [{"label": name, "label_id": label, "score": round(score, 6)} for label, name, score in self.list_best()]


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects that a detector finds in an image, best first.

    Attributes:
        label_names: The name of each class of the model.
        scores: In [0, 1], float32 `(objects,)`.
        labels: Of the classes, int64 `(objects,)`.
        boxes: Absolute xyxy in pixels of the image, float32 `(objects, 4)`.
        threshold: The objects have a larger score.
        masks: bool `(objects, height, width)` of the image; `None` for a model without masks (the default).
        best: Where there are no objects, the class with the best score (default: none).
    """

    label_names: Sequence[str]
    scores: torch.Tensor
    labels: torch.Tensor
    boxes: torch.Tensor
    threshold: float
    masks: torch.Tensor | None = None
    best: ScoredLabel | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float) -> Detections:
        """Those with a larger score than a threshold, which is at least that of these."""
        if threshold < self.threshold:
            raise ValueError(
                f"`threshold` must be at least {self.threshold:g}, that of the detections, got {threshold}."
            )
        kept = self.scores > threshold
        best = next(iter(self.list_objects()), self.best)
        return replace(
            self,
            scores=self.scores[kept],
            labels=self.labels[kept],
            boxes=self.boxes[kept],
            threshold=threshold,
            masks=None if self.masks is None else self.masks[kept],
            best=None if kept.any() else best,
        )

    def list_objects(self) -> list[ScoredLabel]:
        """Class and score of each object."""
        pairs = zip(self.labels.tolist(), self.scores.tolist(), strict=True)
        return [ScoredLabel(label, self.label_names[label], score) for label, score in pairs]

    def describe(self) -> str:
        """How many objects of each class there are, in a line; or that there are none, and what came nearest."""
        if len(self):
            counts = Counter(found.name for found in self.list_objects())
            return ", ".join(f"{count} {name}" for name, count in counts.most_common())
        best = f" (best: {self.best.name} {self.best.score:.2f})" if self.best else ""
        return f"nothing above {self.threshold:g}{best}"

    def to_list(self) -> list[dict[str, Any]]:
        """The objects for json, with the fields of transformers' pipeline and `label_id`."""
        sides = ("xmin", "ymin", "xmax", "ymax")
        boxes = ([round(side, 2) for side in box] for box in self.boxes.tolist())
        return [
            {"label": name, "label_id": label, "score": round(score, 6), "box": dict(zip(sides, box, strict=True))}
            for (label, name, score), box in zip(self.list_objects(), boxes, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The class that a segmenter gives every pixel of an image.

    Attributes:
        label_names: The name of each class of the model.
        labels: int64 `(height, width)` of the image.
        first_label: What the first class is called in the maps that the model was trained on: 1 where 0 stands for no
            class (`do_reduce_labels`), else 0 (the default).
    """

    label_names: Sequence[str]
    labels: torch.Tensor
    first_label: int = 0

    def list_shares(self) -> list[ScoredLabel]:
        """The classes that are there, the largest first; their score is their part of the pixels."""
        counts = torch.bincount(self.labels.flatten(), minlength=len(self.label_names))
        order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
        shares = (counts[order] / self.labels.numel()).tolist()
        return [
            ScoredLabel(label, self.label_names[label], share)
            for label, share in zip(order.tolist(), shares, strict=True)
        ]

    def describe(self) -> str:
        """The five largest classes in a line."""
        return ", ".join(f"{name} {100 * share:.1f} %" for _, name, share in self.list_shares()[:5])

    def to_list(self) -> list[dict[str, Any]]:
        """The classes for json: name, number in the map, and part of the pixels."""
        return [
            {"label": name, "label_id": label + self.first_label, "share": round(share, 6)}
            for label, name, share in self.list_shares()
        ]

    def to_image(self, binary: bool = False) -> Image.Image:
        """The map as a PIL image of one channel, numbered as the maps that the model was trained on.

        Args:
            binary: Whether the second of two classes is 255 instead (default: `False`).
        """
        labels = self.labels * 255 if binary else self.labels + self.first_label
        dtype = np.uint8 if len(self.label_names) < 255 else np.uint16
        return Image.fromarray(labels.numpy().astype(dtype))


Prediction: TypeAlias = Classification | Detections | Segmentation
