"""The model card of a converted checkpoint: what the registry says, marked as such, and what was measured."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig

from ..models.backbone import get_backbone_config
from ..variants import Variant
from ..writing.text import code_span, escape_control, python_string
from .architectures.base import Architecture
from .formats import Format
from .verify import TOLERANCE


@dataclass(frozen=True)
class Conversion:
    """What a conversion found and measured.

    Attributes:
        source: Where the checkpoint came from.
        sha256: Of its file.
        source_format: Its format.
        architecture: What it became.
        config: Of the model that was written.
        variant: The released variant with this architecture, if there is one.
        model_class: Name of the class that was written.
        dtype: Of the weights, for example `float32`.
        tensors: How many were written.
        parameters: How many they have together.
        difference: The largest difference between source and result in float64.
        has_image_processor: Whether one was written too.
        has_code: Whether the code was written too.
        notes: What was decided and is not in the checkpoint, for who converted it.
    """

    source: str
    sha256: str
    source_format: Format
    architecture: Architecture
    config: PreTrainedConfig
    variant: Variant | None
    model_class: str
    dtype: str
    tensors: int
    parameters: int
    difference: float
    has_image_processor: bool
    has_code: bool
    notes: tuple[str, ...] = ()

    @property
    def is_release(self) -> bool:
        """Whether it was downloaded from the official release: only then its licence and its data are known."""
        return self.variant is not None and self.source == self.variant.checkpoint_url


def render(conversion: Conversion, name: str) -> ModelCard:
    """The card (`model_card.md.jinja`) for a repository or folder called `name`.

    Its metadata has no `model-index`: a conversion measures no accuracy.
    """
    architecture = conversion.architecture
    model_type = get_backbone_config(conversion.config).model_type
    known = {"license": "apache-2.0", "datasets": ["ILSVRC/imagenet-1k"]} if conversion.is_release else {}
    metadata = ModelCardData(
        **known,
        library_name="transformers",
        pipeline_tag=architecture.pipeline_tag,
        tags=["vision", model_type, *architecture.tags],
        conversion={
            "source": escape_control(conversion.source),
            "source_format": conversion.source_format.name,
            "source_sha256": conversion.sha256,
            "max_abs_difference_float64": conversion.difference,
            "tolerance": TOLERANCE,
        },
    )
    return ModelCard.from_template(
        metadata,
        template_path=str(Path(__file__).with_name("model_card.md.jinja")),
        conversion=conversion,
        architecture=architecture,
        config=conversion.config,
        variant=conversion.variant,
        name=python_string(name),
        source=code_span(conversion.source),
        auto_class=architecture.auto_class.__name__,
        is_v1=model_type == "pvt",
        prefix="Pvt" if model_type == "pvt" else "PvtV2",
    )
