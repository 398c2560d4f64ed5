"""RetinaNet: mmdetection's outputs, detections, losses and gradients, and life as a model of transformers."""

import pytest
import torch
import transformers
from torch.testing import assert_close

import pvt_hf
from pvt_hf.conversion import reference_heads
from pvt_hf.conversion.architectures.retinanet import RetinaNet
from pvt_hf.models.backbone import load_pretrained_backbone
from pvt_hf.models.post_processing import detect_objects
from tests.support import checkpoints, detectors
from tests.support import reference_detection as loops
from tests.support.detectors import (
    CLASSES,
    backbone_config,
    labels_of,
    official_retinanet,
    padded_batch,
    relative,
    tiny_backbone,
)
from tests.support.small_models import STAGES, randomize

BACKBONES = pytest.mark.parametrize("backbone", ["v1", "v2", "resnet"])
VERSIONS = pytest.mark.parametrize("version", ["v1", "v2", "v2_linear"])
SIZES, INPUT_SIZE, ORIGINAL = [(96, 128), (70, 90)], (96, 128), [(191, 257), (70, 91)]
SHAPES = [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]  # of the levels
OBJECTS = [
    [([10.0, 12.0, 60.0, 70.0], 1), ([119.0, 87.0, 135.0, 103.0], 4), ([12.0, 10.0, 64.0, 66.0], 0)],  # one reaches out
    [([3.0, 30.0, 88.0, 69.0], 2)],
]


def small_model(backbone="v1", **overrides):
    fields = {"neck_channels": 16, "num_labels": CLASSES} | overrides
    config = pvt_hf.RetinaNetConfig(backbone_config=backbone_config(backbone, out_features=STAGES[1:]), **fields)
    return pvt_hf.RetinaNetForObjectDetection(config)


def reference_outputs(weights, pixels):
    """Per level the raw outputs, and the shapes of the levels."""
    levels = reference_heads.pyramid(weights, detectors.feature_maps(weights, pixels)[1:])
    return reference_heads.retinanet(weights, levels), [tuple(level.shape[2:]) for level in levels]


def converted_model(weights, version):
    config = pvt_hf.RetinaNetConfig(
        backbone_config=tiny_backbone(version), neck_channels=detectors.CHANNELS, num_labels=CLASSES
    )
    return detectors.converted(pvt_hf.RetinaNetForObjectDetection(config), weights, RetinaNet())


@VERSIONS
@torch.no_grad()
def test_outputs_and_detections_equal_the_reference(version):
    weights = official_retinanet(checkpoints.TINY[version])
    pixels, mask = padded_batch(SIZES, INPUT_SIZE)
    raw, shapes = reference_outputs(weights, pixels)
    outputs = converted_model(weights, version)(pixels, mask)
    logits, deltas = (torch.cat(parts, dim=1) for parts in zip(*raw, strict=True))
    assert_close(outputs.logits, logits, rtol=0, atol=1e-10)
    assert outputs.level_sizes.tolist() == [level.shape[1] for level, _ in raw]
    assert outputs.image_sizes.tolist() == [list(size) for size in SIZES]
    anchors = sum(loops.anchors(shapes, loops.COCO_STRIDES["retinanet"], loops.RETINANET_SCALES), [])
    for index, size in enumerate(SIZES):
        boxes = [loops.decode(a, d, size) for a, d in zip(anchors, deltas[index].tolist(), strict=True)]
        assert_close(outputs.pred_boxes[index], relative(boxes, size), rtol=0, atol=1e-10)

    expected = loops.retinanet_detections(raw, shapes, SIZES, ORIGINAL)
    for actual, wanted in zip(detect_objects(outputs, 0.05, ORIGINAL), expected, strict=True):
        assert len(wanted) == 100
        assert actual["labels"].tolist() == [label for _, label, *_ in wanted]
        assert_close(actual["scores"], torch.tensor([w[0] for w in wanted], dtype=torch.float64), rtol=0, atol=1e-10)
        assert_close(actual["boxes"], torch.tensor([w[2] for w in wanted], dtype=torch.float64), rtol=0, atol=1e-8)


@torch.no_grad()
def test_settings_of_the_detections_count():
    weights = official_retinanet(checkpoints.TINY["v1"])
    pixels, mask = padded_batch(SIZES, INPUT_SIZE)
    raw, shapes = reference_outputs(weights, pixels)
    outputs = converted_model(weights, "v1")(pixels, mask)
    # Without the limit it matters that only 1000 of the finest level's anchors are candidates.
    wanted = loops.retinanet_detections(raw, shapes, SIZES, ORIGINAL, limit=10_000)
    actual = detect_objects(outputs, 0.05, ORIGINAL, max_detections=10_000)
    assert [image["labels"].tolist() for image in actual] == [[label for _, label, *_ in image] for image in wanted]
    more = detect_objects(outputs, 0.05, ORIGINAL, max_detections=10_000, candidates_per_level=2000)
    assert len(more[0]["scores"]) > len(actual[0]["scores"]) > 100
    stricter = detect_objects(outputs, float(actual[0]["scores"][3]), ORIGINAL)
    assert torch.equal(stricter[0]["scores"], actual[0]["scores"][:3])
    assert len(detect_objects(outputs, 0.05, ORIGINAL, nms_threshold=0.1, max_detections=10_000)[0]["scores"]) < len(
        actual[0]["scores"]
    )


@torch.no_grad()
def test_target_sizes_scale_the_boxes():
    model = randomize(small_model()).eval()
    outputs = model(torch.randn(2, 3, 64, 64))
    relative_boxes = detect_objects(outputs, 0.05)[0]["boxes"]
    assert relative_boxes.min() >= 0 and relative_boxes.max() <= 1
    for sizes in ([(64, 32), (1, 1)], torch.tensor([[64, 32], [1, 1]]), [torch.tensor([64, 32]), torch.tensor([1, 1])]):
        scaled = detect_objects(outputs, 0.05, sizes)[0]["boxes"]
        assert_close(scaled, relative_boxes * torch.tensor([32.0, 64, 32, 64]))
    # transformers' pipeline puts its own field into the outputs and makes a plain `ModelOutput` of them.
    plain = transformers.utils.ModelOutput(**type(outputs)({"target_size": torch.tensor([[64, 32]]), **outputs}))
    assert_close(detect_objects(plain, 0.05)[0]["boxes"], relative_boxes)
    with pytest.raises(ValueError, match=r"`target_sizes` must be .* 2 images, got shape \(1, 2\)"):
        detect_objects(outputs, 0.05, [(100, 100)])


def test_every_object_has_one_best_anchor():
    """A small object inside several anchors overlaps equally with all of them, and how the areas of these are rounded
    says which ones it takes: nothing that two implementations, or two machines, have to agree on."""
    anchors = sum(loops.anchors(SHAPES, loops.COCO_STRIDES["retinanet"], loops.RETINANET_SCALES), [])
    for image, size in zip(OBJECTS, SIZES, strict=True):
        valid = loops.valid_flags(SHAPES, loops.COCO_STRIDES["retinanet"], 9, loops.padded(size, INPUT_SIZE))
        overlaps = loops.overlaps([box for box, _ in image], anchors)[:, torch.tensor(valid)]
        best, next_best = overlaps.topk(2, dim=1).values.unbind(dim=1)
        assert (best - next_best > 1e-6).all()
        assert all((overlaps.amax(dim=0) - threshold).abs().min() > 1e-6 for threshold in (0.4, 0.5))
    assert loops.overlaps([OBJECTS[0][1][0]], anchors).max() < 0.4  # a match of low quality


@pytest.mark.parametrize("objects", [OBJECTS, [[], OBJECTS[1]], [[], []]], ids=["both", "one", "none"])
def test_losses_and_gradients_equal_the_reference(objects):
    weights = official_retinanet(checkpoints.TINY["v2"])
    pixels, mask = padded_batch(SIZES, INPUT_SIZE)
    model = converted_model(weights, "v2")
    outputs = model(pixels, mask, labels=labels_of(objects, SIZES))
    outputs.loss.backward()

    leaves = {key: value.clone().requires_grad_() for key, value in weights.items()}
    raw, shapes = reference_outputs(leaves, pixels)
    class_loss, box_loss = loops.retinanet_losses(raw, shapes, SIZES, INPUT_SIZE, objects)
    (class_loss + box_loss).backward()
    assert_close(outputs.loss_dict["loss_class"], class_loss, rtol=1e-10, atol=0)
    assert_close(outputs.loss_dict["loss_box"], torch.as_tensor(box_loss).double(), rtol=1e-10, atol=0)
    assert_close(outputs.loss, class_loss + box_loss, rtol=1e-10, atol=0)
    gradients = {key: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for key, leaf in leaves.items()}
    gradients = RetinaNet().from_official(gradients)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], rtol=1e-7, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@BACKBONES
def test_trained_model_reloads(backbone, tmp_path):
    model = small_model(backbone).train()
    pixels, mask = padded_batch(SIZES, INPUT_SIZE, torch.float32)
    model(pixels, mask, labels=labels_of(OBJECTS, SIZES)).loss.backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert not unused
    randomize(model).eval().save_pretrained(tmp_path)
    loaded = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert type(loaded) is pvt_hf.RetinaNetForObjectDetection
    with torch.no_grad():
        first, second, again = model(pixels, mask), loaded(pixels, mask), model(pixels, mask)
    assert torch.equal(first.logits, second.logits) and torch.equal(first.pred_boxes, second.pred_boxes)
    assert torch.equal(first.logits, again.logits) and first.loss is None
    assert first.pred_boxes.dtype == torch.float32


def test_configuration_is_saved_and_loaded(tmp_path):
    config = pvt_hf.RetinaNetConfig()
    assert config.num_labels == 80 and config.backbone_config.out_features == STAGES[1:]
    backbone = {"model_type": "pvt_v2", "out_features": STAGES[1:], "depths": [1, 1, 1, 1]}
    config = pvt_hf.RetinaNetConfig(backbone_config=backbone, id2label={0: "cat", 1: "dog"}, focal_gamma=1)
    config.save_pretrained(tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is pvt_hf.RetinaNetConfig and type(loaded.backbone_config) is pvt_hf.PvtV2Config
    assert loaded.to_diff_dict() == config.to_diff_dict() and loaded.num_labels == 2


@torch.no_grad()
def test_initialisation_is_mmdetections():
    model = small_model("v2", neck_channels=32)
    prior = torch.full((9 * CLASSES,), 0.01).logit()
    assert_close(model.head.class_predictor.bias, prior)
    for name, parameter in model.head.named_parameters():
        if name.endswith("weight"):
            assert abs(parameter.std() / 0.01 - 1) < 0.1, name
        elif name != "class_predictor.bias":
            assert not parameter.any(), name
    for name, parameter in model.neck.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        else:
            fan_in, fan_out = parameter[0].numel(), parameter[:, 0].numel()
            limit = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.95 * limit < parameter.abs().max() <= limit, name


def test_incomplete_checkpoints_are_refused(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path, state_dict=checkpoints.without(model.state_dict(), "neck.lateral_convs.1.weight"))
    with pytest.raises(ValueError, match=r"in another shape, 1 tensors \['neck.lateral_convs.1.weight'\]"):
        type(model).from_pretrained(tmp_path)


@torch.no_grad()
def test_another_number_of_classes_keeps_all_other_tensors(tmp_path):
    model = randomize(small_model())
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch|ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path, num_labels=3)
    loaded = type(model).from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert loaded(torch.randn(1, 3, 64, 64)).logits.shape[-1] == 3
    assert_close(loaded.head.class_predictor.bias, torch.full((27,), 0.01).logit())
    saved, kept = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(kept[name], saved[name]) for name in saved if not name.startswith("head.class_predictor."))


@pytest.mark.parametrize("backbone", ["v1", "v2"])
def test_pretrained_backbone_fills_every_tensor_of_it(backbone, tmp_path):
    config = backbone_config(backbone)
    classifier = transformers.AutoModelForImageClassification.from_config(config)
    randomize(classifier).save_pretrained(tmp_path / "complete")
    model = small_model(backbone)
    head = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("backbone.")}
    count = load_pretrained_backbone(model, tmp_path / "complete")
    state, saved = model.state_dict(), classifier.base_model.state_dict()
    names = [name for name in state if name.startswith("backbone.")]
    assert count == len(names)
    assert all(torch.equal(state[name], saved[name.removeprefix("backbone.")]) for name in names)
    assert all(torch.equal(state[name], tensor) for name, tensor in head.items())

    def saved_as(folder, **fields):
        other = transformers.AutoModelForImageClassification.from_config(backbone_config(backbone, **fields))
        other.save_pretrained(tmp_path / folder)
        return tmp_path / folder

    with pytest.raises(ValueError, match="num_attention_heads is .*1, 1, 3, 4.*, not .*1, 2, 3, 4"):
        load_pretrained_backbone(model, saved_as("heads", num_attention_heads=[1, 1, 3, 4]))
    with pytest.raises(ValueError, match="does not fill the backbone"):
        load_pretrained_backbone(model, saved_as("deeper", depths=[1, 2, 2, 1]))
    with pytest.raises(ValueError, match="does not fill the backbone"):
        load_pretrained_backbone(model, saved_as("shallower", depths=[1, 1, 1, 1]))
    name = next(key for key in classifier.state_dict() if key.endswith("value.weight"))
    classifier.save_pretrained(tmp_path / "part", state_dict=checkpoints.without(classifier.state_dict(), name))
    with pytest.raises(ValueError, match="lacks, or has in another shape, 1 tensors"):
        load_pretrained_backbone(model, tmp_path / "part")
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("backbone", ["v1", "v2"])
def test_checkpointing_and_attention_implementation_reach_the_backbone(backbone):
    model = randomize(small_model(backbone)).double().train()
    pixels, mask = padded_batch(SIZES, INPUT_SIZE)

    def step():
        model.zero_grad()
        loss = model(pixels, mask, labels=labels_of(OBJECTS, SIZES)).loss
        loss.backward()
        return loss, [parameter.grad.clone() for parameter in model.parameters()]

    plain = step()
    model.activation_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.backbone.modules())
    assert_close(step(), plain, rtol=0, atol=0)
    model.activation_checkpointing_disable()
    model.set_attn_implementation("eager")
    assert model.backbone.config._attn_implementation == "eager"
    assert_close(step(), plain, rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_backbone_outputs_are_returned():
    model = small_model("v1").eval()
    pixels = torch.randn(1, 3, 64, 64)
    model.set_attn_implementation("eager")
    outputs = model(pixels, output_hidden_states=True, output_attentions=True)
    assert outputs.hidden_states and outputs.attentions
    model.config.return_dict = model.backbone.config.return_dict = False
    assert torch.equal(model(pixels)[0], outputs.logits)


def test_coordinates_and_losses_stay_in_float32():
    """Logits and boxes are float32 wherever the network is not; a float16 box would be 0.5 pixels off."""
    pixels, mask = padded_batch(SIZES, INPUT_SIZE, torch.float32)
    model = randomize(small_model("v2")).train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(pixels, mask, labels=labels_of(OBJECTS, SIZES))
    outputs.loss.backward()
    expected = model(pixels, mask, labels=labels_of(OBJECTS, SIZES))
    for result in (outputs, model.bfloat16()(pixels.bfloat16(), mask, labels=labels_of(OBJECTS, SIZES))):
        assert result.pred_boxes.dtype == result.logits.dtype == result.loss.dtype == torch.float32
        assert_close(result.loss, expected.loss, rtol=0.02, atol=0)


def test_loss_is_not_transformers():
    """transformers gives classes with such a name DETR's loss, and counts labels, which these losses do not need."""
    model = small_model()
    assert not model.accepts_loss_kwargs
    pixels = torch.randn(1, 3, 64, 64)
    labels = labels_of(OBJECTS[:1], SIZES[:1])
    loss = model(pixels, labels=labels).loss
    assert torch.equal(model(pixels, labels=labels, num_items_in_batch=7).loss, loss)


VALID = {"class_labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]] * 2)}


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            {"labels": torch.tensor([1])},
            r"`labels\[1\]` must have tensors .* got \['labels'\] without \['class_labels', 'b",
        ),
        ([1], r"`labels\[1\]` must be a dictionary, got list"),
        (
            VALID | {"class_labels": torch.tensor([1.0, 2.0])},
            r"class indices of shape \(objects,\), got torch.float32",
        ),
        (
            VALID | {"class_labels": torch.tensor([1])},
            r"`labels\[1\]\['boxes'\]` must have shape \(1, 4\), got",
        ),
        (
            VALID | {"class_labels": torch.tensor([1, 5])},
            r"`labels\[1\]` must have classes .* annotation 1 has 5",
        ),
        (VALID | {"class_labels": torch.tensor([-1, 1])}, r"classes in \[0, 5\) .* annotation 0 has -1"),
        (VALID | {"boxes": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1]])}, "must be floating point"),
        (
            VALID | {"boxes": torch.tensor([[0.5] * 4, [30.0, 40, 5, 6]])},
            r"in \[0, 1\]: annotation 1 has \[30.0, 40.0",
        ),
        (
            VALID | {"boxes": torch.tensor([[0.5] * 4, [0.5, 0.5, 0.0, 0.2]])},
            "some width and height: annotation 1 has",
        ),
        (
            VALID | {"boxes": torch.tensor([[0.5, float("nan"), 0.1, 0.1], [0.5] * 4])},
            "finite boxes: annotation 0 has",
        ),
    ],
)
def test_wrong_labels_are_refused(label, message):
    with pytest.raises((TypeError, ValueError), match=message):
        small_model()(torch.randn(2, 3, 64, 64), labels=[VALID, label])


def test_wrong_batches_are_refused():
    model, pixels = small_model(), torch.randn(2, 3, 64, 64)
    with pytest.raises(ValueError, match="one dictionary for each of 2 images, got 1"):
        model(pixels, labels=[VALID])
    with pytest.raises(TypeError, match="must be a list of one dictionary per image, got dict"):
        model(pixels, labels=VALID)
    with pytest.raises(ValueError, match=r"`pixel_mask` must have shape \(2, 64, 64\).* got \(2, 32, 64\)"):
        model(pixels, torch.ones(2, 32, 64))
    for hole in ((1, 3, 3), (1, 0, 0), (1, slice(None), slice(None))):
        mask = torch.ones(2, 64, 64)
        mask[hole] = 0
        with pytest.raises(ValueError, match=r"`pixel_mask\[1\]` must be 1 in a rectangle"):
            model(pixels, mask)
    with pytest.raises(ValueError, match=r"`pixel_values` must have shape \(batch, .* got \(3, 64, 64\)"):
        model(pixels[0])
    with pytest.raises(ValueError, match="must name 3 `out_features`, got"):
        pvt_hf.RetinaNetForObjectDetection(pvt_hf.RetinaNetConfig(backbone_config=backbone_config("v1")))
    with pytest.raises(ValueError, match="`strides` must have one value for each of the 5 levels"):
        pvt_hf.RetinaNetConfig(strides=[8, 16])


def test_empty_images_may_have_empty_tensors_of_any_shape():
    pixels = torch.randn(2, 3, 64, 64)
    empty = {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0)}
    model = small_model()
    outputs = model(pixels, labels=[empty, empty])
    assert outputs.loss_dict["loss_box"] == 0 and outputs.loss > 0
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
