"""The papers' tables of dense prediction: what they say can be built, and has as many parameters."""

import pytest
import torch
from transformers import AutoModelForInstanceSegmentation, AutoModelForObjectDetection, AutoModelForSemanticSegmentation

from pvt_hf import (
    ATSSConfig,
    CascadeMaskRCNNConfig,
    GFLConfig,
    MaskRCNNConfig,
    RetinaNetConfig,
    SemanticFPNConfig,
    SparseRCNNConfig,
    build_config,
)
from pvt_hf.paper_results import PUBLISHED

STAGES = ["stage1", "stage2", "stage3", "stage4"]
ARCHITECTURES = {
    "retinanet_1x": (AutoModelForObjectDetection, RetinaNetConfig, STAGES[1:], 80),
    "atss_3x_ms": (AutoModelForObjectDetection, ATSSConfig, STAGES[1:], 80),
    "gfl_3x_ms": (AutoModelForObjectDetection, GFLConfig, STAGES[1:], 80),
    "mask_rcnn_1x": (AutoModelForInstanceSegmentation, MaskRCNNConfig, STAGES, 80),
    "cascade_mask_rcnn_3x_ms": (AutoModelForInstanceSegmentation, CascadeMaskRCNNConfig, STAGES, 80),
    "sparse_rcnn_3x_ms": (AutoModelForObjectDetection, SparseRCNNConfig, STAGES, 80),
    "semantic_fpn_40k": (AutoModelForSemanticSegmentation, SemanticFPNConfig, STAGES, 150),
}


@pytest.mark.parametrize(("recipe", "variant"), [key for key in PUBLISHED if key[0] in ARCHITECTURES])
def test_parameters_are_the_papers(recipe, variant):
    auto_class, config_class, stages, num_labels = ARCHITECTURES[recipe]
    backbone_config = build_config(variant, out_features=stages)
    with torch.device("meta"):
        model = auto_class.from_config(config_class(backbone_config=backbone_config, num_labels=num_labels))
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert parameters == pytest.approx(PUBLISHED[recipe, variant].params, abs=0.06)
