"""Compiled models: one program without graph breaks for every batch and image size, in training and in inference."""

import pytest
import torch

from tests.support.small_models import build_backbone, build_classifier, build_segmenter, draw_inputs, find_loss

# 64 x 64 is what the position embeddings of PVT v1 are stored for.
SIZES = [(2, 64, 96), (3, 96, 64), (5, 128, 160), (2, 64, 64), (4, 131, 77)]


@pytest.mark.slow
@pytest.mark.parametrize("build", [build_classifier, build_backbone, build_segmenter])
@pytest.mark.parametrize("version", ["v1", "v2", "v2_linear"])
@pytest.mark.parametrize("training", [True, False])
def test_one_program_for_all_sizes(build, version, training):
    torch.compiler.reset()
    fields = {"depths": [1, 1, 1, 1], "drop_path_rate": 0.1, "hidden_dropout_prob": 0.1}
    model = build(version, **({"backbone": fields} if build is build_segmenter else fields)).train(training)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.set_grad_enabled(training):
        for size in SIZES:
            inputs = draw_inputs(build, *size)
            if training:
                find_loss(compiled(**inputs)).backward()
            else:
                compiled(pixel_values=inputs["pixel_values"])
