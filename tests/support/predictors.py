"""Predictors of every kind of model in small, and an image for them."""

import numpy as np
from PIL import Image
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

import pvt_hf
from pvt_hf.prediction.predictor import Predictor
from tests.support.dense_models import build_dense_model
from tests.support.small_models import STAGES, randomize, small_config


def draw_image(width=90, height=60, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def build_predictor(name, **settings):
    if name in ("v1", "v2", "v2_linear"):
        classes = {"v1": pvt_hf.PvtForImageClassification}.get(name, pvt_hf.PvtV2ForImageClassification)
        model = randomize(classes(small_config(name)))
        return Predictor(model.eval(), pvt_hf.PvtImageProcessor(crop_size=32), **settings)
    if name == "semantic_fpn":
        processor = pvt_hf.PvtSegmentationImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
        return Predictor(build_dense_model(name), processor, **settings)
    if name == "upernet":
        config = UperNetConfig(backbone_config=small_config("v2", out_features=STAGES), hidden_size=8, num_labels=3)
        config.use_auxiliary_head = False
        processor = pvt_hf.PvtSegmentationImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
        return Predictor(randomize(UperNetForSemanticSegmentation(config)).eval(), processor, **settings)
    if name == "mask2former":
        sizes = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "num_attention_heads": 2}
        sizes |= {"encoder_layers": 1, "decoder_layers": 2, "dim_feedforward": 16, "encoder_feedforward_dim": 16}
        config = Mask2FormerConfig(
            backbone_config=small_config("v2", out_features=STAGES), num_queries=6, num_labels=3, **sizes
        )
        model = Mask2FormerForUniversalSegmentation(config).eval()
        return Predictor(model, Mask2FormerImageProcessor(size={"height": 64, "width": 64}), **settings)
    processor = pvt_hf.PvtDetectionImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    return Predictor(build_dense_model(name), processor, **settings)
