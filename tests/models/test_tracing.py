"""What traces, transforms and exports the models: every class, with outputs for other sizes than the traced one."""

import time
import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves
from torchvision.models.feature_extraction import create_feature_extractor

import pvt_hf
from pvt_hf.models.layers import AdaptiveAvgPool2d
from tests.support.small_models import STAGES, randomize, small_config

NAMES = {"v1": "Pvt", "v2": "PvtV2", "v2_linear": "PvtV2"}
EVERY_CLASS = pytest.mark.parametrize(
    ("version", "kind"),
    [(version, kind) for version in NAMES for kind in ("Model", "ForImageClassification", "Backbone")],
)
CLASSIFIERS = pytest.mark.parametrize("version", NAMES)
SIZES = [(1, 64, 64), (3, 130, 65)]
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # vmap over PyTorch's own attention
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:transformers"),
]


def build(version: str, kind: str, **overrides) -> nn.Module:
    config = small_config(version, out_features=STAGES, depths=[1, 1, 1, 1], **overrides)
    return randomize(getattr(pvt_hf, NAMES[version] + kind)(config)).double().eval()


def images(batch: int = 2, height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.double)


def tensors(output) -> list[torch.Tensor]:
    return tree_leaves(output if isinstance(output, dict | tuple) else output.to_tuple())


def assert_same(actual, expected, atol: float = 1e-10) -> None:
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@torch.no_grad()
@EVERY_CLASS
def test_torch_fx_programs_take_any_size(version, kind):
    model = build(version, kind)
    program = torch.fx.symbolic_trace(model)
    for size in SIZES:
        pixels = images(*size)
        assert_same(program(pixels), model(pixels))


@torch.no_grad()
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_torchvision_extracts_features(version):
    """In training mode too, with the same draws."""
    model = build(version, "ForImageClassification", drop_path_rate=0.2, hidden_dropout_prob=0.1)
    name = next(name for name, _ in reversed([*model.named_modules()]) if name.endswith("mlp.dense2"))
    extractor, pixels = create_feature_extractor(model, {name: "tokens", "classifier": "logits"}), images()
    for mode in (True, False):
        model.train(mode), extractor.train(mode)
        torch.manual_seed(0)
        features = extractor(pixels)
        torch.manual_seed(0)
        torch.testing.assert_close(features["logits"], model(pixels).logits, rtol=0, atol=1e-10)
        assert features["tokens"].shape == (2, 6 + (version == "v1"), 32)


@torch.no_grad()
@pytest.mark.parametrize(
    ("version", "kind", "return_dict"),
    [
        ("v1", "Model", True),
        ("v2_linear", "Backbone", False),
        pytest.param("v1", "Backbone", False, marks=pytest.mark.slow),
        pytest.param("v2", "ForImageClassification", True, marks=pytest.mark.slow),
    ],
)
def test_jit_traces_take_any_size(version, kind, return_dict):
    model = build(version, kind)
    model.config.return_dict = return_dict
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pvt_hf")  # nothing of ours became a constant
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        program = torch.jit.trace(model, (images(),), strict=False, check_trace=False)
    for size in SIZES:
        pixels = images(*size)
        assert_same(program(pixels), model(pixels))


@torch.no_grad()
@EVERY_CLASS
def test_vmap_equals_the_batch(version, kind):
    model, pixels = build(version, kind), images()
    mapped = torch.vmap(lambda image: tensors(model(image[None])))(pixels)
    assert_same(tuple(tensor.flatten(0, 1) for tensor in mapped), model(pixels))


@CLASSIFIERS
def test_gradients_of_each_image(version):
    """As differential privacy and influence functions compute them."""
    model, pixels, labels = build(version, "ForImageClassification"), images(), torch.tensor([1, 4])

    def loss(parameters, image, label):
        return torch.func.functional_call(model, parameters, (image[None],), {"labels": label[None]}).loss

    parameters = dict(model.named_parameters())
    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, pixels, labels)
    for index in range(2):
        model.zero_grad()
        model(pixels[index : index + 1], labels=labels[index : index + 1]).loss.backward()
        assert_same(
            {name: gradients[index] for name, gradients in each.items()},
            {name: parameter.grad for name, parameter in parameters.items()},
        )


def test_traced_pooling_has_the_windows_of_pytorch():
    pool = AdaptiveAvgPool2d(7)
    for side in (*range(1, 80), 100, 224, 333):
        expected = nn.functional.adaptive_avg_pool1d(torch.eye(side, dtype=torch.double), 7).T
        torch.testing.assert_close(pool.average_windows(side, expected), expected, rtol=0, atol=1e-15)
    program = torch.fx.symbolic_trace(pool)
    for size in ((32, 33), (7, 50), (5, 9)):
        feature_map = torch.randn(2, 3, *size, dtype=torch.double)
        expected = nn.functional.adaptive_avg_pool2d(feature_map, 7)
        torch.testing.assert_close(program(feature_map), expected, rtol=0, atol=1e-12)


def outputs_of_onnx(path, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"pixel_values": pixels.numpy()})), strict=True))


OUTPUT_NAMES = {
    "Model": ["last_hidden_state", "pooler_output"],
    "ForImageClassification": ["logits"],
    "Backbone": ["feature_map_1", "feature_map_2", "feature_map_3", "feature_map_4"],
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("version", "kind", "dynamo"),
    [
        ("v2_linear", "Backbone", False),
        *(
            pytest.param(version, kind, dynamo, marks=pytest.mark.slow)
            for version, kind, dynamo in [
                ("v1", "Model", False),
                ("v1", "Backbone", True),
                ("v2", "ForImageClassification", True),
                ("v2_linear", "ForImageClassification", True),
                ("v2", "ForImageClassification", False),
            ]
        ),
    ],
)
def test_onnx_programs_have_named_outputs_and_take_any_size(version, kind, dynamo, tmp_path):
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    model, path, names = build(version, kind).float(), str(tmp_path / "model.onnx"), OUTPUT_NAMES[kind]
    sides = {"height": Dim("height", min=64, max=4096), "width": Dim("width", min=64, max=4096)}
    dynamic = (
        {"dynamic_shapes": {"pixel_values": {0: Dim("batch"), 2: sides["height"], 3: sides["width"]}}}
        if dynamo
        else {"dynamic_axes": {"pixel_values": {0: "batch", 2: "height", 3: "width"}}}
    )
    torch.onnx.export(
        model,
        (images(2, 96, 130).float(),),
        path,
        input_names=["pixel_values"],
        output_names=names,
        dynamo=dynamo,
        **dynamic,
    )
    for size in ((1, 64, 64), (3, 97, 200), (2, 256, 320)):
        pixels = images(*size).float()
        outputs = outputs_of_onnx(path, pixels)
        assert list(outputs) == names
        assert_same(outputs, model(pixels), atol=2e-5)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_onnx_of_a_released_variant_with_linear_attention(tmp_path):
    """At full size, traced at a size at which its pooling has other windows than at those where it is run."""
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = pvt_hf.PvtV2ForImageClassification(pvt_hf.build_config("pvt_v2_b2_li")).eval()
    path, start = str(tmp_path / "model.onnx"), time.perf_counter()
    sides = {"height": Dim("height", min=64, max=4096), "width": Dim("width", min=64, max=4096)}
    torch.onnx.export(
        model,
        (images(2, 160, 192).float(),),
        path,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: Dim("batch"), 2: sides["height"], 3: sides["width"]}},
        dynamo=True,
        verbose=False,
    )
    print(f"exported in {time.perf_counter() - start:.0f} s")
    for size in ((2, 160, 192), (1, 256, 320), (3, 64, 64)):
        pixels, start = images(*size).float(), time.perf_counter()
        found, expected = outputs_of_onnx(path, pixels)["logits"], model(pixels).logits
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        print(f"{size}: relative difference {difference:.1e}, {time.perf_counter() - start:.1f} s")
        assert difference < 1e-4
