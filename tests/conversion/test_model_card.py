"""The model card of a conversion: true, runnable, and accepted as metadata."""

import ast
import hashlib
import re

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from pvt_hf.conversion import convert, formats, model_card
from pvt_hf.conversion.architectures import registry
from pvt_hf.variants import VARIANTS
from tests.support.checkpoints import TINY, official_weights, save
from tests.support.small_models import small_config


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


def test_names_in_a_card_are_text_and_nothing_else():
    """A card and its programs, whatever the names of checkpoint and folder: the program names the folder that it is."""
    names = "```\n</script> \"'\\ \U0001f600 \u202e\x1b", "<b>`x` ``|--\n---\nlicense: mit\n\x07.pth"
    config = small_config("v2")
    conversion = model_card.Conversion(
        source=names[1], sha256="0" * 64, source_format=formats.FORMATS[0], architecture=registry.CLASSIFIER,
        config=config, variant=None, model_class="", dtype="float32", tensors=1, parameters=1, difference=0.0,
        has_image_processor=True, has_code=False,
    )  # fmt: skip
    card = ModelCard(str(model_card.render(conversion, names[0])))
    shown = r"<b>`x` ``|--\n---\nlicense: mit\n\x07.pth"
    assert card.data.to_dict()["conversion"]["source"] == shown and "license" not in card.data.to_dict()
    assert card.content.replace("\n", "").isprintable()
    tokens = MarkdownIt("commonmark", {"html": True}).parse(card.text)
    codes = [child.content for token in tokens for child in token.children or [] if child.type == "code_inline"]
    assert shown in codes and not [token for token in tokens if token.type == "html_block"]
    programs = [ast.parse(token.content) for token in tokens if token.info == "python"]
    strings = [node.value for program in programs for node in ast.walk(program) if isinstance(node, ast.Constant)]
    assert len(programs) == 3 and strings.count(names[0]) == 3


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
