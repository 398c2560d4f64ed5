"""Maps stay channels-last from the images to the feature maps: which copies there are on the way, and why."""

from collections import Counter

import pytest
import torch

from pvt_hf.models import layers
from tests.support.copies import CountCopies
from tests.support.small_models import build_backbone, build_classifier, build_segmenter, draw_inputs

# What is beside the layers themselves, in a forward and a backward pass of images that are channels-last.
OF_POSITIONS = {"slice_backward": 1}  # the gradient of the stored position embeddings, of which one is the CLS token's
EXPECTED = {
    (build_classifier, "v1"): (
        {"cat": 1},  # the CLS token is put before the patches of the last stage
        # The gradient of that token alone, which the classifier reads, is put among those of all tokens; and its
        # position among those of the patches.
        {"select_backward": 1, "slice_backward": 2, "copy_": 1},
    ),
    (build_backbone, "v1"): ({}, OF_POSITIONS),
    (build_segmenter, "v1"): ({}, OF_POSITIONS),
}


def count_copies(build, version, memory_format) -> tuple[Counter, Counter]:
    """Those of a forward and a backward pass in training mode, as a GPU computes (without chunks)."""
    fields = {"depths": [1, 1, 1, 1]}
    model = build(version, **({"backbone": fields} if build is build_segmenter else fields)).train()
    model.to(memory_format=memory_format)
    inputs = draw_inputs(build, 2, 64, 64)
    inputs["pixel_values"] = inputs["pixel_values"].contiguous(memory_format=memory_format)
    with CountCopies() as forward:
        outputs = model(**inputs)
    maps = outputs.feature_maps if build is build_backbone else []
    # (The gradients of maps have their layout.)
    loss = sum((feature_map * torch.randn_like(feature_map)).sum() for feature_map in maps) if maps else outputs.loss
    with CountCopies() as backward:
        loss.backward()
    return forward.found, backward.found


@pytest.mark.parametrize("version", ["v1", "v2", "v2_linear"])
@pytest.mark.parametrize("build", [build_classifier, build_backbone, build_segmenter])
def test_no_block_copies(build, version):
    expected = EXPECTED.get((build, version), ({}, {}))
    assert count_copies(build, version, torch.channels_last) == expected
    images_alone, _ = count_copies(build, version, torch.contiguous_format)
    assert images_alone - Counter(expected[0]) == {"clone": 1}  # into the layout, once for all


def test_the_test_sees_copies(monkeypatch):
    monkeypatch.setattr(
        "pvt_hf.models.modeling_pvt_v2.tokens_to_map", lambda *args: layers.tokens_to_map(*args).contiguous()
    )
    forward, _ = count_copies(build_classifier, "v2", torch.channels_last)
    assert forward["clone"] > 4
