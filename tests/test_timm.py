"""PVT v1 as timm's models are used: the same numbers as our classes, in timm's forms."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

import pvt_hf
import pvt_hf.timm
from pvt_hf.conversion import rename
from tests.support.small_models import SMALL_V1, STAGES, randomize

SMALL = {key: value for key, value in SMALL_V1.items() if key not in ("num_labels", "image_size")} | {"img_size": 64}


@pytest.fixture
def reference():
    return randomize(pvt_hf.PvtForImageClassification(pvt_hf.PvtConfig(**SMALL_V1))).eval()


@pytest.fixture
def file(reference, tmp_path):
    """A checkpoint of it as it is released."""
    torch.save(rename.to_official(reference.state_dict()), tmp_path / "small.pth")
    return str(tmp_path / "small.pth")


def create(file=None, **arguments):
    """The smallest variant, made smaller, with the weights of a file."""
    source = {"pretrained": True, "pretrained_cfg_overlay": {"file": file, "num_classes": 5}} if file else {}
    return timm.create_model("pvt_tiny", **(SMALL | source | arguments)).eval()


def test_a_classifier_is_ours(reference, file):
    model, pixels = create(file, num_classes=5), torch.randn(2, 3, 64, 96)
    assert torch.equal(model(pixels), reference(pixels).logits)
    tokens = model.forward_features(pixels)
    assert torch.equal(tokens, reference.pvt(pixels).last_hidden_state)
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    assert torch.equal(create(file, num_classes=0, global_pool="avg")(pixels), tokens[:, 1:].mean(dim=1))
    reference.save_pretrained(file.removesuffix(".pth"))  # a folder, as the converter writes it
    assert torch.equal(create(f"{file.removesuffix('.pth')}/model.safetensors", num_classes=5)(pixels), model(pixels))
    final, (feature_map,) = model.forward_intermediates(pixels, indices=1)
    assert torch.equal(final, tokens) and feature_map.shape == (2, 32, 2, 3)


def test_features_are_those_of_the_backbone(reference, file):
    """Without CLS token: with one, the last map is another."""
    backbone = pvt_hf.PvtBackbone(pvt_hf.PvtConfig(**SMALL_V1, out_features=STAGES)).eval()
    tensors = {name.removeprefix("pvt."): value for name, value in reference.state_dict().items()}
    backbone.load_state_dict(tensors, strict=False)  # without the CLS token and what belongs to the classifier
    pixels = torch.randn(1, 3, 64, 96)
    maps = backbone(pixels).feature_maps
    for indices in ((0, 1, 2, 3), (1, -2)):
        model = create(file, features_only=True, out_indices=indices)
        assert all(map(torch.equal, model(pixels), [maps[index] for index in indices]))
        assert len(model.model.pvt.encoder.block) == max(index % 4 for index in indices) + 1
        assert model.feature_info.channels() == [SMALL_V1["hidden_sizes"][index] for index in indices]
        assert model.feature_info.reduction() == [4 * 2 ** (index % 4) for index in indices]


def test_weights_are_adapted_as_timm_does(reference, file):
    """The convolution to other channels, and a new classifier of another size."""
    model = create(file, in_chans=1, num_classes=7)
    weight = reference.pvt.get_input_embeddings().weight
    torch.testing.assert_close(model.pvt.get_input_embeddings().weight, weight.sum(dim=1, keepdim=True))
    assert model(torch.randn(1, 1, 40, 50)).shape == (1, 7)
    model.reset_classifier(2, "avg")
    assert model(torch.randn(1, 1, 40, 50)).shape == (1, 2) and model.get_classifier() is model.classifier


@pytest.mark.parametrize("features_only", [False, True])
def test_a_checkpoint_of_something_else_is_an_error(reference, tmp_path, features_only):
    tensors = reference.state_dict()
    del tensors["pvt.encoder.block.0.0.mlp.dense1.bias"]
    torch.save(tensors | {"pvt.more": torch.zeros(1)}, tmp_path / "small.pth")
    with pytest.raises(rename.ConversionError, match="lacks 'pvt.encoder.block.0.0.mlp.dense1.bias'.*'pvt.more'"):
        create(str(tmp_path / "small.pth"), features_only=features_only)


@pytest.mark.parametrize("arguments", [{"global_pool": "mean"}, {"embed_dims": [8]}])
def test_wrong_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        create(**arguments)


def test_training_interface():
    model = create(num_classes=5, drop_path_rate=0.1).train()
    model.set_grad_checkpointing()
    assert model.pvt.is_gradient_checkpointing
    model(torch.randn(1, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    # By timm's layer-wise decay: the classifier at the full rate, the patch embedding of stage 1 at the lowest, and
    # those of the other stages with the first block behind them.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    scales = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    first = scales["pvt.encoder.patch_embeddings.0.projection.weight"]
    assert scales["classifier.weight"] == 1 and first == min(scales.values()) < max(scales.values()) / 16
    patches, block = "pvt.encoder.patch_embeddings.2.projection.weight", "pvt.encoder.block.2.0.mlp.dense1.weight"
    assert scales[patches] == scales[block]
    decays = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decays["pvt.encoder.patch_embeddings.3.cls_token"] == 0 and decays[block] == 0.05


def test_variants_and_their_released_weights():
    names = ["pvt_large", "pvt_medium", "pvt_small", "pvt_tiny"]
    assert timm.list_models("pvt_*", module="timm") == names
    for name in names:
        settings = timm.get_pretrained_cfg(f"{name}.in1k")
        assert settings.url == pvt_hf.VARIANTS[name].checkpoint_url and settings.crop_pct == 0.875
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in timm.create_model("pvt_large").parameters())
    assert round(parameters / 1e6, 1) == pvt_hf.VARIANTS["pvt_large"].paper_params


def test_segmentation_models_pytorch_takes_it():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("tu-pvt_tiny", encoder_weights=None, classes=3, **SMALL).eval()
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 3, 64, 96)
