"""The detectors and the segmenter in small, and what is handed to them."""

import torch

import pvt_hf
from tests.support.detectors import backbone_config
from tests.support.small_models import STAGES, randomize

_GROUPS = {"norm_groups": 4}
ONE_STAGE = {
    "retinanet": (pvt_hf.RetinaNetForObjectDetection, pvt_hf.RetinaNetConfig, {}),
    "atss": (pvt_hf.ATSSForObjectDetection, pvt_hf.ATSSConfig, _GROUPS),
    "gfl": (pvt_hf.GFLForObjectDetection, pvt_hf.GFLConfig, _GROUPS),
}
_DETR = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 7}
_DETR |= {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}


def build_dense_model(name: str, backbone: str = "v2", **fields: object) -> torch.nn.Module:
    """In evaluation mode, with three classes and random weights; `name` is an architecture."""
    stages = STAGES[1:] if name in ("detr", *ONE_STAGE) else STAGES
    config = backbone_config(backbone, out_features=stages, **fields)
    if name == "detr":
        model = pvt_hf.build_detr(pvt_hf.build_detr_config(config, num_labels=3, **_DETR))
    elif name in ONE_STAGE:
        sizes = {"neck_channels": 8, "num_head_convs": 1, "num_labels": 3}
        model_class, config_class, more = ONE_STAGE[name]
        model = model_class(config_class(backbone_config=config, **sizes, **more))
    elif name.startswith("cascade"):
        sizes = {"neck_channels": 8, "box_head_size": 16, "num_box_convs": 1, "num_mask_convs": 1, "max_detections": 20}
        sizes |= {"num_candidates": 100, "num_proposals": 60, "num_labels": 3, "use_masks": "mask" in name}
        config = pvt_hf.CascadeMaskRCNNConfig(backbone_config=config, **sizes)
        model = pvt_hf.CascadeMaskRCNNForInstanceSegmentation(config)
    elif name == "sparse_rcnn":
        sizes = {"num_proposals": 12, "num_heads": 2, "num_attention_heads": 2, "dynamic_channels": 4, "ffn_dim": 8}
        config = pvt_hf.SparseRCNNConfig(backbone_config=config, neck_channels=8, num_labels=3, **sizes)
        model = pvt_hf.SparseRCNNForObjectDetection(config)
    elif name == "semantic_fpn":
        config = pvt_hf.SemanticFPNConfig(backbone_config=config, neck_channels=8, head_channels=8, num_labels=3)
        model = pvt_hf.SemanticFPNForSemanticSegmentation(config)
    else:
        config = pvt_hf.MaskRCNNConfig(
            backbone_config=config,
            use_masks=name == "mask_rcnn",
            neck_channels=8,
            box_head_size=16,
            num_mask_convs=1,
            num_candidates=100,
            num_proposals=60,
            max_detections=20,
            num_labels=3,
        )
        model = pvt_hf.MaskRCNNForInstanceSegmentation(config)
    randomize(model, std=0.1)
    if name == "sparse_rcnn":  # learned boxes have a width and a height
        model.proposals.boxes.data.uniform_(0.3, 0.7)
    return model.eval()


def dense_inputs(model: torch.nn.Module, batch_size: int, height: int, width: int) -> dict[str, torch.Tensor]:
    """A batch with padding in its last image, and the mask that says so where the model takes one."""
    pixels = torch.randn(batch_size, 3, height, width)
    if model.config.model_type == "pvt_hf_semantic_fpn":
        return {"pixel_values": pixels}
    mask = torch.ones(batch_size, height, width, dtype=torch.int64)
    for tensor in (pixels, mask):
        tensor[-1, ..., width - 7 :] = 0
    return {"pixel_values": pixels, "pixel_mask": mask}
