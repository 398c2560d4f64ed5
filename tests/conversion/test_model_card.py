"""The model card of a conversion: true, runnable, and accepted as metadata."""

import hashlib
import re

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from pvt_hf.conversion import convert
from pvt_hf.variants import VARIANTS
from tests.support.checkpoints import TINY, official_weights, save


@pytest.mark.process
@pytest.mark.parametrize("backbone_only", [False, True])
@pytest.mark.parametrize("name", ["pvt_tiny", "pvt_v2_b0"])
def test_model_card_is_true_and_runs(name, backbone_only, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(official_weights(VARIANTS[name], std=0.02), tmp_path / "a.pth")
    done = convert.convert(str(path), tmp_path / "out", backbone_only=backbone_only)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    metadata = card.data.to_dict()
    assert metadata["conversion"]["max_abs_difference_float64"] == done.difference
    assert metadata["conversion"]["source_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "model-index" not in metadata and metadata["library_name"] == "transformers"
    numbers = {"pvt_tiny": "| 75.1 | 13.2 | 1.9 |", "pvt_v2_b0": "| 70.5 | 3.4 | 0.6 |"}[name]
    assert numbers in card.content and "not measured" in card.content
    assert f"title = {{{'Pyramid Vision' if name == 'pvt_tiny' else 'PVT v2: '}" in card.content
    assert "transformers silently loads its own class" in card.content or name == "pvt_tiny" and backbone_only
    assert "{{" not in card.content and "\n\n\n" not in card.content
    Image.new("RGB", (300, 260)).save("image.jpg")
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", card.content, flags=re.DOTALL)
    assert len(blocks) == (1 if backbone_only else 3)
    for block in blocks:
        exec(block, namespace)
    assert [map_.shape[2:] for map_ in namespace["feature_maps"]] == [(64, 80), (32, 40), (16, 20), (8, 10)]
    assert backbone_only or namespace["model"].config.num_labels == 2


def test_card_claims_nothing_for_unknown_weights(tmp_path):
    """No licence, data set or published number is claimed for weights that nobody knows."""
    weights = official_weights(TINY["v2"])
    weights["head.weight"], weights["head.bias"] = torch.randn(3, 64), torch.randn(3)
    convert.convert(str(save(weights, tmp_path / "a.pth")), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert not {"license", "datasets"} & card.data.to_dict().keys()
    assert (
        "paper's" not in card.content and "up to whoever trained them" in card.content and "3 classes" in card.content
    )
