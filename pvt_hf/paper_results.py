"""The papers' tables of detection and segmentation: what each recipe gives on each variant."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedResult:
    """A cell of the tables of detection and segmentation in arXiv 2102.12122 (v1) and arXiv 2106.13797 (v2).

    Attributes:
        recipe: The name of the recipe, for example `retinanet_1x`.
        variant: The name of the backbone's variant.
        metrics: In per cent, with the keys of the trainers' metrics: COCO's `AP` of boxes (and `AP50` ...) and
            `mask_AP` of masks, ADE20K's `mIoU`.
        params: Parameters in millions, where the papers state them.
        released_metrics: As `metrics`, what the released code's README states, where it is another number.
    """

    recipe: str
    variant: str
    metrics: dict[str, float]
    params: float | None = None
    released_metrics: dict[str, float] | None = None


_BOXES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
_INSTANCES = ("AP", "AP50", "AP75", "mask_AP", "mask_AP50", "mask_AP75")
_DETECTION: dict[str, dict[str, tuple[float | None, tuple[float, ...]]]] = {
    # Parameters, and six numbers for v1, one for v2 (below for boxes and masks).
    "retinanet_1x": {
        "pvt_tiny": (23.0, (36.7, 56.9, 38.9, 22.6, 38.8, 50.0)),
        "pvt_small": (34.2, (40.4, 61.3, 43.0, 25.0, 42.9, 55.7)),
        "pvt_medium": (53.9, (41.9, 63.1, 44.3, 25.0, 44.9, 57.6)),
        "pvt_large": (71.1, (42.6, 63.7, 45.4, 25.8, 46.0, 58.4)),
        "pvt_v2_b0": (13.0, (37.2,)),
        "pvt_v2_b1": (23.8, (41.2,)),
        "pvt_v2_b2": (35.1, (44.6,)),
        "pvt_v2_b2_li": (32.3, (43.6,)),
        "pvt_v2_b3": (55.0, (45.9,)),
        "pvt_v2_b4": (72.3, (46.1,)),
        "pvt_v2_b5": (91.7, (46.2,)),
    },
    "retinanet_3x_ms": {
        "pvt_tiny": (23.0, (39.4, 59.8, 42.0, 25.5, 42.0, 52.1)),
        "pvt_small": (34.2, (42.2, 62.7, 45.0, 26.2, 45.2, 57.2)),
        "pvt_medium": (53.9, (43.2, 63.8, 46.1, 27.3, 46.3, 58.9)),
        "pvt_large": (71.1, (43.4, 63.6, 46.1, 26.1, 46.0, 59.5)),
    },
    "detr_50ep": {"pvt_small": (None, (34.7, 55.7, 35.4, 12.0, 36.4, 56.7))},
    "sparse_rcnn_3x_ms": {"pvt_v2_b2_li": (104.2, (48.9,)), "pvt_v2_b2": (107.0, (50.1,))},
    "atss_3x_ms": {"pvt_v2_b2_li": (30.2, (48.9,)), "pvt_v2_b2": (33.0, (49.9,))},
    "gfl_3x_ms": {"pvt_v2_b2_li": (30.3, (49.2,)), "pvt_v2_b2": (33.1, (50.2,))},
}
_INSTANCE_SEGMENTATION: dict[str, dict[str, tuple[float | None, tuple[float, ...]]]] = {
    "mask_rcnn_1x": {
        "pvt_tiny": (32.9, (36.7, 59.2, 39.3, 35.1, 56.7, 37.3)),
        "pvt_small": (44.1, (40.4, 62.9, 43.8, 37.8, 60.1, 40.3)),
        "pvt_medium": (63.9, (42.0, 64.4, 45.6, 39.0, 61.6, 42.1)),
        "pvt_large": (81.0, (42.9, 65.0, 46.6, 39.5, 61.9, 42.5)),
        "pvt_v2_b0": (23.5, (38.2, 36.2)),
        "pvt_v2_b1": (33.7, (41.8, 38.8)),
        "pvt_v2_b2": (45.0, (45.3, 41.2)),
        "pvt_v2_b2_li": (42.2, (44.1, 40.5)),
        "pvt_v2_b3": (64.9, (47.0, 42.5)),
        "pvt_v2_b4": (82.2, (47.5, 42.7)),
        "pvt_v2_b5": (101.6, (47.4, 42.5)),
    },
    "mask_rcnn_3x_ms": {
        "pvt_tiny": (32.9, (39.8, 62.2, 43.0, 37.4, 59.3, 39.9)),
        "pvt_small": (44.1, (43.0, 65.3, 46.9, 39.9, 62.5, 42.8)),
        "pvt_medium": (63.9, (44.2, 66.0, 48.2, 40.5, 63.1, 43.5)),
        "pvt_large": (81.0, (44.5, 66.0, 48.3, 40.7, 63.4, 43.7)),
        # Stated by the released code's README only.
        "pvt_v2_b0": (23.5, (41.6, 38.2)),
        "pvt_v2_b2": (45.0, (47.8, 43.1)),
    },
    "cascade_mask_rcnn_3x_ms": {"pvt_v2_b2_li": (80.0, (50.9, 44.0)), "pvt_v2_b2": (82.9, (51.1, 44.4))},
}
# v1: the paper trained longer on fewer GPUs than the released configs, whose results are the last numbers.
_SEMANTIC_FPN = {
    "pvt_tiny": (17.0, 35.7, 36.6),
    "pvt_small": (28.2, 39.8, 41.9),
    "pvt_medium": (48.0, 41.6, 43.5),
    "pvt_large": (65.1, 42.1, 43.5),
    "pvt_v2_b0": (7.6, 37.2, None),
    "pvt_v2_b1": (17.8, 42.5, None),
    "pvt_v2_b2": (29.1, 45.2, None),
    "pvt_v2_b2_li": (26.3, 45.1, None),
    "pvt_v2_b3": (49.0, 47.3, None),
    "pvt_v2_b4": (66.3, 47.9, None),
    "pvt_v2_b5": (85.7, 48.7, None),
}


def _results() -> list[PublishedResult]:
    results = []
    for recipe, rows in (_DETECTION | _INSTANCE_SEGMENTATION).items():
        names = _INSTANCES if recipe in _INSTANCE_SEGMENTATION else _BOXES
        for variant, (params, values) in rows.items():
            keys = ("AP", "mask_AP") if len(values) == 2 else names[: len(values)]
            results.append(PublishedResult(recipe, variant, dict(zip(keys, values, strict=True)), params))
    for variant, (params, paper, released) in _SEMANTIC_FPN.items():
        stated = {"mIoU": released} if released else None
        results.append(PublishedResult("semantic_fpn_40k", variant, {"mIoU": paper}, params, stated))
    return results


PUBLISHED: dict[tuple[str, str], PublishedResult] = {(result.recipe, result.variant): result for result in _results()}

# Rows of the papers that no recipe stands for: neither a checkpoint nor a configuration says what exactly was trained.
UNRELEASED = {"PVT-Small + Trans2Seg": "v1, section 5.4; ADE20K mIoU 42.6, 32.1 M parameters, 31.6 GFLOPs"}
