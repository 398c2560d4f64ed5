"""The card of an export: what is in the folder, how near it is to the model, and how it is run."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import BaseImageProcessor, PreTrainedModel

from ..models.backbone import get_backbone_config
from ..writing.text import code_span, escape_markdown
from .comparison import Comparison, Results
from .targets import TARGETS

_LIBRARIES = {"web": "transformers.js"}  # as the Hub calls them, where that is not the target's name


@dataclass(frozen=True, kw_only=True)
class ExportReport(Comparison):
    """What an export wrote, and how near that is to the model.

    Attributes:
        file: In the folder of the export.
        target: The runtime's name.
        dtype: Of the weights.
        megabytes: Of the file, in units of 10^6 bytes.
        inputs: Their names.
        outputs: Their names.
        shapes: The batches and sizes of images that it takes, in words.
        tolerance: The largest difference that it may have.
    """

    file: str
    target: str
    dtype: str
    megabytes: float
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: str
    tolerance: float

    def describe_agreement(self) -> str:
        """In words."""
        if self.agreement is None:
            return ""
        return f"{100 * self.agreement:.1f} % ({self.subject}, {self.images} images)"


def _read_metadata(folder: Path) -> dict[str, Any]:
    try:
        metadata = ModelCard.load(folder / "README.md").data.to_dict().get("export")
    except (OSError, ValueError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def read_weights(folder: Path) -> str | None:
    """The SHA-256 of the weights of an export, as its card says; `None` if it says nothing.

    Args:
        folder: Of the export.
    """
    return _read_metadata(folder).get("weights_sha256")


def read_reports(folder: Path) -> list[ExportReport]:
    """What the card of a folder says of its files; nothing if it is not the card of an export.

    Args:
        folder: Any.
    """
    try:
        reports = [ExportReport(**report) for report in _read_metadata(folder).get("files", [])]
    except TypeError:
        return []
    return reports if all(report.target in TARGETS for report in reports) else []


def render(
    model: PreTrainedModel,
    results: Results,
    reports: Sequence[ExportReport],
    weights: str,
    image_processor: BaseImageProcessor | None,
    name: str | None,
) -> ModelCard:
    """The card (`card.md.jinja`).

    Args:
        model: That was exported.
        results: What those of the model are.
        reports: Of all files of the folder.
        weights: The SHA-256 of the model's weights.
        image_processor: Of the model.
        name: Of the model on the Hub, if it is there.
    """
    latest = reports[-1]
    metadata = ModelCardData(
        library_name=_LIBRARIES.get(latest.target, latest.target),
        pipeline_tag=results.tag,
        base_model=name,
        tags=["vision", get_backbone_config(model.config).model_type],
        export={"weights_sha256": weights, "files": [_to_plain(report) for report in reports]},
    )
    return ModelCard.from_template(
        metadata,
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        model_class=type(model).__name__,
        name=code_span(name) if name else "",
        titles={target: TARGETS[target].title for target in TARGETS},
        reports=reports,
        latest=latest,
        escape=escape_markdown,
        code=code_span,
        has_processor=image_processor is not None,
        crops=bool(getattr(image_processor, "do_center_crop", False)),
        task=results.tag,
    )


def _to_plain(report: ExportReport) -> dict[str, Any]:
    return {
        field: list(value) if isinstance(value, tuple) else value for field, value in dataclasses.asdict(report).items()
    }
