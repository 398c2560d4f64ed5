"""Sparse R-CNN of mmdetection 2.13."""

import torch

from ...models.configuration_sparse_rcnn import SparseRCNNConfig
from .. import reference_heads
from .base import FPN_RULES, Detector, count_matches

_OFFICIAL, _OURS = "roi_head.bbox_head.{n}", "heads.{n}"
# (official, pvt_hf) of the parts of each head.
_HEAD_RULES = (
    ("attention.attn.", "attention."),
    ("attention_norm.", "attention_norm."),
    ("instance_interactive_conv.dynamic_layer.", "dynamic_conv.dynamic_layer."),
    ("instance_interactive_conv.norm_in.", "dynamic_conv.norm_in."),
    ("instance_interactive_conv.norm_out.", "dynamic_conv.norm_out."),
    ("instance_interactive_conv.fc_layer.", "dynamic_conv.output_layer."),
    ("instance_interactive_conv.fc_norm.", "dynamic_conv.output_norm."),
    ("instance_interactive_conv_norm.", "dynamic_conv_norm."),
    ("ffn.layers.0.0.", "fc1."),
    ("ffn.layers.1.", "fc2."),
    ("ffn_norm.", "ffn_norm."),
    ("cls_fcs.", "class_layers."),
    ("reg_fcs.", "box_layers."),
    ("fc_cls.", "class_predictor."),
    ("fc_reg.", "box_predictor."),
)


class SparseRCNN(Detector):
    name = "Sparse R-CNN"
    tags = ("sparse-r-cnn",)
    signature = "rpn_head.init_proposal_bboxes."
    config_class = SparseRCNNConfig
    rules = (
        *FPN_RULES,
        ("rpn_head.init_proposal_bboxes.weight", "proposals.boxes"),
        ("rpn_head.init_proposal_features.weight", "proposals.features"),
        *((f"{_OFFICIAL}.{official}", f"{_OURS}.{ours}") for official, ours in _HEAD_RULES),
    )

    def read_fields(self, shape, official):
        head = "roi_head.bbox_head.0"
        return {
            "num_labels": shape(f"{head}.fc_cls.weight")[0],
            "neck_channels": shape("neck.fpn_convs.0.conv.weight")[0],
            "num_proposals": shape("rpn_head.init_proposal_features.weight")[0],
            "num_heads": count_matches(official, r"roi_head\.bbox_head\.(\d+)\."),
            "dynamic_channels": shape(f"{head}.instance_interactive_conv.norm_in.weight")[0],
            "ffn_dim": shape(f"{head}.ffn.layers.0.0.weight")[0],
            # Each is a linear layer, its norm and a ReLU without tensors.
            "num_class_layers": count_matches(official, r"roi_head\.bbox_head\.0\.cls_fcs\.(\d+)\.") // 2,
            "num_box_layers": count_matches(official, r"roi_head\.bbox_head\.0\.reg_fcs\.(\d+)\.") // 2,
        }

    def outputs(self, model, image):
        outputs = model(image)
        return [outputs.logits, outputs.pred_boxes]

    def head_reference(self, weights, image, feature_maps):
        height, width = image.shape[2:]
        levels = reference_heads.pyramid(weights, feature_maps)
        logits, boxes = reference_heads.sparse_rcnn(weights, levels, [(height, width)] * len(image))[-1]
        x0, y0, x1, y1 = (boxes / boxes.new_tensor([width, height] * 2)).unbind(-1)
        return [logits, torch.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), dim=-1)]
