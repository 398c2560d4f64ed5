"""Programs of a runtime: traced, written to a file, and read from it, by transformers' exporters."""

import contextlib
import inspect
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.export import Dim
from transformers import BaseImageProcessor, PreTrainedModel

from ..models.backbone import get_backbone_config
from .targets import Batch, ExportError, Target

Run = Callable[[Batch], Mapping[str, Any]]
# Least sides in pixels of programs for any size: below, a map has a single row or column, which torch.export cannot
# have beside others.
_LEAST_SIDES = {
    "pvt_hf_retinanet": 129,
    "pvt_hf_atss": 129,
    "pvt_hf_gfl": 129,
    "pvt_hf_mask_rcnn": 65,
    "pvt_hf_cascade_mask_rcnn": 65,
}
_LEAST_SIDE = 64
# These count their proposals image by image.
_ONE_IMAGE = ("pvt_hf_mask_rcnn", "pvt_hf_cascade_mask_rcnn")
Shape = tuple[int, int, int]
_TRACED: Shape = (2, 192, 256)
_CHECKED: tuple[Shape, ...] = ((1, 160, 192), (2, 224, 224), (3, 256, 160))


@dataclass(frozen=True)
class Shapes:
    """The batches, heights and widths that a program takes.

    Attributes:
        traced: Of the trace, `(batch, height, width)`.
        checked: Three of those that it is compared at.
        any_batch: Whether the batch may be any.
        least_side: Of images of any size, in pixels; `None` where height and width are those of the trace.
    """

    traced: Shape
    checked: tuple[Shape, ...]
    any_batch: bool
    least_side: int | None

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Height and width in pixels where they are fixed."""
        return None if self.least_side else self.traced[1:]

    def describe(self) -> str:
        """In words."""
        batch = "batches of any size" if self.any_batch else "one image at a time"
        if self.least_side:
            return f"{batch}, height and width from {self.least_side} pixels on"
        return f"{batch}, height {self.traced[1]} and width {self.traced[2]} pixels"


def find_size(image_processor: BaseImageProcessor | None) -> tuple[int, int] | None:
    """Height and width in pixels of all images that an image processor prepares; `None` if they differ.

    Args:
        image_processor: Of the model, or none.
    """
    if image_processor is None:
        return None
    crop = getattr(image_processor, "crop_size", None) if getattr(image_processor, "do_center_crop", False) else None
    for size in (getattr(image_processor, "pad_size", None), crop, image_processor.size):
        if size and (sides := dict(size)).get("height"):
            return sides["height"], sides["width"]
    return None


def plan_shapes(
    model: PreTrainedModel,
    target: Target,
    image_processor: BaseImageProcessor | None = None,
) -> Shapes:
    """Which batches and sizes a program of a model takes.

    Args:
        model: Of any class.
        target: The runtime.
        image_processor: Of the model. Where it makes images that are too small for programs of any size, their size
            is fixed.

    Raises:
        ExportError: If the runtime needs a size, and there is none.
    """
    model_type = model.config.model_type
    least_side, own = _LEAST_SIDES.get(model_type, _LEAST_SIDE), find_size(image_processor)
    fixed = own if not target.takes_any_size or (own and min(own) < least_side) else None
    if fixed is None and not target.takes_any_size:
        raise ExportError(
            f"Programs for {target.title} take images of one size, and the image processor makes several: it needs a "
            "`crop_size`, a `pad_size`, or a `size` with `height` and `width`."
        )
    any_batch = model_type not in _ONE_IMAGE and target.takes_any_size

    def fit(shape: Shape) -> Shape:
        return (shape[0] if any_batch else 1, *(fixed or shape[1:]))

    return Shapes(fit(_TRACED), tuple(map(fit, _CHECKED)), any_batch, None if fixed else least_side)


def make_batch(
    names: Sequence[str], shape: Shape, channels: int, samples: Sequence[Batch] = (), seed: int = 0
) -> Batch:
    """Inputs of a shape, without padding: the samples, or else noise that is coarse and fine as photographs are.

    Args:
        names: Of the inputs.
        shape: `(batch, height, width)`.
        channels: Of the images.
        samples: Of any sizes, of one image each.
        seed: Of the noise; and the number of the first sample.
    """
    batch, height, width = shape
    if samples:
        given = [samples[(seed + index) % len(samples)]["pixel_values"] for index in range(batch)]
        pixels = torch.cat([F.interpolate(image, (height, width), mode="bilinear", antialias=True) for image in given])
    else:
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.zeros(batch, channels, height, width)
        for cell in (32, 8, 1):
            sides = math.ceil(height / cell), math.ceil(width / cell)
            noise = torch.randn(batch, channels, *sides, generator=generator)
            pixels += F.interpolate(noise, (height, width), mode="bilinear")
    inputs = {"pixel_values": pixels, "pixel_mask": torch.ones(batch, height, width, dtype=torch.int64)}
    return {name: inputs[name] for name in names}


def list_inputs(model: PreTrainedModel, target: Target) -> list[str]:
    """The inputs of a program: what the image processor of a model gives it, as far as the runtime does, too.

    Args:
        model: Of any class.
        target: The runtime.
    """
    taken = inspect.signature(model.forward).parameters
    return [name for name in target.inputs if name in taken]


def _name_dimensions(names: Sequence[str], shapes: Shapes) -> dict[str, Any] | None:
    sides = {}
    if shapes.least_side:
        sides = {name: Dim(name, min=shapes.least_side) for name in ("height", "width")}
    batch = {0: Dim("batch")} if shapes.any_batch else {}
    places = {"pixel_values": (2, 3), "pixel_mask": (1, 2)}
    return {name: batch | dict(zip(places[name], sides.values(), strict=False)) for name in names}


@contextlib.contextmanager
def _hush() -> Iterator[None]:
    """While it lasts, the exporters tell nothing of their steps."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@torch.no_grad()
def write_program(
    model: PreTrainedModel, target: Target, shapes: Shapes, dtype: str, samples: Sequence[Batch], file: Path
) -> Run:
    """Writes a model as a program, and reads that file into its runtime.

    Args:
        model: In evaluation mode, of float32, on the CPU.
        target: The runtime.
        shapes: See [`plan_shapes`].
        dtype: One of `DTYPES`.
        samples: What int8 is calibrated with; may be empty.
        file: To be written.

    Returns:
        What runs the file: inputs to outputs of the model's own class.

    Raises:
        ExportError: If there is no such program of the model.
    """
    from transformers.exporters import AutoHfExporter, ExportedComponent, ExportedModel

    names = list_inputs(model, target)
    inputs = make_batch(names, shapes.traced, get_backbone_config(model.config).num_channels)
    with _hush():
        exporter = AutoHfExporter.from_config({"export_format": target.format})
        settings = target.configure(dtype, samples) | {"dynamic_shapes": _name_dimensions(names, shapes)}
        try:
            exported = exporter.export(model, inputs, exporter.config_class(**settings))
            file.parent.mkdir(parents=True, exist_ok=True)
            target.save(exporter, exported.program, file, dtype)
            component = ExportedComponent(exporter.load_program(file), exported.components["model"].metadata)
            read = ExportedModel({"model": component}, target.format).to("cpu", **target.run)
        except OSError:  # of the disk
            raise
        except Exception as error:
            model_class, reason = type(model).__name__, " ".join(str(error).split())[:300]
            raise ExportError(
                f"{model_class} has no program for {target.title} in {dtype}: {type(error).__name__}: {reason}"
            ) from error
    return lambda batch: read(**{name: batch[name] for name in names})
