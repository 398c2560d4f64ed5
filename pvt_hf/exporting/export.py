"""Exports a model: writes a program, compares it with the model, and leaves it with a card if it is near enough."""

import copy
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from ..models.backbone import get_backbone_config
from ..prediction.sources import find_images
from ..writing.files import atomic_folder, name_what_fails
from .card import ExportReport, read_reports, render
from .comparison import compare, find_results, flatten
from .images import Samples
from .output_folder import check_output_dir
from .programs import list_inputs, make_batch, plan_shapes, write_program
from .settings import describe_model
from .targets import DTYPES, TARGETS, TOLERANCES, ExportError, Target


def export_model(
    model: PreTrainedModel,
    output_dir: str | Path,
    target: str = "onnx",
    dtype: str = "fp32",
    image_processor: BaseImageProcessor | None = None,
    calibration_images: str | Path | Sequence[Image.Image] = (),
    tolerance: float | None = None,
    name: str | None = None,
) -> ExportReport:
    """Writes a model as a program of another runtime, runs it there, and leaves it if it gives what the model gives.

    Args:
        model: A classifier, encoder, backbone, detector or segmenter on PVT. It is not changed.
        output_dir: Folder to write: a new or empty one, or the export of the same weights, to which the file is added.
        target: `"onnx"` (default), `"openvino"`, `"executorch"` or `"web"`, a folder for transformers.js.
        dtype: Of the weights: `"fp32"` (default), `"fp16"`, or `"int8"`, which quantises what is multiplied, too, if
            there are images to calibrate with, and with ONNX in any case.
        image_processor: Of the model; its settings are written beside the program (default: none).
        calibration_images: A folder of images or PIL images in RGB: what int8 is calibrated with, and on which the
            results of model and program are compared (default: none).
        tolerance: How far an output may be from the model's, as a share of the largest value of the same output
            (default: 1e-4 for fp32, 0.02 for fp16, 0.5 for int8).
        name: Of the model on the Hub, for the card (default: none).

    Returns:
        What was written, and how near it is.

    Raises:
        ExportError: If there is no such program of the model, if it is not near enough, or if the folder cannot be
            written. Nothing is left then.
        ImageError: If an image cannot be read.
        ModuleNotFoundError: If a package is missing that the target takes.
    """
    runtime = _check_choices(target, dtype, tolerance)
    model, output_dir = copy.deepcopy(model).eval().float().cpu(), Path(output_dir)
    place, weights = runtime.place(dtype), _hash_weights(model)
    check = functools.partial(check_output_dir, output_dir, target, dtype, weights)
    check()
    runtime.import_packages(dtype)
    shapes, names = plan_shapes(model, runtime, image_processor), list_inputs(model, runtime)
    samples = Samples(_list_images(calibration_images), image_processor, names, shapes.fixed_size)
    channels = get_backbone_config(model.config).num_channels
    batches = [make_batch(names, shape, channels, samples, seed) for seed, shape in enumerate(shapes.checked, 1)]
    with torch.no_grad():
        outputs = model(**batches[0])
    results = find_results(outputs)
    settings = describe_model(model, image_processor, results, target, dtype)
    with name_what_fails(output_dir, ExportError), atomic_folder(output_dir, check) as folder:
        former = _take_over(output_dir, folder)
        run = write_program(model, runtime, shapes, dtype, samples, folder / place)
        report = ExportReport(
            file=place,
            target=target,
            dtype=dtype,
            megabytes=sum(file.stat().st_size for file in (folder / place).parent.glob(f"{Path(place).stem}.*")) / 1e6,
            inputs=tuple(names),
            outputs=tuple(flatten(outputs)),
            shapes=shapes.describe(),
            tolerance=TOLERANCES[dtype] if tolerance is None else tolerance,
            **asdict(compare(model, run, batches, samples, image_processor)),
        )
        _refuse_distant(report)
        for file, content in {} if former else settings.items():
            (folder / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        render(model, results, [*former, report], weights, image_processor, name).save(folder / "README.md")
    return report


def _check_choices(target: str, dtype: str, tolerance: float | None) -> Target:
    for name, value, choices in (("target", target, TARGETS), ("dtype", dtype, DTYPES)):
        if value not in choices:
            raise ExportError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
    if tolerance is not None and not 0 < tolerance < float("inf"):
        raise ExportError(f"`tolerance` must be a number above 0, got {tolerance}.")
    if dtype not in TARGETS[target].dtypes:
        title, dtypes = TARGETS[target].title, TARGETS[target].dtypes
        raise ExportError(f"`dtype` for {title} must be one of {', '.join(dtypes)}, got {dtype!r}.")
    return TARGETS[target]


def _hash_weights(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def _list_images(images: str | Path | Sequence[Image.Image]) -> list[str | Image.Image]:
    return [image.path for image in find_images([images])] if isinstance(images, str | Path) else list(images)


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _take_over(output_dir: Path, folder: Path) -> list[ExportReport]:
    """Puts what an export has so far into a folder, all but its card, and returns what that says."""
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return []
    shutil.copytree(output_dir, folder, symlinks=True, copy_function=_link, dirs_exist_ok=True)
    (folder / "README.md").unlink()  # what is written to it would be in the former one, too
    return read_reports(output_dir)


def _refuse_distant(report: ExportReport) -> None:
    if not report.difference <= report.tolerance:
        raise ExportError(
            f"{report.file} is not the model: its `{report.output}` differs by {report.difference:.1e} of the largest "
            f"value, and the tolerance is {report.tolerance:.1e}. Nothing is left of it."
        )
