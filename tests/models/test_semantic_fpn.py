"""Semantic FPN: outputs, gradients and losses against independent evaluations, loading, training, bad input."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    ResNetConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

import pvt_hf
from pvt_hf.conversion import infer_config, reference, reference_heads
from pvt_hf.conversion.architectures.semantic_fpn import SemanticFPN
from pvt_hf.models.modeling_semantic_fpn import semantic_loss
from tests.support.checkpoints import TINY
from tests.support.head_shapes import checkpoint_weights, semantic_fpn
from tests.support.small_models import STAGES, randomize, small_config

BACKBONES = ("v1", "v2", "resnet")
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}


def backbone_config(name: str, **overrides):
    if name == "resnet":
        return ResNetConfig(out_features=STAGES, **RESNET, **overrides)
    return small_config(name, out_features=STAGES, **overrides)


def build(name: str = "v2", std: float = 0.05, **fields):
    """A segmenter of a few thousand parameters, all of them random."""
    fields = {"num_labels": 5, "neck_channels": 16, "head_channels": 8} | fields
    config = pvt_hf.SemanticFPNConfig(**({"backbone_config": backbone_config(name)} | fields))
    model = randomize(AutoModelForSemanticSegmentation.from_config(config), std)
    assert type(model) is pvt_hf.SemanticFPNForSemanticSegmentation
    return model.eval()


def official_pair(version: str):
    """A random checkpoint as released, in float64, and the model that its tensors fill."""
    official = checkpoint_weights(semantic_fpn, TINY[version], std=0.1, num_labels=7, channels=16)
    official = {key: value.double() if value.is_floating_point() else value for key, value in official.items()}
    encoder = {key.removeprefix("backbone."): official[key] for key in official if key.startswith("backbone.")}
    backbone = infer_config.infer_config(encoder)
    backbone.out_features = STAGES
    config = pvt_hf.SemanticFPNConfig(backbone_config=backbone, num_labels=7, neck_channels=16, head_channels=8)
    model = pvt_hf.SemanticFPNForSemanticSegmentation(config).double().eval()
    model.load_state_dict(SemanticFPN().from_official(official))
    return official, encoder, model


def reference_logits(official, encoder, pixels):
    maps = reference.feature_maps(encoder, pixels)
    return reference_heads.semantic_fpn(official, reference_heads.pyramid(official, maps))


@pytest.mark.parametrize("version", TINY)
@torch.no_grad()
def test_logits_equal_the_reference(version):
    official, encoder, model = official_pair(version)
    for size in ((64, 96), (224, 224), (160, 32), (97, 130)):
        pixels = torch.randn(2, 3, *size, dtype=torch.double)
        torch.testing.assert_close(
            model(pixels).logits, reference_logits(official, encoder, pixels), rtol=0, atol=1e-10
        )
    back = SemanticFPN().to_official(model.state_dict())
    assert back.keys() == official.keys() and all(torch.equal(back[key], official[key]) for key in official)


@pytest.mark.parametrize("version", TINY)
def test_gradients_equal_the_reference(version):
    """Of every parameter and of the image, in evaluation mode."""
    official, _, model = official_pair(version)
    official = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in official.items()}
    encoder = {key.removeprefix("backbone."): official[key] for key in official if key.startswith("backbone.")}
    pixels = torch.randn(2, 3, 64, 96, dtype=torch.double, requires_grad=True)
    result, expected = model(pixels).logits, reference_logits(official, encoder, pixels)
    weight = torch.randn_like(result)
    names, parameters = zip(*model.named_parameters(), strict=True)
    actual = torch.autograd.grad((weight * result).sum(), [pixels, *parameters])
    sources = {key: value for key, value in official.items() if value.requires_grad}
    wanted = torch.autograd.grad(
        (weight * expected).sum(), [pixels, *sources.values()], allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(actual[0], wanted[0], rtol=0, atol=1e-10)
    wanted = SemanticFPN().from_official(dict(zip(sources, wanted[1:], strict=True)))
    for name, gradient in zip(names, actual[1:], strict=True):
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-10, msg=name)


def test_training_mode_normalises_by_the_batch_and_drops_complete_channels():
    model = build(classifier_dropout=0.5).double().train()
    head, levels = model.head, [torch.randn(3, 16, 16 // 2**i, 24 // 2**i, dtype=torch.double) for i in range(4)]
    seen = {}
    head.dropout.register_forward_hook(lambda module, inputs, output: seen.update(before=inputs[0], after=output))
    head(levels)
    block = head.scale_heads[0][0]
    mean = block.conv(levels[0]).mean((0, 2, 3))
    torch.testing.assert_close(block.norm.running_mean, 0.1 * mean)
    kept = seen["after"].ne(0).flatten(2).any(-1)
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(seen["after"], seen["before"] * 2 * kept[:, :, None, None])


def slow_loss(logits, labels, ignored, normalization):
    """Pixel by pixel: bilinear weights, log-sum-exp, one sum."""
    batch, classes, height, width = logits.shape
    total, valid = 0.0, 0
    for image, y, x in torch.cartesian_prod(*(torch.arange(n) for n in labels.shape)).tolist():
        label = labels[image, y, x].item()
        if label in ignored:
            continue
        row = min(max((y + 0.5) * height / labels.shape[1] - 0.5, 0), height - 1)
        column = min(max((x + 0.5) * width / labels.shape[2] - 0.5, 0), width - 1)
        scores = [0.0] * classes
        for r, wr in ((int(row), 1 - row % 1), (min(int(row) + 1, height - 1), row % 1)):
            for c, wc in ((int(column), 1 - column % 1), (min(int(column) + 1, width - 1), column % 1)):
                scores = [s + wr * wc * logits[image, k, r, c].item() for k, s in enumerate(scores)]
        total += math.log(sum(math.exp(score) for score in scores)) - scores[label]
        valid += 1
    return total / (labels.numel() if normalization == "all" else max(valid, 1))


@pytest.mark.parametrize("normalization", ["valid", "all"])
@pytest.mark.parametrize("ignore_index", [255, 4])
def test_loss_equals_loops(normalization, ignore_index):
    model = build(loss_normalization=normalization, semantic_loss_ignore_index=ignore_index, std=0.3).double()
    labels = torch.randint(0, 4, (2, 32, 40))
    labels[0, :9], labels[1, :, 30:], labels[1, 0, 0] = ignore_index, -100, 3
    outputs = model(torch.randn(2, 3, 32, 40, dtype=torch.double), labels=labels)
    expected = slow_loss(outputs.logits, labels, {ignore_index, -100}, normalization)
    assert outputs.loss.item() == pytest.approx(expected, abs=1e-12)
    assert outputs.logits.shape == (2, 5, 8, 10)


@pytest.mark.parametrize("normalization", ["valid", "all"])
def test_maps_that_are_ignored_altogether(normalization):
    model = build(loss_normalization=normalization).train()
    for items in ({}, {"num_items_in_batch": torch.tensor(0)}):
        model.zero_grad()
        loss = model(torch.randn(2, 3, 32, 32), labels=torch.full((2, 32, 32), 255 - 355 * len(items)), **items).loss
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_loss_of_half_precision_is_summed_in_float32():
    logits = torch.full((1, 2, 200, 200), 3.0, dtype=torch.half)
    loss = semantic_loss(logits, torch.zeros(1, 800, 800, dtype=torch.uint8))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(math.log(2), abs=1e-6)


class Scenes(torch.utils.data.Dataset):
    """Eight images with maps, every one with another share of ignored pixels."""

    def __init__(self, ignored: int):
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(8, 3, 32, 32, generator=generator)
        self.maps = torch.randint(0, 5, (8, 32, 32), generator=generator)
        for index, labels in enumerate(self.maps):
            labels[: 4 * index] = ignored

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.maps[index]}


def trained(dataset, batch_size: int, steps: int, tmp_path, **fields):
    """The weights after one step of SGD, and the loss that Trainer logged."""
    torch.manual_seed(0)
    model = build(classifier_dropout=0.0, **fields).double()
    for module in model.modules():  # statistics of a part are not those of the batch, whoever accumulates
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode=True: None
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=steps,
        max_steps=1,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=0,
    )
    images = [{**item, "pixel_values": item["pixel_values"].double()} for item in (dataset[i] for i in range(8))]
    trainer = Trainer(model, arguments, train_dataset=images)
    trainer.train()
    return model.state_dict(), trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize(("normalization", "ignored"), [("all", 255), ("valid", -100)])
def test_trainer_accumulates_gradients(normalization, ignored, tmp_path):
    """4 times 2 is once 8. Trainer counts labels that are not -100: see `semantic_loss`."""
    dataset = Scenes(ignored)
    complete, loss = trained(dataset, 8, 1, tmp_path, loss_normalization=normalization)
    parts, loss_of_parts = trained(dataset, 2, 4, tmp_path, loss_normalization=normalization)
    for key, value in complete.items():
        torch.testing.assert_close(parts[key], value, rtol=0, atol=1e-10, msg=key)
    assert loss_of_parts == pytest.approx(loss, rel=1e-4)
    model = build(loss_normalization=normalization, classifier_dropout=0.0)
    assert not torch.equal(complete["head.classifier.weight"], model.head.classifier.weight)


def test_accumulated_loss_has_the_size_of_a_loss():
    """`"valid"` with the ignore index: a mean of the parts' means; the complete batch at once is exact."""
    model, data = build().double(), Scenes(255)
    pixels = data.images.double()
    complete = model(pixels, labels=data.maps).loss
    counted = model(pixels, labels=data.maps, num_items_in_batch=torch.tensor(data.maps.numel())).loss
    torch.testing.assert_close(counted, complete)
    parts = [model(p, labels=m).loss for p, m in zip(pixels.split(4), data.maps.split(4), strict=True)]
    items = data.maps.numel()
    losses = [
        model(p, labels=m, num_items_in_batch=items).loss
        for p, m in zip(pixels.split(4), data.maps.split(4), strict=True)
    ]
    torch.testing.assert_close(sum(losses), sum(parts) / 2)


@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone_trains(name, tmp_path):
    """Forward, backward, save, reload: equal, and every parameter is reached."""
    model = build(name).train()
    pixels, labels = torch.randn(2, 3, 64, 96), torch.randint(0, 5, (2, 64, 96))
    model(pixels, labels=labels).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for key, parameter in model.named_parameters() if "position" not in key)
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and type(loaded.backbone) is type(model.backbone)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    saved = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert saved | {"_name_or_path": ""} == model.config.to_dict()


def test_default_configuration_is_that_of_the_papers():
    """PVT-Tiny + Semantic FPN: 16.98 M parameters with ADE20K's classes."""
    with torch.device("meta"):
        model = AutoModelForSemanticSegmentation.from_config(pvt_hf.SemanticFPNConfig())
    assert isinstance(model.backbone, pvt_hf.PvtBackbone) and model.num_parameters() == 16_981_398
    assert pvt_hf.SemanticFPNConfig(id2label={0: "cat", 1: "dog", 2: "owl"}).num_labels == 3


def test_initialisation_is_mmsegmentations():
    head = pvt_hf.SemanticFPNForSemanticSegmentation(
        pvt_hf.SemanticFPNConfig(backbone_config=backbone_config("v2"), num_labels=150)
    )
    head, neck = head.head, head.neck
    assert head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.1) and not head.classifier.bias.any()
    weight = head.scale_heads[3][1].conv.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.05)
    bound = math.sqrt(6 / (2 * 256 * 9))
    assert bound * 0.99 < neck.output_convs[0].weight.max() <= bound and not neck.output_convs[0].bias.any()


def test_incomplete_checkpoint_is_refused(tmp_path):
    model = build()
    weights = {key: value for key, value in model.state_dict().items() if key != "neck.lateral_convs.2.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(
        ValueError,
        match=r"not a complete checkpoint.*in another shape, 1 tensors \['neck.lateral_convs.2.weight'\]",
    ):
        AutoModelForSemanticSegmentation.from_pretrained(tmp_path)


def test_another_number_of_classes_keeps_all_other_tensors(tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForSemanticSegmentation.from_pretrained(tmp_path, num_labels=3)
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert model(torch.randn(1, 3, 32, 32)).logits.shape == (1, 3, 8, 8) and not model.head.classifier.bias.any()
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        AutoModelForSemanticSegmentation.from_pretrained(tmp_path, head_channels=4, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_pretrained_backbone_fills_every_tensor_of_it(version, tmp_path):
    classifier_class = pvt_hf.PvtForImageClassification if version == "v1" else pvt_hf.PvtV2ForImageClassification
    classifier = randomize(classifier_class(small_config(version)))
    classifier.save_pretrained(tmp_path)
    model = build(version)
    head = model.head.classifier.weight.clone()
    count = pvt_hf.load_pretrained_backbone(model, str(tmp_path))
    weights = classifier.base_model.state_dict()
    assert count == len(model.backbone.state_dict())
    assert all(torch.equal(value, weights[key]) for key, value in model.backbone.state_dict().items())
    assert torch.equal(model.head.classifier.weight, head)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_attention_and_checkpointing_make_no_difference(version):
    model = build(version, classifier_dropout=0.0).double()
    pixels, labels = torch.randn(2, 3, 64, 96, dtype=torch.double), torch.randint(0, 5, (2, 64, 96))

    def gradients():
        model.train().zero_grad()
        model(pixels, labels=labels).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    assert model.backbone.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.backbone.config._attn_implementation == "eager"
    outputs = model.eval()(pixels, output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == 5 and outputs.hidden_states
    for use_reentrant in (None, False, True):
        if use_reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        for actual, wanted in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-10)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.backbone.modules())


def test_synchronised_norms_have_the_same_tensors():
    model = build()
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(build())
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules()) == 7
    assert synchronised.state_dict().keys() == model.state_dict().keys()


def test_tuples_equal_the_outputs():
    model = build(return_dict=False)
    pixels = torch.randn(1, 3, 32, 32)
    loss, logits = model(pixels, labels=torch.zeros(1, 32, 32, dtype=torch.long))
    assert loss.ndim == 0 and logits.shape == (1, 5, 8, 8)


@torch.no_grad()
def test_sliding_window_that_covers_the_image():
    model, pixels = build(), torch.randn(2, 3, 64, 96)
    complete = nn.functional.interpolate(model(pixels).logits, size=(64, 96), mode="bilinear", align_corners=False)
    for window, stride in ((96, 96), ((64, 96), (32, 1)), (500, 300)):
        result = pvt_hf.sliding_window_logits(model, pixels, window, stride)
        torch.testing.assert_close(result, complete, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_sliding_window_equals_loops():
    """Against every window by hand: those at the borders are moved inside, pixels get the mean of their windows."""
    model, pixels = build().double(), torch.randn(1, 3, 80, 110, dtype=torch.double)
    result = pvt_hf.sliding_window_logits(model, pixels, (48, 64), (32, 40))
    total, counts = torch.zeros(1, 5, 80, 110, dtype=torch.double), torch.zeros(80, 110)
    for top in (0, 32):
        for left in (0, 40, 46):
            logits = model(pixels[:, :, top : top + 48, left : left + 64]).logits
            logits = nn.functional.interpolate(logits, size=(48, 64), mode="bilinear", align_corners=False)
            total[:, :, top : top + 48, left : left + 64] += logits
            counts[top : top + 48, left : left + 64] += 1
    assert counts.min() == 1 and counts.max() == 6
    torch.testing.assert_close(result, total / counts, rtol=0, atol=1e-12)


def test_sliding_window_of_wrong_sizes_is_refused():
    model, pixels = build(), torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"`stride` must be positive and at most `window`, got 64 and \(32, 64\)"):
        pvt_hf.sliding_window_logits(model, pixels, (32, 64), 64)
    with pytest.raises(ValueError, match="`stride` must be positive"):
        pvt_hf.sliding_window_logits(model, pixels, 32, 0)
    with pytest.raises(ValueError, match="evaluation mode"):
        pvt_hf.sliding_window_logits(model.train(), pixels, 32, 32)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([7, 300, -1, 255]).repeat(256).view(1, 32, 32), ValueError, r"\[0, 5\).*got \[-1, 7, 300\]"),
        (torch.zeros(1, 16, 16, dtype=torch.long), ValueError, r"height and width \(1, 32, 32\), got \(1, 16, 16\)"),
        (torch.zeros(1, 1, 32, 32, dtype=torch.long), ValueError, r"got \(1, 1, 32, 32\)"),
        (torch.zeros(1, 32, 32), TypeError, "class indices, got torch.float32"),
        ([[0]], TypeError, "class indices, got list"),
    ],
    ids=["values", "size", "channels", "floats", "list"],
)
def test_wrong_labels_are_refused(labels, error, message):
    with pytest.raises(error, match=message):
        build()(torch.randn(1, 3, 32, 32), labels=labels)


def test_wrong_configurations_are_refused():
    with pytest.raises(ValueError, match="4 `out_features`, got"):
        build(backbone_config=small_config("v2", out_features=STAGES[1:]))
    with pytest.raises(Exception, match="loss_normalization"):
        pvt_hf.SemanticFPNConfig(loss_normalization="pixels")
    model = build(num_labels=1)
    with pytest.raises(ValueError, match="at least two classes"):
        model(torch.randn(1, 3, 32, 32), labels=torch.zeros(1, 32, 32, dtype=torch.long))


def test_pipeline_gives_the_maps(tmp_path, logged_errors):
    """The masks of the classes are those of the post-processing."""
    names = {0: "sky", 1: "tree", 2: "road", 3: "car", 4: "sea"}
    model = build(id2label=names, label2id={name: index for index, name in names.items()}, std=0.2)
    model.save_pretrained(tmp_path)
    processor = pvt_hf.PvtSegmentationImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    processor.save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8))
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    (expected,) = processor.post_process_semantic_segmentation(outputs, [(70, 90)])
    segments = pipeline("image-segmentation", model=str(tmp_path))(image)
    assert not logged_errors
    assert {segment["label"] for segment in segments} == {names[label] for label in expected.unique().tolist()}
    for segment in segments:
        mask = np.asarray(segment["mask"]).astype(bool)
        assert (mask == (expected == model.config.label2id[segment["label"]]).numpy()).all()
