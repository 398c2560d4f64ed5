"""What the converter asks of an architecture, and what detectors and segmenters on a PVT have in common."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ...models.configuration_pvt import label_fields
from ...models.image_processing_detection import PvtDetectionImageProcessor
from .. import reference, rename
from ..checkpoint import Checkpoint
from ..class_names import COCO
from ..infer_config import infer_config, label_names
from ..rename import ConversionError, StateDict

Weights = Mapping[str, torch.Tensor]
Outputs = list[torch.Tensor]
Rules = tuple[tuple[str, str], ...]
Shape = Callable[[str], tuple[int, ...]]  # of a tensor that has to be there

# What transformers raises for a configuration that makes no model.
_NO_MODEL = (ArithmeticError, AttributeError, LookupError, RuntimeError, StrictDataclassError, TypeError, ValueError)

# (official, pvt_hf) of the feature pyramid. The official names are those of mmdetection and mmsegmentation.
FPN_RULES: Rules = (
    ("neck.lateral_convs.{n}.conv.", "neck.lateral_convs.{n}."),
    ("neck.fpn_convs.{n}.conv.", "neck.output_convs.{n}."),
)
# Of one with two more levels that convolutions make from the coarsest of three.
FIVE_LEVELS_RULES: Rules = (
    ("neck.fpn_convs.3.conv.", "neck.extra_convs.0."),
    ("neck.fpn_convs.4.conv.", "neck.extra_convs.1."),
    *FPN_RULES,
)


class Architecture(ABC):
    """What a checkpoint can become. Each is one class, of which `registry.py` has the instances.

    Attributes:
        name: In words, for messages and model cards.
        auto_class: The Auto class that builds and loads the model.
        pipeline_tag: The task on the Hub.
        tags: More tags of the model card.
        is_backbone: Whether it ends with the feature maps.
        is_dense: Whether it is a detector or a segmenter, whose configuration holds the PVT's as `backbone_config`.
        is_native: Whether its class is transformers' own.
    """

    name: ClassVar[str]
    auto_class: ClassVar[type[Any]]
    pipeline_tag: ClassVar[str]
    tags: ClassVar[tuple[str, ...]] = ()
    is_backbone: ClassVar[bool] = False
    is_dense: ClassVar[bool] = False
    is_native: ClassVar[bool] = False

    def select(self, official: StateDict) -> StateDict:
        """Those of a checkpoint's tensors, with official names, that it is made of."""
        return official

    @abstractmethod
    def read_config(
        self, official: StateDict, known: Mapping[str, Any], class_names: Sequence[str] = ()
    ) -> PreTrainedConfig:
        """The configuration.

        Args:
            official: Tensors with official names, from whose shapes it is inferred.
            known: The `config.json` beside them; empty if there is none.
            class_names: Those that the checkpoint itself states.
        """

    @abstractmethod
    def from_official(self, official: StateDict) -> StateDict:
        """The tensors with the model's names. Raises a `ConversionError` for those that no rule knows."""

    @abstractmethod
    def to_official(self, tensors: StateDict) -> StateDict:
        """The inverse of `from_official`."""

    @abstractmethod
    def read_saved(self, saved_dir: Path, known: Mapping[str, Any]) -> StateDict:
        """The tensors of a folder of `save_pretrained`, with official names.

        Args:
            saved_dir: The folder.
            known: Its `config.json`.

        Raises:
            ConversionError: Unless they are all there.
        """

    @abstractmethod
    def outputs(self, model: PreTrainedModel, image: torch.Tensor) -> Outputs:
        """What the model says about an image, before anything is decoded."""

    @abstractmethod
    def reference(self, weights: Weights, image: torch.Tensor, config: PreTrainedConfig) -> Outputs:
        """The same by an independent evaluation of tensors with official names."""

    @abstractmethod
    def image_processor(
        self, checkpoint: Checkpoint, config: PreTrainedConfig
    ) -> tuple[BaseImageProcessor | None, str]:
        """The processor, or `None` for a model that takes other than three channels, and where it is from, in words."""

    def build_empty(self, config: PreTrainedConfig) -> PreTrainedModel:
        """The model on the meta device, in evaluation mode. Raises a `ConversionError` if there is none."""
        try:
            with torch.device("meta"):
                return self.auto_class.from_config(config).eval()
        except _NO_MODEL as error:
            raise ConversionError(f"There is no {self.name} with this configuration: {error}") from error


def reference_options(config: PreTrainedConfig) -> dict[str, Any]:
    """What the reference needs to know of a PVT beside its tensors."""
    return {
        "image_size": config.image_shape if config.model_type == "pvt" else None,
        "heads": config.num_attention_heads,
        "patch_eps": config.patch_layer_norm_eps,
    }


class DensePredictor(Architecture):
    """A detector or a segmenter on a PVT.

    Attributes:
        signature: How the names of tensors start that only its checkpoints have.
        config_class: Of its configuration.
        fixed_fields: Fields of the configuration that only it has so, where architectures share the class.
        class_names: What the classes are called if there are as many and the checkpoint does not say.
        rules: (official, pvt_hf) names of everything beside the backbone. The first match counts.
        backbone_prefix: Where the model has its backbone. The official one is at `backbone.`.
    """

    is_dense = True
    signature: ClassVar[str]
    config_class: ClassVar[type[PreTrainedConfig]]
    fixed_fields: ClassVar[Mapping[str, Any]] = {}
    class_names: ClassVar[tuple[str, ...]]
    rules: ClassVar[Rules]
    backbone_prefix: ClassVar[str] = "backbone."

    @abstractmethod
    def read_fields(self, shape: Shape, official: StateDict) -> dict[str, Any]:
        """Fields of the configuration, from the shapes of the official tensors; `num_labels` among them."""

    @abstractmethod
    def head_reference(self, weights: Weights, image: torch.Tensor, feature_maps: Outputs) -> Outputs:
        """`reference` from the maps of the backbone that the configuration asks for."""

    @abstractmethod
    def build_image_processor(self, config: PreTrainedConfig) -> BaseImageProcessor:
        """The image processor of the papers' evaluation."""

    def recognizes(self, names: Iterable[str]) -> bool:
        """Whether a checkpoint with these names of tensors is one of this architecture."""
        return any(name.startswith(self.signature) for name in names)

    def recognizes_config(self, known: Mapping[str, Any]) -> bool:
        """Whether a `config.json` is one of this architecture."""
        has_fields = all(known.get(key, value) == value for key, value in self.fixed_fields.items())
        return has_fields and known.get("model_type") == self.config_class.model_type

    def build_config(self, backbone_config: PreTrainedConfig, **fields: Any) -> PreTrainedConfig:
        backbone_config.out_features = list(self.config_class.backbone_out_features)
        return self.config_class(backbone_config=backbone_config, **fields)

    def read_config(self, official, known, class_names=()):
        def shape(key: str) -> tuple[int, ...]:
            if key not in official or not official[key].ndim or not official[key].numel():
                raise ConversionError(
                    f"The checkpoint lacks {key!r} (or it is empty, or one number) and is not a complete {self.name}. "
                    "`--backbone-only` converts its backbone."
                )
            return tuple(official[key].shape)

        backbone = infer_config(_Part(official, "backbone."))
        try:
            fields = self.read_fields(shape, official)
            names = label_names(fields.pop("num_labels"), class_names, self.class_names)
            return self.build_config(backbone, **self.fixed_fields, **fields, **label_fields(names))
        except ConversionError:
            raise
        except _NO_MODEL as error:
            raise ConversionError(f"There is no {self.name} with these shapes: {error}") from error

    def from_official(self, official):
        backbone, heads = _split_at(official, "backbone.")
        backbone = rename.remove_base_prefix(rename.from_official(backbone))
        names = rename.rename_keys(heads, self.rules, 0)
        renamed = {self.backbone_prefix + key: tensor for key, tensor in backbone.items()}
        return renamed | {names[key]: tensor for key, tensor in heads.items()}

    def to_official(self, tensors):
        backbone, heads = _split_at(tensors, self.backbone_prefix)
        backbone = rename.to_official(rename.add_base_prefix(backbone))
        names = rename.rename_keys(heads, rename.invert(self.rules), 0)
        official = {f"backbone.{key}": tensor for key, tensor in backbone.items()}
        return official | {names[key]: tensor for key, tensor in heads.items()}

    def read_saved(self, saved_dir, known):
        try:
            config = AutoConfig.from_pretrained(saved_dir)
            if (model_type := config.backbone_config.model_type) not in ("pvt", "pvt_v2"):
                raise ConversionError(
                    f"This {self.name} has a backbone of type {model_type!r}: there are official names on a PVT only."
                )
            # Files have other names than modules where transformers keeps those of its former versions, as for DETR.
            model, loading_info = self.auto_class.from_pretrained(
                saved_dir, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except ConversionError:
            raise
        except (*_NO_MODEL, OSError, SafetensorError) as error:
            raise ConversionError(f"`SAVED_DIR` {saved_dir} does not hold a {self.name}: {error}") from error
        if wrong := {key: sorted(map(str, names)) for key, names in loading_info.items() if names}:
            raise ConversionError(f"`SAVED_DIR` {saved_dir} does not hold a complete {self.name}: {wrong}.")
        return self.to_official(model.state_dict())

    def reference(self, weights, image, config):
        backbone = config.backbone_config
        maps = reference.feature_maps(_Part(weights, "backbone."), image, **reference_options(backbone))
        stages = zip(backbone.stage_names, maps, strict=True)
        return self.head_reference(weights, image, [map_ for stage, map_ in stages if stage in backbone.out_features])

    def image_processor(self, checkpoint, config):
        if (channels := config.backbone_config.num_channels) != 3:
            return None, f"none, for a model that takes {channels} channels"
        return self.build_image_processor(config), "the papers' evaluation"


class Detector(DensePredictor):
    """A detector that was trained on COCO."""

    auto_class = AutoModelForObjectDetection
    pipeline_tag = "object-detection"
    class_names = COCO

    def build_image_processor(self, config):
        return PvtDetectionImageProcessor(num_labels=config.num_labels)


class OneStageDetector(Detector):
    """A detector whose head all levels of the pyramid share."""

    def outputs(self, model, image):
        return list(model.head(model.neck(model.backbone(image).feature_maps)))


def count_matches(names: Iterable[str], pattern: str) -> int:
    """How many values the group of a pattern has in these names: the layers, if it is their number."""
    return len({match[1] for name in names if (match := re.match(pattern, name, flags=re.ASCII))})


def _split_at(tensors: StateDict, prefix: str) -> tuple[StateDict, StateDict]:
    """The tensors below a prefix, by their names without it, and the others."""
    below = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return below, {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}


@dataclass(frozen=True)
class _Part(Mapping):
    """The tensors below a prefix; one is read when it is asked for.

    Attributes:
        weights: Those and others.
        prefix: How their names start there.
    """

    weights: Weights
    prefix: str

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.weights[self.prefix + key]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self.prefix) for key in self.weights if key.startswith(self.prefix))

    def __contains__(self, key: object) -> bool:
        return f"{self.prefix}{key}" in self.weights

    def __len__(self) -> int:
        return sum(1 for _ in self)
