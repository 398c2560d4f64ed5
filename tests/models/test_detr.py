"""PVT + DETR: mmdetection's network, loss, weights and detections, on transformers' own class."""

import ast
import copy
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    ResNetConfig,
    Trainer,
    TrainingArguments,
)

import pvt_hf
from pvt_hf.conversion import reference, reference_heads, rename
from pvt_hf.conversion.architectures.detr import Detr
from pvt_hf.models.backbone import load_pretrained_backbone
from tests.support.checkpoints import equal
from tests.support.processes import call_in_two_processes
from tests.support.small_models import ROOT, randomize, small_config

SMALL = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "num_queries": 6,
    "num_labels": 4,
}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
VERSIONS = pytest.mark.parametrize("version", ["v1", "v2", "v2_linear"])
SIZES = ((64, 70), (96, 60))  # (height, width) of the images, padded to (96, 96): some cells of 32 are half padding


def small_detr(version: str = "v1", **overrides) -> DetrForObjectDetection:
    config = pvt_hf.build_detr_config(small_config(version), **(SMALL | overrides))
    return randomize(pvt_hf.build_detr(config), std=0.2)


def padded_batch(dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Two images of different size: noise where they are, zeros on the padding."""
    pixels, mask = torch.zeros(2, 3, 96, 96, dtype=dtype), torch.zeros(2, 96, 96, dtype=torch.long)
    for index, (height, width) in enumerate(SIZES):
        pixels[index, :, :height, :width] = torch.randn(3, height, width, dtype=dtype)
        mask[index, :height, :width] = 1
    return {"pixel_values": pixels, "pixel_mask": mask}


def random_labels(*counts: int, num_labels: int = 4) -> list[dict[str, torch.Tensor]]:
    return [
        {
            "class_labels": torch.randint(num_labels, (count,)),
            "boxes": torch.cat((0.3 + 0.4 * torch.rand(count, 2), 0.1 + 0.4 * torch.rand(count, 2)), 1),
        }
        for count in counts
    ]


def official_weights(model: DetrForObjectDetection) -> dict[str, torch.Tensor]:
    return Detr().to_official(model.state_dict())


def reference_detr(weights, pixel_values, pixel_mask, config) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and boxes of all layers."""
    backbone = {key.removeprefix("backbone."): weights[key] for key in weights if key.startswith("backbone.")}
    heads, size = config.num_attention_heads, getattr(config, "image_size", None)
    feature_map = reference.feature_maps(backbone, pixel_values, size and (size, size), heads)[-1]
    return reference_heads.detr(weights, feature_map, pixel_mask == 0)


def assert_close(actual, expected, tolerance=1e-8):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# The network


@VERSIONS
def test_equals_the_reference(version):
    """A batch of two sizes, all decoder layers, and gradients."""
    model = small_detr(version).double().eval()
    batch = padded_batch()
    weights = {key: tensor.clone().requires_grad_() for key, tensor in official_weights(model).items()}
    logits, boxes = reference_detr(weights, **batch, config=model.config.backbone_config)
    outputs = model(**batch, output_hidden_states=True)
    assert_close(outputs.logits, logits[-1])
    assert_close(outputs.pred_boxes, boxes[-1])
    assert outputs.logits.std() > 0.1 and outputs.pred_boxes.std() > 0.01
    for layer, state in enumerate(outputs.decoder_hidden_states[1:-1]):
        state = model.model.decoder.layernorm(state)
        assert_close(model.class_labels_classifier(state), logits[layer])
        assert_close(model.bbox_predictor(state).sigmoid(), boxes[layer])

    (outputs.logits.square().sum() + outputs.pred_boxes.square().sum()).backward()
    (logits[-1].square().sum() + boxes[-1].square().sum()).backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    expected = {key: torch.zeros_like(t) if t.grad is None else t.grad for key, t in weights.items()}
    actual = Detr().to_official(gradients)
    assert actual.keys() == expected.keys()
    for key in actual:
        assert_close(actual[key], expected[key])


def test_padding_of_one_image_is_masked_as_in_the_reference():
    """Padding to the next multiple of 32 leaves part of the image in every cell, padding beyond it does not."""
    model = small_detr().double().eval()
    for height, width, is_masked in ((70, 96, False), (60, 96, True)):
        pixels, mask = torch.zeros(1, 3, 96, 96, dtype=torch.float64), torch.zeros(1, 96, 96, dtype=torch.long)
        pixels[..., :height, :width] = torch.randn(1, 3, height, width, dtype=torch.float64)
        mask[:, :height, :width] = 1
        logits, boxes = reference_detr(official_weights(model), pixels, mask, model.config.backbone_config)
        outputs = model(pixels, pixel_mask=mask)
        assert_close(outputs.logits, logits[-1])
        assert_close(outputs.pred_boxes, boxes[-1])
        assert ((model(pixels).logits - logits[-1]).abs().max() > 1e-6) == is_masked


def test_released_pvt_small_equals_the_reference():
    """The released names and shapes, converted, and the reference's outputs in float64."""
    rows = [line.split("\t") for line in (ROOT / "tests/keys/det_detr_pvt_s.tsv").read_text().splitlines()]
    official = {
        key: torch.empty(ast.literal_eval(shape)).normal_(std=0.03).add_(key.endswith("norm.weight") or "norms" in key)
        for key, shape in rows
    }
    assert Detr().recognizes(official) and len(official) == 489
    model = DetrForObjectDetection(pvt_hf.build_detr_config(pvt_hf.build_config("pvt_small")))
    converted = Detr().from_official(official)
    model.load_state_dict(converted)  # strict
    assert equal(Detr().to_official(model.state_dict()), official)
    assert sum(tensor.numel() for tensor in official.values()) == 41_645_141

    model.double().eval()
    batch = padded_batch()
    official = {key: tensor.double() for key, tensor in official.items()}
    with torch.no_grad():
        backbone = {key.removeprefix("backbone."): value for key, value in official.items()}
        feature_map = reference.feature_maps(backbone, batch["pixel_values"])[-1]
        logits, boxes = reference_heads.detr(official, feature_map, batch["pixel_mask"] == 0)
        outputs = model(**batch)
    assert outputs.logits.shape == (2, 100, 81)
    assert_close(outputs.logits, logits[-1])
    assert_close(outputs.pred_boxes, boxes[-1])


def test_former_names_are_converted():
    """mmdetection before 2.13 called the same tensors otherwise."""
    model = small_detr()
    official = official_weights(model)
    former = {}
    for key, tensor in official.items():
        if key.startswith("bbox_head.transformer."):
            for old, new in (("self_attn", "attentions.0"), ("multihead_attn", "attentions.1"), ("ffn", "ffns.0")):
                key = key.replace(f".{new}.", f".{old}.")
            key = key.replace(".post_norm.", ".norm.")
        former[key] = tensor
    assert len(former.keys() - official.keys()) == 2 * 8 + 3 * 12 + 2
    assert equal(Detr().from_official(former), dict(model.state_dict()))


def test_conversion_names_what_is_wrong():
    official = official_weights(small_detr())
    name = "bbox_head.transformer.encoder.layers.0.attentions.0.attn.in_proj_weight"
    with pytest.raises(rename.ConversionError, match=r"in_proj_weight.*\(95, 32\)"):
        Detr().from_official(official | {name: official[name][:-1]})
    ours = Detr().from_official(official)
    del ours["model.encoder.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(rename.ConversionError, match="has no .*k_proj.weight"):
        Detr().to_official(ours)
    with pytest.raises(rename.ConversionError, match="other"):
        Detr().from_official(official | {"bbox_head.other.weight": torch.zeros(1)})


# Configuration and initialisation


def test_configuration_is_that_of_the_papers():
    config = pvt_hf.build_detr_config(pvt_hf.build_config("pvt_small", drop_path_rate=0.1))
    assert (config.num_labels, config.num_queries, config.d_model) == (80, 100, 256)
    assert (config.encoder_layers, config.decoder_layers, config.encoder_ffn_dim) == (6, 6, 2048)
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.1, 0.1, 0.1)
    assert (config.class_cost, config.bbox_cost, config.giou_cost, config.eos_coefficient) == (1, 5, 2, 0.1)
    assert not config.auxiliary_loss
    assert config.backbone_config.out_features == ["stage4"] and config.backbone_config.drop_path_rate == 0.1


def test_any_backbone_with_stages_has_a_configuration():
    config = pvt_hf.build_config("pvt_v2_b0", num_channels=1)
    built = pvt_hf.build_detr_config(config, id2label={0: "a", 1: "b"}, num_queries=5)
    assert (built.num_labels, built.num_queries, built.num_channels) == (2, 5, 1)
    assert config.out_features == ["stage4"] and config is not built.backbone_config
    four = pvt_hf.build_detr_config(small_config("v1", out_features=["stage1", "stage2"]))
    assert four.backbone_config.out_features == ["stage4"]
    resnet = ResNetConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], embedding_size=8, layer_type="basic")
    outputs = pvt_hf.build_detr(pvt_hf.build_detr_config(resnet, **SMALL))(torch.randn(1, 3, 64, 64))
    assert outputs.logits.shape == (1, 6, 5)
    assert pvt_hf.build_detr_config({"model_type": "pvt"}).backbone_config.hidden_sizes[-1] == 512


def test_wrong_configurations_are_refused():
    with pytest.raises(ValueError, match="no field 'num_querys'. Nearest: num_queries"):
        pvt_hf.build_detr_config(small_config("v1"), num_querys=5)
    with pytest.raises(ValueError, match="backbone with stages"):
        pvt_hf.build_detr_config(DetrConfig(backbone_config=small_config("v1")))
    with pytest.raises(ValueError, match="`auxiliary_loss` must be False"):
        pvt_hf.build_detr_config(small_config("v1"), auxiliary_loss=True)
    config = pvt_hf.build_detr_config(small_config("v1"), **SMALL)
    config.auxiliary_loss = True
    for build in (pvt_hf.build_detr, lambda config: pvt_hf.prepare_detr_training(DetrForObjectDetection(config))):
        with pytest.raises(ValueError, match="`auxiliary_loss` must be False"):
            build(config)
    with pytest.raises(TypeError, match="must be a DetrForObjectDetection, got a Linear"):
        pvt_hf.prepare_detr_training(torch.nn.Linear(1, 1))


def test_initialisation_has_the_statistics_of_mmdetections():
    """Bounds of uniform distributions, of matrices as the released module holds them."""
    size, width = 64, 96
    model = pvt_hf.build_detr(
        pvt_hf.build_detr_config(
            small_config("v1"), **(SMALL | {"d_model": size, "encoder_ffn_dim": width, "num_queries": 50})
        )
    )
    official = official_weights(model)
    start = "bbox_head.transformer"

    def largest(name: str) -> float:
        return official[name].abs().max().item()

    for name, fan in (
        (f"{start}.encoder.layers.1.attentions.0.attn.in_proj_weight", size + 3 * size),
        (f"{start}.encoder.layers.1.attentions.0.attn.out_proj.weight", size + size),
        (f"{start}.decoder.layers.2.attentions.1.attn.in_proj_weight", size + 3 * size),
        (f"{start}.encoder.layers.0.ffns.0.layers.0.0.weight", size + width),
        (f"{start}.encoder.layers.0.ffns.0.layers.1.weight", size + width),
    ):
        assert 0.97 * math.sqrt(6 / fan) < largest(name) <= math.sqrt(6 / fan)
    for name in official:
        if name.startswith(f"{start}.") and name.endswith("bias"):
            assert largest(name) == 0
    for name, fan in (("fc_cls", size), ("reg_ffn.layers.0.0", size), ("fc_reg", size), ("input_proj", 32)):
        assert 0.9 / math.sqrt(fan) < largest(f"bbox_head.{name}.weight") <= 1 / math.sqrt(fan)
        assert 0 < largest(f"bbox_head.{name}.bias") <= 1 / math.sqrt(fan)
    assert official["bbox_head.query_embedding.weight"].std().item() == pytest.approx(1, abs=0.05)
    kernel = official["backbone.patch_embed4.proj.weight"]
    assert 0.97 < kernel.abs().max().item() * math.sqrt(kernel[0].numel()) <= 1  # PVT's own, not DETR's N(0, 0.02)


# The loss


def giou(a, b):
    """Of two (cx, cy, w, h) boxes, by hand."""
    ax0, ay0, ax1, ay1 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx0, by0, bx1, by1 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    width, height = torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0), torch.minimum(ay1, by1) - torch.maximum(ay0, by0)
    overlap = width.clamp(min=0) * height.clamp(min=0)
    union = a[2] * a[3] + b[2] * b[3] - overlap
    hull = (torch.maximum(ax1, bx1) - torch.minimum(ax0, bx0)) * (torch.maximum(ay1, by1) - torch.minimum(ay0, by0))
    return overlap / union - (hull - union) / hull


def slow_losses(logits, boxes, labels, num_boxes) -> dict[str, torch.Tensor]:
    """One layer: every way to give the objects of an image different queries is tried."""
    num_labels = logits.shape[-1] - 1
    cross_entropy = l1 = overlap = weight = torch.zeros((), dtype=logits.dtype)
    for logit, box, label in zip(logits, boxes, labels, strict=True):
        objects = list(zip(label["class_labels"].tolist(), label["boxes"].to(box), strict=True))

        def cost(query, index, logit=logit, box=box, objects=objects):
            name, wanted = objects[index]
            distance = (box[query] - wanted).abs().sum()
            return -logit[query].softmax(-1)[name] + 5 * distance - 2 * giou(box[query], wanted)

        costs = [[cost(query, index).item() for index in range(len(objects))] for query in range(len(box))]
        best = min(
            itertools.permutations(range(len(box)), len(objects)),
            key=lambda queries: sum(costs[query][index] for index, query in enumerate(queries)),
        )
        for query in range(len(box)):
            target, scale = (objects[best.index(query)][0], 1.0) if query in best else (num_labels, 0.1)
            cross_entropy = cross_entropy - scale * logit[query].log_softmax(-1)[target]
            weight = weight + scale
        for (_, wanted), query in zip(objects, best, strict=True):
            l1 = l1 + (box[query] - wanted).abs().sum()
            overlap = overlap + 1 - giou(box[query], wanted)
    return {
        "loss_ce": cross_entropy / max(weight.item(), 1),
        "loss_bbox": l1 / num_boxes,
        "loss_giou": overlap / num_boxes,
    }


def slow_total(weights, batch, labels, config, num_boxes=None) -> torch.Tensor:
    """Of all layers, from released weights."""
    logits, boxes = reference_detr(weights, batch["pixel_values"], batch["pixel_mask"], config)
    num_boxes = num_boxes or max(sum(len(label["boxes"]) for label in labels), 1)
    layers = [slow_losses(*layer, labels, num_boxes) for layer in zip(logits, boxes, strict=True)]
    return sum(layer["loss_ce"] + 5 * layer["loss_bbox"] + 2 * layer["loss_giou"] for layer in layers), layers


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0), (1, 0)])
def test_loss_and_gradients_equal_those_of_loops(counts):
    model = small_detr(**NO_DROPOUT).double().train()
    batch, labels = padded_batch(), random_labels(*counts)
    weights = {key: tensor.clone().requires_grad_() for key, tensor in official_weights(model).items()}
    expected, layers = slow_total(weights, batch, labels, model.config.backbone_config)
    outputs = model(**batch, labels=labels)
    assert_close(outputs.loss, expected)
    for ending, layer in zip(("_0", "_1", ""), layers, strict=True):
        for name, value in layer.items():
            assert_close(outputs.loss_dict.pop(name + ending), value)
    assert not outputs.loss_dict

    outputs.loss.backward()
    expected.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    actual = Detr().to_official(gradients)
    for key, tensor in weights.items():
        assert_close(actual[key], torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)


def test_loss_with_fewer_queries_than_objects():
    """The divisor of the cross-entropy is at least 1: two queries without object weigh 0.2. More objects than queries
    leave some unmatched, and the matched ones are counted."""
    model = small_detr(**NO_DROPOUT, num_queries=2).double().train()
    batch = {key: tensor[:1] for key, tensor in padded_batch().items()}
    weights = official_weights(model)
    expected, _ = slow_total(weights, batch, random_labels(0), model.config.backbone_config)
    assert_close(model(**batch, labels=random_labels(0)).loss, expected)
    many = random_labels(5)
    pairs = [{key: value[list(pair)] for key, value in many[0].items()} for pair in itertools.combinations(range(5), 2)]
    loss_dict = model(**batch, labels=many).loss_dict
    candidates = [slow_total(weights, batch, [pair], model.config.backbone_config)[1] for pair in pairs]
    for layer, ending in enumerate(("_0", "_1", "")):
        actual = torch.stack([loss_dict[f"{name}{ending}"] for name in ("loss_ce", "loss_bbox", "loss_giou")])
        expected = [torch.stack(list(layers[layer].values())) for layers in candidates]
        assert any(torch.allclose(actual, terms, rtol=1e-8) for terms in expected)


def test_last_layer_has_the_loss_of_transformers():
    """transformers' own loss is the same for the last layer, in one process."""
    model = small_detr(**NO_DROPOUT).train()
    batch, labels = padded_batch(torch.float32), random_labels(3, 2)
    plain = DetrForObjectDetection(model.config)
    plain.load_state_dict(model.state_dict())
    expected = plain.train()(**batch, labels=labels).loss_dict
    actual = model(**batch, labels=labels).loss_dict
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        assert_close(actual[name], expected[name], 1e-5)


def test_prepared_model_returns_what_it_returned_before():
    """Preparing changes no prediction, and hidden states come only when they are asked for."""
    model = small_detr().eval()
    plain = DetrForObjectDetection(model.config).eval()
    plain.load_state_dict(model.state_dict())
    batch, labels = padded_batch(torch.float32), random_labels(1, 2)
    outputs, expected = model(**batch), plain(**batch)
    assert list(outputs) == list(expected)
    assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.pred_boxes, expected.pred_boxes)
    with_loss = model(**batch, labels=labels)
    assert list(with_loss) == ["loss", "loss_dict", *expected]
    assert len(model(**batch, output_hidden_states=True).decoder_hidden_states) == 4
    positional = model(batch["pixel_values"], batch["pixel_mask"], None, None, None, None, labels)
    assert torch.equal(positional.loss, with_loss.loss)
    with pytest.raises(ValueError, match="return_dict=True"):
        model(**batch, return_dict=False)
    with pytest.raises(ValueError, match="output_hidden_states=True"):
        pvt_hf.detr_loss(model, outputs, labels)
    full = plain(**batch, output_hidden_states=True)
    assert torch.equal(pvt_hf.detr_loss(plain, full, labels)[0], with_loss.loss)


def test_preparing_twice_changes_nothing():
    model, batch, labels = small_detr(**NO_DROPOUT), padded_batch(torch.float32), random_labels(1, 2)
    assert model.model.encoder.dropout == 0
    loss = model(**batch, labels=labels).loss
    assert pvt_hf.prepare_detr_training(model) is model
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.class_labels_classifier.weight.mul_(2)
    assert torch.equal(model(**batch, labels=labels).loss, loss)
    assert not torch.equal(pvt_hf.prepare_detr_training(again)(**batch, labels=labels).loss, loss)
    assert len(again._forward_hooks) == len(again.model.decoder._forward_pre_hooks) == 1


def test_no_dropout_at_the_encoders_input():
    """With every other dropout off, training has nothing random left."""
    config = pvt_hf.build_detr_config(small_config("v1"), **SMALL)
    model = pvt_hf.build_detr(config).train()
    for module in (*model.model.encoder.layers.modules(), *model.model.decoder.modules()):
        for name in ("dropout", "activation_dropout", "attention_dropout"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(pixels).logits, model(pixels).logits)
    model.model.encoder.dropout = 0.1
    assert not torch.equal(model(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels.pop(), "one dictionary for each of 2 images, got 1"),
        (lambda labels: labels[1].pop("boxes"), r"`labels\[1\]` must have tensors .* without \['boxes'\]"),
        (lambda labels: labels[1].update(boxes=torch.rand(1, 4)), r"`labels\[1\]\['boxes'\]` must .*\(2, 4\), got \(1"),
        (lambda labels: labels[0]["class_labels"].fill_(4), r"`labels\[0\]` must have classes in \[0, 4\) .* 0 has 4"),
        (lambda labels: labels[1]["boxes"].mul_(96), r"`labels\[1\]` must have boxes .* relative to the image's size"),
        (
            lambda labels: labels[1]["boxes"][1, 2:].zero_(),
            r"`labels\[1\]` must .*some width and height: annotation 1",
        ),
        (lambda labels: labels[1]["boxes"].fill_(math.nan), r"`labels\[1\]` must have finite boxes: .* 0 has \[nan"),
    ],
)
def test_wrong_labels_are_refused(change, message):
    labels = random_labels(3, 2)
    change(labels)
    with pytest.raises((TypeError, ValueError), match=message):
        small_detr()(**padded_batch(torch.float32), labels=labels)


def test_diverged_model_is_an_error():
    model = small_detr()
    torch.nn.init.constant_(model.class_labels_classifier.bias, math.inf)
    with pytest.raises(ValueError, match="not finite"):
        model(**padded_batch(torch.float32), labels=random_labels(1, 1))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(use_reentrant):
    model = small_detr(**NO_DROPOUT).train()
    batch, labels = padded_batch(torch.float32), random_labels(3, 2)
    model(**batch, labels=labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**batch, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-4)


# Training


class Examples(torch.utils.data.Dataset):
    def __init__(self, count: int):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, 3, 64, 64, generator=generator)
        self.labels = random_labels(*(1 + index % 3 for index in range(count)))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def collate(examples):
    pixels = torch.stack([example["pixel_values"] for example in examples])
    mask = torch.ones(len(pixels), 64, 64, dtype=torch.long)
    return {"pixel_values": pixels, "pixel_mask": mask, "labels": [example["labels"] for example in examples]}


def trainer(model, folder, data, **arguments) -> Trainer:
    arguments = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0, **arguments}
    arguments = TrainingArguments(
        folder, use_cpu=True, disable_tqdm=True, remove_unused_columns=False, save_strategy="no", logging_steps=1,
        lr_scheduler_type="constant", seed=3, **arguments
    )  # fmt: skip
    return Trainer(model, arguments, data_collator=collate, train_dataset=data, eval_dataset=data)


def test_trainer_accumulates_gradients(tmp_path):
    """Two accumulated batches give the mean of their gradients, each with its own divisors, as mmdetection's on two
    GPUs with as many boxes."""
    data = Examples(2)
    data.labels = random_labels(2, 2)
    model = small_detr(**NO_DROPOUT)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected = copy.deepcopy(model).train()
    losses = [expected(**collate([data[index]])).loss for index in range(2)]
    (sum(losses) / 2).backward()
    run = trainer(model, tmp_path, data, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert run.train().training_loss == pytest.approx(sum(losses).item() / 2, rel=1e-4)
    for name, parameter in expected.named_parameters():
        assert_close(model.get_parameter(name), start[name] - 0.1 * parameter.grad, 1e-5)


def test_trainer_evaluates_and_trains_in_bfloat16(tmp_path):
    """Mixed precision: the loss is near that of float32, it falls, and evaluation gathers no hidden states."""
    data, model = Examples(4), small_detr(**NO_DROPOUT, num_queries=8)
    with torch.no_grad():
        exact = copy.deepcopy(model).train()(**collate(list(data))).loss.item()
    settings = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 5e-3, "optim": "adamw_torch"}
    run = trainer(model, tmp_path, data, bf16=True, eval_do_concat_batches=False, **settings)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(exact, rel=0.05) and losses[-1] < 0.8 * losses[0]
    result = run.predict(data)
    assert result.metrics["test_loss"] > 0
    # One batch of dicts of losses, logits, boxes, last states of decoder and encoder.
    assert [len(entry) for entry in result.predictions] == [5]


def ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, (images, labels) = small_detr(**NO_DROPOUT).double(), ddp_data()
    model = DistributedDataParallel(model.train())  # a parameter without gradient would stop the second step
    for _ in range(2):
        model.zero_grad()
        model(images[rank], labels=labels[rank]).loss.backward()
    torch.save([parameter.grad for parameter in model.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def ddp_data():
    torch.manual_seed(1)
    return torch.randn(2, 1, 3, 64, 64, dtype=torch.float64), [random_labels(4), random_labels(1)]


@pytest.mark.process
def test_gradients_of_two_processes_equal_those_of_one(tmp_path):
    """Processes share the mean of their numbers of boxes, here (4 + 1) / 2, and the mean of their gradients."""
    call_in_two_processes(ddp_worker, str(tmp_path))
    torch.manual_seed(0)
    model, (images, labels) = small_detr(**NO_DROPOUT).double(), ddp_data()
    weights = {key: tensor.clone().requires_grad_() for key, tensor in official_weights(model).items()}
    for pixels, label in zip(images, labels, strict=True):
        batch = {"pixel_values": pixels, "pixel_mask": torch.ones(1, 64, 64)}
        (slow_total(weights, batch, label, model.config.backbone_config, num_boxes=2.5)[0] / 2).backward()
    expected = {key: torch.zeros_like(t) if t.grad is None else t.grad for key, t in weights.items()}
    expected = Detr().from_official(expected)
    gradients = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for (name, _), first, second in zip(model.named_parameters(), *gradients, strict=True):
        assert torch.equal(first, second)
        assert_close(first, expected[name])


# Detections, loading and saving


def test_detections_equal_those_of_loops():
    """Per image by loops: best class of each query, sorted, scaled to the original size, clipped, none left out."""
    model, batch = small_detr().double().eval(), padded_batch()
    outputs = model(**batch)
    outputs["pred_boxes"] = torch.rand_like(outputs.pred_boxes)  # some leave the image
    sizes = [(128, 192), (480, 350)]
    for index, detections in enumerate(pvt_hf.detr_detections(outputs, target_sizes=sizes)):
        height, width = sizes[index]
        expected = []
        for logit, (x, y, w, h) in zip(outputs.logits[index], outputs.pred_boxes[index].tolist(), strict=True):
            exponentials = [math.exp(value) for value in logit.tolist()]
            scores = [value / sum(exponentials) for value in exponentials][:-1]
            corners = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            limits = (width, height, width, height)
            box = [min(max(value, 0), limit) for value, limit in zip(corners, limits, strict=True)]
            expected.append((max(scores), scores.index(max(scores)), box))
        expected.sort(reverse=True)
        scores, labels, boxes = zip(*expected, strict=True)
        assert_close(detections["scores"], torch.tensor(scores, dtype=torch.float64))
        assert detections["labels"].tolist() == list(labels)
        assert_close(detections["boxes"], torch.tensor(boxes, dtype=torch.float64))
    middle = (scores[2] + scores[3]) / 2
    assert [len(item["scores"]) for item in pvt_hf.detr_detections(outputs, middle, sizes)][1] == 3
    assert [len(item["boxes"]) for item in pvt_hf.detr_detections(outputs, max_detections=4)] == [4, 4]
    assert pvt_hf.detr_detections(outputs)[1]["boxes"].max() <= 1
    with pytest.raises(ValueError, match=r"each of 2 images, got shape \(1, 2\)"):
        pvt_hf.detr_detections(outputs, target_sizes=sizes[:1])


def test_detections_are_those_of_transformers():
    """transformers' processor gives the same ones, in the order of the queries and not clipped."""
    outputs, sizes = small_detr().eval()(**padded_batch(torch.float32)), torch.tensor([[60, 90], [40, 30]])
    theirs = DetrImageProcessor().post_process_object_detection(outputs, threshold=0.2, target_sizes=sizes)
    for ours, other, size in zip(pvt_hf.detr_detections(outputs, 0.2, sizes), theirs, sizes.tolist(), strict=True):
        order = other["scores"].argsort(descending=True)
        assert len(order) > 1
        assert_close(ours["scores"], other["scores"][order], 1e-6)
        assert torch.equal(ours["labels"], other["labels"][order])
        height, width = size
        clipped = other["boxes"][order].clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        assert_close(ours["boxes"], clipped, 1e-5)


@VERSIONS
def test_saves_and_loads_in_transformers(version, tmp_path):
    model = small_detr(version).eval()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is DetrForObjectDetection and not any(info.values())
    assert type(loaded.model.backbone.model).__module__.startswith("pvt_hf.")
    batch = padded_batch(torch.float32)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert not loaded.config.auxiliary_loss
    labels = random_labels(2, 1)
    prepared = pvt_hf.prepare_detr_training(loaded)
    assert torch.equal(prepared(**batch, labels=labels).loss, model(**batch, labels=labels).loss)


@VERSIONS
def test_pretrained_backbone_fills_every_tensor_of_it(version, tmp_path):
    """Every tensor of the backbone comes from the classifier."""
    is_v1 = version == "v1"
    classifier = (pvt_hf.PvtForImageClassification if is_v1 else pvt_hf.PvtV2ForImageClassification)(
        small_config(version)
    )
    randomize(classifier).save_pretrained(tmp_path)
    model = small_detr(version)
    backbone = model.model.backbone.model
    heads = {key: tensor.clone() for key, tensor in model.state_dict().items() if ".backbone." not in key}
    assert load_pretrained_backbone(model, str(tmp_path)) == len(backbone.state_dict())
    source = (classifier.pvt if is_v1 else classifier.pvt_v2).state_dict()
    assert all(torch.equal(tensor, source[key]) for key, tensor in backbone.state_dict().items())
    assert all(torch.equal(tensor, heads[key]) for key, tensor in model.state_dict().items() if key in heads)
