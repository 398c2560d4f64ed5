"""Outputs and gradients in float64 against three independent implementations: the functional reference on released
weights, timm's `pvt_v2_*`, and transformers' own classes (once their LayerNorm epsilons are the released ones)."""

import pytest
import timm
import torch
import transformers
from transformers import AutoBackbone, AutoModelForImageClassification

import pvt_hf
from pvt_hf.conversion import reference, rename
from tests.support.small_models import STAGES, randomize, small_config

TOLERANCE = 1e-10


def encoder_weights(classifier: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a backbone takes from a classifier."""
    unused = ("encoder.layer_norm.", "encoder.patch_embeddings.3.cls_token")
    weights = {key.split(".", 1)[1]: value for key, value in classifier.state_dict().items() if ".encoder." in key}
    return {key: value for key, value in weights.items() if not key.startswith(unused)}


def build(config) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A classifier and a four-map backbone that share random float64 weights."""
    config.out_features = STAGES
    with torch.device("meta"):
        classifier = AutoModelForImageClassification.from_config(config)
        backbone = AutoBackbone.from_config(config)
    classifier = randomize(classifier.to_empty(device="cpu").double())
    backbone.load_state_dict(encoder_weights(classifier), assign=True)
    return classifier.eval(), backbone.eval()


def close(actual, expected) -> bool:
    return torch.allclose(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.process
@torch.no_grad()
@pytest.mark.parametrize("name", pvt_hf.VARIANTS)
def test_every_variant_equals_the_reference(name):
    classifier, backbone = build(pvt_hf.build_config(name))
    official = rename.to_official(classifier.state_dict())
    pixels = torch.randn(1, 3, 32, 64, dtype=torch.double)  # larger ones, and other sizes: see below
    assert close(classifier(pixels).logits, reference.logits(official, pixels))
    for actual, expected in zip(backbone(pixels).feature_maps, reference.feature_maps(official, pixels), strict=True):
        assert close(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["pvt_tiny", "pvt_v2_b0", "pvt_v2_b2_li"])
@pytest.mark.parametrize("size", [(224, 224), (32, 32), (448, 448), (33, 47), (100, 257)], ids=str)
def test_equals_the_reference_at_any_size(name, size):
    classifier, backbone = build(pvt_hf.build_config(name, depths=[1, 1, 1, 1]))
    official = rename.to_official(classifier.state_dict())
    pixels = torch.randn(1, 3, *size, dtype=torch.double)
    assert close(classifier(pixels).logits, reference.logits(official, pixels))
    for actual, expected in zip(backbone(pixels).feature_maps, reference.feature_maps(official, pixels), strict=True):
        assert close(actual, expected)


class RecordedGELU(torch.nn.GELU):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.tokens.append(hidden_states[..., 0].numel())
        return super().forward(hidden_states)


@torch.no_grad()
@pytest.mark.parametrize(("chunk_bytes", "chunk"), [(1, 1), (512 * 8 * 100, 100), (2**30, 2 * 16 * 24)])
def test_chunks_of_tokens_equal_the_reference(chunk_bytes, chunk):
    """Those of v1's MLP: of one token, of some, and one for all of the first stage."""
    classifier, _ = build(pvt_hf.build_config("pvt_tiny", depths=[1, 1, 1, 1]))
    RecordedGELU.tokens = []
    for block in classifier.pvt.encoder.block:
        block[0].mlp.chunk_bytes, block[0].mlp.intermediate_act_fn = chunk_bytes, RecordedGELU()
    pixels = torch.randn(2, 3, 64, 96, dtype=torch.double)
    official = rename.to_official(classifier.state_dict())
    assert close(classifier(pixels).logits, reference.logits(official, pixels))
    assert RecordedGELU.tokens[0] == chunk and sum(RecordedGELU.tokens) == 2 * (384 + 96 + 24 + 7)


@torch.no_grad()
@pytest.mark.parametrize("size", [(96, 160), (64, 64), (160, 96)], ids=str)
def test_position_embeddings_of_an_oblong_image_equal_the_reference(size):
    classifier, _ = build(pvt_hf.build_config("pvt_tiny", image_size=(96, 160)))
    pixels = torch.randn(2, 3, *size, dtype=torch.double)
    official = rename.to_official(classifier.state_dict())
    assert close(classifier(pixels).logits, reference.logits(official, pixels, image_size=(96, 160)))


@pytest.mark.parametrize("name", ["pvt_tiny", "pvt_v2_b0", "pvt_v2_b2_li"])
def test_gradients_equal_the_reference(name):
    """Of every parameter of classifier and backbone, and of the image; recomputed in chunks as the MLPs of a large
    batch are, and as those of a large map that has dropout."""
    classifier, backbone = build(pvt_hf.build_config(name, depths=[1, 2, 1, 1], num_labels=10))
    for module in classifier.modules():
        if hasattr(module, "stored_bytes"):
            module.stored_bytes, module.chunk_bytes = 0, 2**18
    for module in backbone.modules():
        if hasattr(module, "max_stored_tokens"):
            module.max_stored_tokens, module.chunk_bytes = {"cpu": 0}, 2**16
    official = rename.to_official(classifier.state_dict())
    official = {key: value.requires_grad_() for key, value in official.items()}

    pixels = torch.randn(2, 3, 64, 96, dtype=torch.double, requires_grad=True)
    for model, evaluate in ((classifier, reference.logits), (backbone, reference.feature_maps)):
        result, expected = model(pixels), evaluate(official, pixels)
        result, expected = (result.logits, expected) if model is classifier else (result.feature_maps, expected)
        result, expected = (list(x) if isinstance(x, tuple | list) else [x] for x in (result, expected))
        weights = [torch.randn_like(tensor) for tensor in result]
        names, parameters = zip(*model.named_parameters(), strict=True)
        actual = torch.autograd.grad(
            sum((w * x).sum() for w, x in zip(weights, result, strict=True)), [pixels, *parameters]
        )
        loss = sum((w * x).sum() for w, x in zip(weights, expected, strict=True))
        wanted = torch.autograd.grad(loss, [pixels, *official.values()], allow_unused=True, materialize_grads=True)
        assert close(actual[0], wanted[0])
        prefix = "" if model is classifier else f"{classifier.base_model_prefix}."
        wanted = rename.from_official(dict(zip(official, wanted[1:], strict=True)))
        for parameter_name, gradient in zip(names, actual[1:], strict=True):
            assert close(gradient, wanted[prefix + parameter_name]), parameter_name


@pytest.mark.process
@torch.no_grad()
@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2", "pvt_v2_b2_li"])
def test_equals_timm(name):
    classifier, backbone = build(pvt_hf.build_config(name))
    official = rename.to_official(classifier.state_dict())
    pixels = torch.randn(1, 3, 97, 130, dtype=torch.double)
    for model, features_only in ((classifier, False), (backbone, True)):
        peer = timm.create_model(name, features_only=features_only).double().eval()
        source = timm.models.pvt_v2.checkpoint_filter_fn(dict(official), timm.create_model(name))
        if features_only:  # timm flattens `stages.0` to `stages_0` and drops the head
            source = {key.replace("stages.", "stages_", 1): value for key, value in source.items() if "head" not in key}
        peer.load_state_dict(source)
        actual = model(pixels).feature_maps if features_only else [model(pixels).logits]
        expected = peer(pixels) if features_only else [peer(pixels)]
        assert all(close(a, b) for a, b in zip(actual, expected, strict=True))


def native(model_class_name: str, config):
    """transformers' own class with the released epsilons where it has others."""
    config_class = getattr(transformers, type(config).__name__)
    model = getattr(transformers, model_class_name)(config_class(**config.to_diff_dict())).double().eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm) and ("patch_embedding" in name or "attention" in name):
            module.eps = 1e-5
    return model


@torch.no_grad()
@pytest.mark.parametrize("version", ["v1", "v2", "v2_linear"])
def test_equals_transformers(version):
    """Logits, hidden states (shapes and values) and attentions, on the one size that its v1 accepts."""
    config = small_config(version, attn_implementation="eager", image_size=224)
    classifier, _ = build(config)
    name = type(classifier).__name__
    peer = native(name, config)
    peer.load_state_dict(classifier.state_dict())
    pixels = torch.randn(2, 3, 224, 224, dtype=torch.double)
    actual = classifier(pixels, output_hidden_states=True, output_attentions=True)
    expected = peer(pixels, output_hidden_states=True, output_attentions=True)
    assert close(actual.logits, expected.logits)
    assert len(actual.hidden_states) == len(expected.hidden_states)
    assert all(close(a, b) for a, b in zip(actual.hidden_states, expected.hidden_states, strict=True))
    attentions = expected.attentions
    if version != "v1":  # nested, one tuple per stage
        attentions = [attention for stage in attentions for attention in stage]
    assert len(actual.attentions) == len(attentions) == sum(config.depths)
    assert all(close(a, b) for a, b in zip(actual.attentions, attentions, strict=True))
