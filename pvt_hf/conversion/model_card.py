"""The model card of a converted checkpoint: what the registry says, marked as such, and what was measured."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig

from pvt_hf.variants import Variant, backbone_config

from .verify import TOLERANCE


@dataclass(frozen=True)
class Conversion:
    """What a conversion found and measured.

    Attributes:
        source, sha256: Where the checkpoint came from, and its file.
        source_format: One of [`pvt_hf.conversion.rename.detect_format`].
        config: Of the model that was written.
        kind, pipeline_tag, auto_class: Of [`pvt_hf.conversion.kinds.Kind`]; the class by its name.
        variant: The released variant with this architecture, if there is one.
        model_class: Name of the class that was written.
        dtype: Of the weights, for example `float32`.
        tensors, parameters: How many were written.
        difference: The largest difference between source and result in float64.
        has_image_processor, has_code: Whether those were written too.
    """

    source: str
    sha256: str
    source_format: str
    config: PreTrainedConfig
    kind: str
    pipeline_tag: str
    auto_class: str
    variant: Variant | None
    model_class: str
    dtype: str
    tensors: int
    parameters: int
    difference: float
    has_image_processor: bool
    has_code: bool

    @property
    def is_backbone(self) -> bool:
        return self.model_class.endswith("Backbone")

    @property
    def is_system(self) -> bool:
        return hasattr(self.config, "backbone_config")

    @property
    def is_release(self) -> bool:
        """Whether it was downloaded from the official release: only then its licence and its data are known."""
        return self.variant is not None and self.source == self.variant.checkpoint_url


def render(conversion: Conversion, name: str) -> ModelCard:
    """The card (`model_card.md.jinja`) for a repository or folder called `name`.

    Its metadata has no `model-index`: a conversion measures no accuracy.
    """
    model_type = backbone_config(conversion.config).model_type
    known = {"license": "apache-2.0", "datasets": ["ILSVRC/imagenet-1k"]} if conversion.is_release else {}
    metadata = ModelCardData(
        **known,
        library_name="transformers",
        pipeline_tag=conversion.pipeline_tag,
        tags=["vision", model_type, *_more_tags(conversion)],
        conversion={
            "source": conversion.source,
            "source_format": conversion.source_format,
            "source_sha256": conversion.sha256,
            "max_abs_difference_float64": conversion.difference,
            "tolerance": TOLERANCE,
        },
    )
    return ModelCard.from_template(
        metadata,
        template_path=str(Path(__file__).with_name("model_card.md.jinja")),
        conversion=conversion,
        config=conversion.config,
        variant=conversion.variant,
        name=name,
        auto_class=conversion.auto_class,
        is_v1=model_type == "pvt",
        prefix="Pvt" if model_type == "pvt" else "PvtV2",
    )


def _more_tags(conversion: Conversion) -> list[str]:
    if conversion.is_system:
        return [conversion.kind.lower().replace(" ", "-")]
    return ["backbone"] if conversion.is_backbone else []
