"""Classifiers, backbones and Semantic FPN on a GPU: the CPU's numbers, precisions, attention kernels, compilers,
memory, and no step that waits."""

import copy
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForImageClassification

from pvt_hf.models.modeling_pvt_v2 import PvtV2ConvFeedForwardNetwork
from tests.support.copies import CountCopies
from tests.support.small_models import (
    build_backbone,
    build_classifier,
    build_segmenter,
    draw_inputs,
    find_loss,
    randomize,
)
from tests.support.waits import forbid_waits

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

VERSIONS = pytest.mark.parametrize("version", ["v1", "v2", "v2_linear"])
BUILDERS = pytest.mark.parametrize("build", [build_classifier, build_backbone, build_segmenter])


def to(inputs: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype = torch.float32) -> dict:
    """Copies on a device; images in this type."""
    return {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in inputs.items()}


def differentiate(model, inputs) -> dict[str, torch.Tensor]:
    """What a model gives, and the gradient of its loss by each parameter, in float64 on the CPU."""
    outputs = model(**inputs)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(find_loss(outputs), parameters)
    results = {"logits": [outputs.logits]} if "logits" in outputs else {"map": outputs.feature_maps}
    found = {f"{key}.{index}": value for key, values in results.items() for index, value in enumerate(values)}
    found |= dict(zip(names, gradients, strict=True))
    return {name: value.detach().double().cpu() for name, value in found.items()}


def select_outputs(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of [`differentiate`] that are no gradients."""
    return {name: value for name, value in values.items() if name.startswith(("logits.", "map."))}


def assert_near(actual, expected, tolerance: float) -> None:
    """Each tensor differs at most by this share of its largest value, or of what is large among those of its kind."""
    assert actual.keys() == expected.keys()
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        allowed = tolerance * max(value.abs().max(), 1e-2 * scale)
        assert (actual[name] - value).abs().max() <= allowed, name


@VERSIONS
@BUILDERS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_results_and_gradients_are_the_cpus(build, version, dtype, tolerance, device):
    model, inputs = randomize(build(version)).double().eval(), draw_inputs(build)
    expected = differentiate(model, to(inputs, "cpu", torch.float64))
    found = differentiate(model.to(device, dtype), to(inputs, device, dtype))
    assert_near(found, expected, tolerance)


@VERSIONS
@BUILDERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near(build, version, dtype, device):
    model, inputs = randomize(build(version)).to(device).eval(), to(draw_inputs(build), device)
    expected = differentiate(model, inputs)
    with torch.autocast(device.type, dtype):
        outputs = model(**inputs)
        assert find_loss(outputs).isfinite()
        found = differentiate(model, inputs)
    assert all(value.isfinite().all() for value in found.values())
    results = [
        {key: values[key] for key in values if key.startswith(("logits", "map"))} for values in (found, expected)
    ]
    assert_near(*results, 0.1)


@VERSIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_near(version, dtype, device):
    model, inputs = randomize(build_classifier(version)).to(device).eval(), to(draw_inputs(build_classifier), device)
    with torch.no_grad():
        expected = model(**inputs).logits
        found = model.to(dtype)(**to(inputs, device, dtype)).logits
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()


@VERSIONS
@pytest.mark.parametrize("kernel", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH", "eager"])
def test_attention_kernels_agree(version, kernel, device):
    """Each can compute every attention of the models, forwards and backwards."""
    if device.type == "cpu" and kernel == "EFFICIENT_ATTENTION":
        pytest.skip("there is none on a CPU")
    model = randomize(build_backbone(version)).to(device).eval()
    inputs = to(draw_inputs(build_backbone), device)
    expected = differentiate(model, inputs)
    model.set_attn_implementation("eager" if kernel == "eager" else "sdpa")
    backend = SDPBackend.MATH if kernel == "eager" else getattr(SDPBackend, kernel)
    with sdpa_kernel([backend]), torch.autocast(device.type, torch.bfloat16):
        found = differentiate(model, inputs)
    assert_near(select_outputs(found), select_outputs(expected), 0.1)
    assert all(value.isfinite().all() for value in found.values())


@VERSIONS
@BUILDERS
def test_step_does_not_wait(build, version, device):
    """Forward pass, loss, backward pass, clipping and optimiser, with all that is random, and checks of labels."""
    fields = {"drop_path_rate": 0.1, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    model = build(version, **({"backbone": fields} if build is build_segmenter else fields)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters())
    batches = [to(draw_inputs(build, height=height), device) for height in (64, 64, 96)]

    def step(inputs):
        find_loss(model(**inputs)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step(batches[0])
    with forbid_waits(device):
        for inputs in batches[1:]:
            step(inputs)


def test_the_test_sees_waits(device):
    if device.type == "cpu":
        pytest.skip("nothing waits for a CPU")
    with forbid_waits(device), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(2, device=device).sum().item()


@pytest.mark.parametrize(
    ("build", "version", "mode", "training"),
    [
        (build_classifier, "v1", "default", True),
        (build_classifier, "v2", "reduce-overhead", True),
        (build_classifier, "v2_linear", "reduce-overhead", False),
        (build_backbone, "v1", "reduce-overhead", False),
        (build_backbone, "v2", "default", True),
        (build_segmenter, "v2", "reduce-overhead", True),
        (build_segmenter, "v2_linear", "default", False),
    ],
)
def test_compiled_equals_eager(build, version, mode, training, device):
    """Of a second batch too, and nothing keeps a CUDA graph from being used."""
    if device.type == "cpu" and mode != "default":
        pytest.skip("CUDA graphs are a GPU's")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    fields = {"depths": [1, 1, 1, 1]}
    model = randomize(build(version, **({"backbone": fields} if build is build_segmenter else fields)))
    model = model.to(device).eval()
    # (transformers' loss writes into the configuration of a model that is not compiled.)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, mode=mode)
    for _ in range(4):  # the first runs warm up and record
        torch.compiler.cudagraph_mark_step_begin()
        inputs = to(draw_inputs(build), device)
        if training:
            assert_near(differentiate(compiled, inputs), differentiate_as(model, inputs), 2e-3)
            continue
        with torch.no_grad():
            found, expected = (run(pixel_values=inputs["pixel_values"]) for run in (compiled, model))
        key = "feature_maps" if build is build_backbone else "logits"
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-3)
    if mode != "default":
        assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def differentiate_as(model, inputs) -> dict[str, torch.Tensor]:
    """[`differentiate`] with the names of a compiled model."""
    return {
        name if name.startswith(("logits.", "map.")) else f"_orig_mod.{name}": value
        for name, value in differentiate(model, inputs).items()
    }


@pytest.mark.parametrize("version", ["v1", "v2_linear"])
def test_compiled_program_takes_any_size(version, device):
    torch.compiler.reset()
    model = randomize(build_classifier(version, depths=[1, 1, 1, 1])).to(device).eval()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((2, 64, 96), (3, 96, 64), (2, 64, 64), (5, 160, 128)):
            inputs = to(draw_inputs(build_classifier, *size), device)
            found, expected = compiled(**inputs), model(**inputs)
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-3)


@VERSIONS
@BUILDERS
def test_channels_last_gives_the_same(build, version, device):
    model, inputs = randomize(build(version)).to(device).eval(), to(draw_inputs(build), device)
    expected = differentiate(model, inputs)
    inputs["pixel_values"] = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
    found = differentiate(model.to(memory_format=torch.channels_last), inputs)
    assert_near(found, expected, 2e-3)


@VERSIONS
def test_blocks_copy_no_maps(version, device):
    """In bf16 with channels-last images and Flash attention; cuDNN's own changes of layout are printed."""
    if device.type == "cpu":
        pytest.skip("a CPU computes in chunks, which are put together")
    model = build_backbone(version, hidden_sizes=[32, 64, 96, 128]).to(device, torch.bfloat16).eval()
    model.to(memory_format=torch.channels_last)
    pixels = torch.randn(4, 3, 224, 224, device=device, dtype=torch.bfloat16)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        model(pixels)
        with CountCopies() as copies:
            feature_maps = model(pixels).feature_maps
        with torch.profiler.profile() as profile:
            model(pixels)
    assert not copies.found
    assert all(feature_map.is_contiguous(memory_format=torch.channels_last) for feature_map in feature_maps)
    names = (event.key for event in profile.key_averages())
    print(version, "kernels named after layouts:", [name for name in names if re.search("nchw|nhwc", name.lower())])


def measure_peak(model, inputs) -> tuple[dict[str, torch.Tensor], int]:
    """What [`differentiate`] gives, and the bytes that it took beside the model."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = differentiate(model, inputs)
    return found, torch.cuda.max_memory_allocated() - before


def test_recomputation_saves_memory(device, monkeypatch):
    """What `max_stored_tokens` and `gradient_checkpointing_enable` are for; the gradients stay."""
    if device.type == "cpu":
        pytest.skip("the memory of a GPU is counted")
    model = randomize(build_backbone("v2", mlp_ratios=[8, 8, 4, 4])).to(device).train()
    inputs = to(draw_inputs(build_backbone, 2, 384, 384), device)
    differentiate(model, inputs)
    expected, stored = measure_peak(model, inputs)
    monkeypatch.setitem(PvtV2ConvFeedForwardNetwork.max_stored_tokens, "cuda", 0)
    found, recomputed = measure_peak(model, inputs)
    assert_near(found, expected, 2e-3)
    monkeypatch.delitem(PvtV2ConvFeedForwardNetwork.max_stored_tokens, "cuda")
    model.gradient_checkpointing_enable()
    found, checkpointed = measure_peak(model, inputs)
    assert_near(found, expected, 2e-3)
    print(f"stored {stored / 2**20:.1f} MiB, MLPs {recomputed / 2**20:.1f}, blocks {checkpointed / 2**20:.1f}")
    assert recomputed < 0.8 * stored and checkpointed < 0.8 * stored


PLACES = {
    "v1": {"pvt.encoder.patch_embeddings": 0, "pvt.encoder.block": "cpu", "pvt.encoder.layer_norm": 0, "classifier": 0},
    "v2": {**{f"pvt_v2.encoder.layers.{index}": (0, "cpu")[index % 2] for index in range(4)}, "classifier": 0},
}


@pytest.mark.parametrize("version", PLACES)
@pytest.mark.parametrize("places", ["auto", "parts"])
def test_device_map(version, places, device, tmp_path):
    """The whole model on the GPU, or parts of it that take turns with those on the CPU."""
    if device.type == "cpu":
        pytest.skip("a model that is spread over devices needs two")
    model = randomize(build_classifier(version)).eval()
    model.save_pretrained(tmp_path)
    spread = AutoModelForImageClassification.from_pretrained(
        tmp_path, device_map="auto" if places == "auto" else PLACES[version]
    ).eval()
    devices = {parameter.device.type for parameter in spread.parameters()}
    assert devices == {"cuda"} if places == "auto" else "cuda" in devices and len(devices) == 2
    pixels = draw_inputs(build_classifier)["pixel_values"]
    with torch.no_grad():
        found, expected = spread(pixels.to(device)).logits, model(pixels).logits
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


@VERSIONS
def test_copies_on_a_gpu_are_models_of_their_own(version, device):
    """`deepcopy`, as the EMA of timm makes one, and `state_dict` back to the CPU."""
    model = randomize(build_classifier(version)).to(device).eval()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.classifier.weight.zero_()
    assert copied.classifier.weight.abs().max() > 0
    loaded = build_classifier(version)
    loaded.load_state_dict(copied.state_dict())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(loaded.parameters(), copied.parameters(), strict=True))
