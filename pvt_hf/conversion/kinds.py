"""What a checkpoint can become: a classifier, a backbone, or one of the official detectors and the segmenter."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoBackbone,
    AutoModelForImageClassification,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    DetrConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from ..models.configuration_mask_rcnn import MaskRCNNConfig
from ..models.configuration_retinanet import RetinaNetConfig
from ..models.configuration_semantic_fpn import SemanticFPNConfig
from ..models.detr import build_detr_config
from ..models.image_processing_detection import PvtDetectionImageProcessor
from ..models.image_processing_segmentation import PvtSegmentationImageProcessor
from . import reference, reference_heads, rename, systems
from .checkpoint import Checkpoint
from .class_names import ADE20K, COCO
from .image_processor import read_image_processor
from .infer_config import label_fields, label_names, read_config
from .rename import ConversionError, StateDict

Weights = Mapping[str, torch.Tensor]
Outputs = list[torch.Tensor]
Shape = Callable[[str], tuple[int, ...]]  # of a tensor that has to be there


@dataclass(frozen=True)
class Kind(ABC):
    """
    Attributes:
        name: In words; of a system as `rename.system_name` calls it.
        auto_class: The Auto class that builds and loads the model.
        pipeline_tag: The task on the Hub.
    """

    name: str
    auto_class: type
    pipeline_tag: str

    @abstractmethod
    def read_config(self, official: StateDict, checkpoint: Checkpoint) -> PreTrainedConfig:
        """The configuration, from tensors with official names and from what came with them."""

    @abstractmethod
    def from_official(self, official: StateDict, config: PreTrainedConfig) -> StateDict:
        """The tensors with the model's names."""

    @abstractmethod
    def to_official(self, tensors: StateDict, config: PreTrainedConfig) -> StateDict:
        """The inverse of `from_official`."""

    @abstractmethod
    def outputs(self, model: PreTrainedModel, image: torch.Tensor) -> Outputs:
        """What the model says about an image, before anything is decoded."""

    @abstractmethod
    def reference(self, weights: Weights, image: torch.Tensor, config: PreTrainedConfig) -> Outputs:
        """The same by an independent evaluation of tensors with official names."""

    def image_processor(
        self, checkpoint: Checkpoint, config: PreTrainedConfig
    ) -> tuple[BaseImageProcessor | None, str]:
        """The processor, or `None` for a model that takes other than three channels, and where it is from, in words."""
        return read_image_processor(checkpoint, config)


def _reference_options(config: PreTrainedConfig) -> dict[str, Any]:
    image_size = config.image_shape if config.model_type == "pvt" else None
    return {
        "image_size": image_size,
        "heads": config.num_attention_heads,
        "patch_eps": config.patch_layer_norm_eps,
    }


class _Classifier(Kind):
    def read_config(self, official, checkpoint):
        return read_config(official, checkpoint.config)

    def from_official(self, official, config):
        return rename.from_official(official)

    def to_official(self, tensors, config):
        return rename.to_official(tensors)

    def outputs(self, model, image):
        return [model(image).logits]

    def reference(self, weights, image, config):
        return [reference.logits(weights, image, **_reference_options(config))]


class _Backbone(Kind):
    def read_config(self, official, checkpoint):
        config = read_config(official, checkpoint.config)
        config.out_features = config.stage_names
        return config

    def from_official(self, official, config):
        prefix = f"{config.model_type}."
        return {key.removeprefix(prefix): tensor for key, tensor in rename.from_official(official).items()}

    def to_official(self, tensors, config):
        return rename.to_official(rename.with_base_prefix(tensors))

    def outputs(self, model, image):
        return list(model(image).feature_maps)

    def reference(self, weights, image, config):
        return reference.feature_maps(weights, image, **_reference_options(config))


@dataclass(frozen=True)
class _Part(Mapping):
    """The tensors below a prefix; one is read when it is asked for."""

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


@dataclass(frozen=True, kw_only=True)
class System(Kind):
    """A detector or a segmenter on a PVT.

    Attributes:
        model_type, fixed_fields: Of the configuration; together they tell a saved folder's system.
        build_config: Makes the configuration of `backbone_config` and fields.
        read_fields: The fields, from the shapes of the official tensors; `num_labels` among them.
        class_names: What the classes are called if there are as many and the checkpoint does not say.
        out_features: The maps that the heads take from the backbone.
        build_processor: Makes the image processor for a configuration.
        head_outputs: See `Kind.outputs`.
        head_reference: `Kind.reference` from the image and all four maps of the backbone.
    """

    model_type: str
    fixed_fields: Mapping[str, Any] = field(default_factory=dict)
    build_config: Callable[..., PreTrainedConfig]
    read_fields: Callable[[Shape, StateDict], dict[str, Any]]
    class_names: tuple[str, ...]
    out_features: tuple[str, ...]
    build_processor: Callable[[PreTrainedConfig], BaseImageProcessor]
    head_outputs: Callable[[PreTrainedModel, torch.Tensor], Outputs]
    head_reference: Callable[[Weights, torch.Tensor, Outputs], Outputs]

    def read_config(self, official, checkpoint):
        def shape(key: str) -> tuple[int, ...]:
            if key not in official or not official[key].numel():
                raise ConversionError(
                    f"The checkpoint lacks {key!r} (or it is empty) and is not a whole {self.name}. `--backbone-only` "
                    "converts its backbone."
                )
            return tuple(official[key].shape)

        backbone = read_config(_Part(official, "backbone."))
        backbone.out_features = list(self.out_features)
        try:
            fields = self.read_fields(shape, official)
            names = label_names(fields.pop("num_labels"), checkpoint.class_names, self.class_names)
            return self.build_config(backbone_config=backbone, **self.fixed_fields, **fields, **label_fields(names))
        except (ValueError, TypeError, StrictDataclassError) as error:
            if isinstance(error, ConversionError):
                raise
            raise ConversionError(f"There is no {self.name} with these shapes: {error}") from error

    def from_official(self, official, config):
        return systems.from_official(official, self.name, config.backbone_config.model_type)

    def to_official(self, tensors, config):
        return systems.to_official(tensors, self.name, config.backbone_config.model_type)

    def outputs(self, model, image):
        return self.head_outputs(model, image)

    def reference(self, weights, image, config):
        options = _reference_options(config.backbone_config)
        maps = reference.feature_maps(_Part(weights, "backbone."), image, **options)
        return self.head_reference(weights, image, maps)

    def image_processor(self, checkpoint, config):
        if (channels := config.backbone_config.num_channels) != 3:
            return None, f"none, for a model that takes {channels} channels"
        return self.build_processor(config), "the official evaluation"


def _semantic_fpn_fields(shape: Shape, official: StateDict) -> dict[str, Any]:
    num_labels, head_channels, *_ = shape("decode_head.conv_seg.weight")
    return {
        "num_labels": num_labels,
        "head_channels": head_channels,
        "neck_channels": shape("neck.fpn_convs.0.conv.weight")[0],
    }


def _retinanet_fields(shape: Shape, official: StateDict) -> dict[str, Any]:
    num_anchors = shape("bbox_head.retina_reg.weight")[0] // 4
    return {
        "num_labels": shape("bbox_head.retina_cls.weight")[0] // max(num_anchors, 1),
        "neck_channels": shape("neck.fpn_convs.0.conv.weight")[0],
        "num_head_convs": _count(official, r"bbox_head\.cls_convs\.(\d+)\."),
    }


def _mask_rcnn_fields(shape: Shape, official: StateDict) -> dict[str, Any]:
    fields = {
        "num_labels": shape("roi_head.bbox_head.fc_cls.weight")[0] - 1,  # the last is background
        "neck_channels": shape("neck.fpn_convs.0.conv.weight")[0],
        "box_head_size": shape("roi_head.bbox_head.shared_fcs.0.weight")[0],
    }
    if num_mask_convs := _count(official, r"roi_head\.mask_head\.convs\.(\d+)\."):
        fields["num_mask_convs"] = num_mask_convs
    return fields


def _detr_fields(shape: Shape, official: StateDict) -> dict[str, Any]:
    start = "bbox_head.transformer"
    num_queries, d_model = shape("bbox_head.query_embedding.weight")
    return {
        "num_labels": shape("bbox_head.fc_cls.weight")[0] - 1,  # the last is no object
        "num_queries": num_queries,
        "d_model": d_model,
        "encoder_layers": _count(official, rf"{start}\.encoder\.layers\.(\d+)\."),
        "decoder_layers": _count(official, rf"{start}\.decoder\.layers\.(\d+)\."),
        "encoder_ffn_dim": shape(f"{start}.encoder.layers.0.ffns.0.layers.0.0.weight")[0],
        "decoder_ffn_dim": shape(f"{start}.decoder.layers.0.ffns.0.layers.0.0.weight")[0],
    }


def _count(official: StateDict, pattern: str) -> int:
    return len({match[1] for key in official if (match := re.match(pattern, key))})


def _semantic_fpn_outputs(model: PreTrainedModel, image: torch.Tensor) -> Outputs:
    return [model(image).logits]


def _semantic_fpn_reference(weights: Weights, image: torch.Tensor, maps: Outputs) -> Outputs:
    return [reference_heads.semantic_fpn(weights, reference_heads.pyramid(weights, maps))]


def _retinanet_outputs(model: PreTrainedModel, image: torch.Tensor) -> Outputs:
    return list(model.head(model.neck(model.backbone(image).feature_maps)))


def _retinanet_reference(weights: Weights, image: torch.Tensor, maps: Outputs) -> Outputs:
    levels = reference_heads.retinanet(weights, reference_heads.pyramid(weights, maps[1:]))
    return [torch.cat(part, dim=1) for part in zip(*levels, strict=True)]


def _region_features(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise in the place of what box and mask head get of three regions."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, channels, size, size, generator=generator, dtype=torch.double) for size in (7, 14))


def _mask_rcnn_outputs(model: PreTrainedModel, image: torch.Tensor) -> Outputs:
    box_features, mask_features = _region_features(model.config.neck_channels)
    objectness, deltas = model.rpn(model.neck(model.backbone(image).feature_maps))
    logits, class_deltas = model.box_head(box_features)
    masks = [] if model.mask_head is None else [model.mask_head(mask_features)]
    return [objectness, deltas, logits, class_deltas.flatten(1), *masks]


def _mask_rcnn_reference(weights: Weights, image: torch.Tensor, maps: Outputs) -> Outputs:
    levels = reference_heads.pyramid(weights, maps)
    box_features, mask_features = _region_features(levels[0].shape[1])
    proposals = zip(*reference_heads.region_proposals(weights, levels), strict=True)
    objectness, deltas = (torch.cat(part, dim=1) for part in proposals)
    has_masks = "roi_head.mask_head.conv_logits.weight" in weights
    masks = [reference_heads.mask_head(weights, mask_features)] if has_masks else []
    return [objectness[..., 0], deltas, *reference_heads.box_head(weights, box_features), *masks]


def _detr_padding(image: torch.Tensor) -> torch.Tensor:
    """True in the last 32 columns: the mask takes part in the comparison."""
    padding = torch.zeros(len(image), *image.shape[2:], dtype=torch.bool)
    padding[:, :, -32:] = True
    return padding


def _detr_outputs(model: PreTrainedModel, image: torch.Tensor) -> Outputs:
    outputs = model(image, pixel_mask=(~_detr_padding(image)).long())
    return [outputs.logits, outputs.pred_boxes]


def _detr_reference(weights: Weights, image: torch.Tensor, maps: Outputs) -> Outputs:
    logits, boxes = reference_heads.detr(weights, maps[-1], _detr_padding(image))
    return [logits[-1], boxes[-1]]


def _segmentation_processor(config: PreTrainedConfig) -> BaseImageProcessor:
    # ADE20K's maps count from 1, and 0 is what has no class.
    reduces = tuple(config.id2label.values()) == ADE20K
    return PvtSegmentationImageProcessor(num_labels=config.num_labels, do_reduce_labels=reduces)


def _detection_processor(config: PreTrainedConfig) -> BaseImageProcessor:
    return PvtDetectionImageProcessor(num_labels=config.num_labels)


CLASSIFIER = _Classifier("image classifier", AutoModelForImageClassification, "image-classification")
BACKBONE = _Backbone("backbone", AutoBackbone, "image-feature-extraction")
_REGION_BASED = {
    "model_type": MaskRCNNConfig.model_type,
    "build_config": MaskRCNNConfig,
    "read_fields": _mask_rcnn_fields,
    "class_names": COCO,
    "out_features": ("stage1", "stage2", "stage3", "stage4"),
    "build_processor": _detection_processor,
    "head_outputs": _mask_rcnn_outputs,
    "head_reference": _mask_rcnn_reference,
}
SYSTEMS = (
    System(
        name="Semantic FPN",
        model_type=SemanticFPNConfig.model_type,
        auto_class=AutoModelForSemanticSegmentation,
        pipeline_tag="image-segmentation",
        build_config=SemanticFPNConfig,
        read_fields=_semantic_fpn_fields,
        class_names=ADE20K,
        out_features=("stage1", "stage2", "stage3", "stage4"),
        build_processor=_segmentation_processor,
        head_outputs=_semantic_fpn_outputs,
        head_reference=_semantic_fpn_reference,
    ),
    System(
        name="RetinaNet",
        model_type=RetinaNetConfig.model_type,
        auto_class=AutoModelForObjectDetection,
        pipeline_tag="object-detection",
        build_config=RetinaNetConfig,
        read_fields=_retinanet_fields,
        class_names=COCO,
        out_features=("stage2", "stage3", "stage4"),
        build_processor=_detection_processor,
        head_outputs=_retinanet_outputs,
        head_reference=_retinanet_reference,
    ),
    System(
        name="Mask R-CNN",
        auto_class=AutoModelForInstanceSegmentation,
        pipeline_tag="image-segmentation",
        fixed_fields={"use_masks": True},
        **_REGION_BASED,
    ),
    System(
        name="Faster R-CNN",
        auto_class=AutoModelForObjectDetection,
        pipeline_tag="object-detection",
        fixed_fields={"use_masks": False},
        **_REGION_BASED,
    ),
    System(
        name="DETR",
        model_type=DetrConfig.model_type,
        auto_class=AutoModelForObjectDetection,
        pipeline_tag="object-detection",
        build_config=build_detr_config,
        read_fields=_detr_fields,
        class_names=COCO,
        out_features=("stage4",),
        build_processor=_detection_processor,
        head_outputs=_detr_outputs,
        head_reference=_detr_reference,
    ),
)


def kind_of_folder(known: Mapping[str, Any]) -> System | None:
    """The system of a `config.json`, or `None` for that of a classifier or a backbone."""
    for kind in SYSTEMS:
        if known.get("model_type") == kind.model_type and all(
            known.get(key, value) == value for key, value in kind.fixed_fields.items()
        ):
            return kind
    return None


def kind_of_checkpoint(weights: StateDict, source_format: str, backbone_only: bool) -> Kind:
    """What the checkpoint becomes.

    Raises:
        ConversionError: If it is a system that pvt_hf does not have.
    """
    if backbone_only:
        return BACKBONE
    if not source_format.startswith("mm"):
        return CLASSIFIER
    name = rename.system_name(weights)
    for kind in SYSTEMS:
        if kind.name == name:
            return kind
    raise ConversionError(
        f"This is an {source_format} checkpoint of {name}, which pvt_hf does not have. `--backbone-only` converts its "
        "backbone."
    )
