"""Predictors on a GPU find what they find on the CPU."""

import copy
import dataclasses

import pytest
import torch

from pvt_hf.prediction.loading import load_predictor
from tests.support.predictors import build_predictor, draw_image

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]


@pytest.mark.parametrize(
    "name",
    ["v1", "v2", "v2_linear", "semantic_fpn", "upernet", "retinanet", "atss", "gfl", "sparse_rcnn", "mask_rcnn",
     "cascade_mask_rcnn", "detr"],
)  # fmt: skip
def test_predictions_are_the_cpus(name, device):
    predictor, images = build_predictor(name, threshold=0.05), [draw_image(seed=seed) for seed in range(2)]
    predictor.model.double()
    expected = predictor(images)
    moved = dataclasses.replace(predictor, model=copy.deepcopy(predictor.model).to(device))
    for found, wanted in zip(moved(images), expected, strict=True):
        if hasattr(wanted, "boxes"):
            assert len(found) == len(wanted) > 0
            torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-4, atol=1e-4, check_dtype=False)
            torch.testing.assert_close(found.boxes, wanted.boxes, rtol=1e-3, atol=1e-2, check_dtype=False)
            assert (found.masks is None) == (wanted.masks is None)
            assert wanted.masks is None or (found.masks == wanted.masks).float().mean() > 0.999
        elif hasattr(wanted, "scores"):
            torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-4, atol=1e-5, check_dtype=False)
        else:
            assert (found.labels == wanted.labels).float().mean() > 0.999


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_checkpoint_is_loaded_onto_the_gpu(dtype, device, tmp_path):
    """The default device is the GPU."""
    small = build_predictor("v2")
    small.model.save_pretrained(tmp_path)
    small.image_processor.save_pretrained(tmp_path)
    predictor = load_predictor(str(tmp_path), dtype=dtype, device=None if device.type == "cuda" else device)
    assert predictor.model.device.type == device.type
    (found,), (expected,) = predictor([draw_image()]), small([draw_image()])
    torch.testing.assert_close(found.scores.float(), expected.scores, rtol=0.1, atol=0.02)
