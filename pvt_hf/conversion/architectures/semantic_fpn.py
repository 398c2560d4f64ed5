"""Semantic FPN of mmsegmentation 0.13."""

from transformers import AutoModelForSemanticSegmentation

from ...models.configuration_semantic_fpn import SemanticFPNConfig
from ...models.image_processing_segmentation import PvtSegmentationImageProcessor
from .. import reference_heads
from ..class_names import ADE20K
from .base import FPN_RULES, DensePredictor


class SemanticFPN(DensePredictor):
    name = "Semantic FPN"
    auto_class = AutoModelForSemanticSegmentation
    pipeline_tag = "image-segmentation"
    tags = ("semantic-fpn",)
    signature = "decode_head.scale_heads."
    config_class = SemanticFPNConfig
    class_names = ADE20K
    rules = (
        *FPN_RULES,
        # The official sequence alternates blocks and upsampling, which has no tensors: 0, 2, 4.
        ("decode_head.scale_heads.{n}.0.conv.", "head.scale_heads.{n}.0.conv."),
        ("decode_head.scale_heads.{n}.0.bn.", "head.scale_heads.{n}.0.norm."),
        ("decode_head.scale_heads.{n}.2.conv.", "head.scale_heads.{n}.1.conv."),
        ("decode_head.scale_heads.{n}.2.bn.", "head.scale_heads.{n}.1.norm."),
        ("decode_head.scale_heads.{n}.4.conv.", "head.scale_heads.{n}.2.conv."),
        ("decode_head.scale_heads.{n}.4.bn.", "head.scale_heads.{n}.2.norm."),
        ("decode_head.conv_seg.", "head.classifier."),
    )

    def read_fields(self, shape, official):
        num_labels, head_channels, *_ = shape("decode_head.conv_seg.weight")
        return {
            "num_labels": num_labels,
            "head_channels": head_channels,
            "neck_channels": shape("neck.fpn_convs.0.conv.weight")[0],
        }

    def build_image_processor(self, config):
        # ADE20K's maps count from 1, and 0 is what has no class.
        reduces = tuple(config.id2label.values()) == ADE20K
        return PvtSegmentationImageProcessor(num_labels=config.num_labels, do_reduce_labels=reduces)

    def outputs(self, model, image):
        return [model(image).logits]

    def head_reference(self, weights, image, feature_maps):
        return [reference_heads.semantic_fpn(weights, reference_heads.pyramid(weights, feature_maps))]
