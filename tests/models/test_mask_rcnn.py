"""Mask R-CNN: mmdetection's proposals, detections, masks, losses and gradients, and life as a model of transformers."""

from functools import partial
from unittest import mock

import pytest
import torch
import torchvision
import transformers
from torch.testing import assert_close

import pvt_hf
from pvt_hf.conversion import reference_heads
from pvt_hf.conversion.architectures.mask_rcnn import MaskRCNN
from pvt_hf.models import rois
from pvt_hf.models.backbone import load_pretrained_backbone
from pvt_hf.models.post_processing import detect_objects, paste_masks, segment_instances
from pvt_hf.models.rois import SampledRoIs, pool_rois, sample_rois, to_rois
from pvt_hf.models.targets import GroundTruth, read_ground_truths
from pvt_hf.models.two_stage import MaskHead
from tests.support import checkpoints, detectors
from tests.support import reference_detection as loops
from tests.support.dense_models import build_dense_model, dense_inputs
from tests.support.detectors import CLASSES, backbone_config, official_mask_rcnn, padded_batch, relative, tiny_backbone
from tests.support.small_models import STAGES, randomize

BACKBONES = pytest.mark.parametrize("backbone", ["v1", "v2", "resnet"])
SIZES, INPUT_SIZE, ORIGINAL = [(64, 96), (45, 60)], (64, 96), [(127, 193), (45, 61)]
OBJECTS = [
    [([10.0, 12.0, 60.0, 50.0], 1), ([70.0, 40.0, 104.0, 66.0], 4), ([12.0, 10.0, 64.0, 46.0], 0)],  # one reaches out
    [([3.0, 10.0, 48.0, 39.0], 2)],
]


def masks_of(objects, input_size=INPUT_SIZE):
    """Ellipses that fill the boxes."""
    y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in input_size), indexing="ij")
    masks = torch.zeros(len(objects), *input_size, dtype=torch.bool)
    for mask, ((x0, y0, x1, y1), _) in zip(masks, objects, strict=True):
        distance = ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2
        mask[distance < 1] = True
    return masks


def labels_of(objects, sizes=SIZES, input_size=INPUT_SIZE):
    return [
        {
            "class_labels": torch.tensor([label for _, label in image], dtype=torch.long),
            "boxes": relative([box for box, _ in image], size),
            "masks": masks_of(image, input_size),
        }
        for image, size in zip(objects, sizes, strict=True)
    ]


def small_model(backbone="v1", **overrides):
    fields = {"neck_channels": 16, "box_head_size": 32, "num_labels": CLASSES} | overrides
    config = pvt_hf.MaskRCNNConfig(backbone_config=backbone_config(backbone, out_features=STAGES), **fields)
    return pvt_hf.MaskRCNNForInstanceSegmentation(config)


def reference_outputs(weights, pixels):
    """The levels P2 to P5, per level with P6 the raw outputs of the proposals, and the shapes of these levels."""
    levels = reference_heads.pyramid(weights, detectors.feature_maps(weights, pixels))
    shapes = [tuple(level.shape[2:]) for level in (*levels, levels[-1][:, :, ::2, ::2])]
    return levels, reference_heads.region_proposals(weights, levels), shapes


def reference_heads_of(weights):
    return partial(reference_heads.box_head, weights), partial(reference_heads.mask_head, weights)


def converted_model(weights, version, **overrides):
    config = pvt_hf.MaskRCNNConfig(
        backbone_config=tiny_backbone(version, STAGES),
        neck_channels=detectors.CHANNELS,
        box_head_size=32,
        num_labels=CLASSES,
        **overrides,
    )
    return detectors.converted(pvt_hf.MaskRCNNForInstanceSegmentation(config), weights, MaskRCNN())


@pytest.mark.parametrize("version", ["v1", "v2"])
@torch.no_grad()
def test_proposals_detections_and_masks_equal_the_reference(version):
    weights = official_mask_rcnn(checkpoints.TINY[version])
    pixels, mask = padded_batch(SIZES, INPUT_SIZE)
    levels, raw, shapes = reference_outputs(weights, pixels)
    assert shapes[0][0] * shapes[0][1] * 3 > 1000
    model, seen = converted_model(weights, version), {}
    model.rpn.register_forward_hook(lambda module, inputs, outputs: seen.update(rpn=outputs))
    detect = model.detect
    model.detect = lambda levels, proposals, sizes: seen.update(proposals=proposals) or detect(levels, proposals, sizes)
    outputs = model(pixels, mask)

    logits, deltas = (torch.cat(parts, dim=1) for parts in zip(*raw, strict=True))
    assert_close(seen["rpn"], (logits[..., 0], deltas), rtol=0, atol=1e-10)
    proposals = loops.proposals(raw, shapes, SIZES)
    for actual, wanted in zip(seen["proposals"], proposals, strict=True):
        assert_close(actual[: len(wanted)], torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-9)
        assert not actual[len(wanted) :].any()

    found = loops.mask_rcnn_detections(reference_heads_of(weights), levels, proposals, SIZES, ORIGINAL)
    detections = detect_objects(outputs, 0.05, ORIGINAL)
    instances = segment_instances(outputs, 0.05, target_sizes=ORIGINAL, return_binary_maps=True)
    for index, (wanted, mask_logits) in enumerate(found):
        scores = torch.tensor([score for score, *_ in wanted], dtype=torch.float64)
        boxes = torch.tensor([box for _, _, box, _ in wanted], dtype=torch.float64)
        assert len(wanted) == 100
        assert detections[index]["labels"].tolist() == [label for _, label, *_ in wanted]
        assert_close(detections[index]["scores"], scores, rtol=0, atol=1e-10)
        assert_close(detections[index]["boxes"], boxes, rtol=0, atol=1e-8)
        assert_close(outputs.pred_masks[index], mask_logits, rtol=0, atol=1e-8)
        own = outputs.logits[index].softmax(dim=1).gather(1, outputs.class_labels[index][:, None])[:, 0]
        assert_close(own, outputs.scores[index], rtol=0, atol=1e-12)
        pasted = [
            loops.paste(logits, box, ORIGINAL[index]) for logits, box in zip(mask_logits, boxes.tolist(), strict=True)
        ]
        assert torch.equal(instances[index]["segmentation"], torch.stack(pasted))
        assert [info["label_id"] for info in instances[index]["segments_info"]] == detections[index]["labels"].tolist()


FEW = (24, 4, 40, 6)  # so few samples that there is something to draw everywhere


@pytest.mark.parametrize(
    ("objects", "samples"),
    [(OBJECTS, (256, 128, 512, 128)), (OBJECTS, FEW), ([[], OBJECTS[1]], FEW), ([[], []], FEW)],
    ids=["default", "few", "one", "none"],
)
def test_losses_and_gradients_equal_the_reference(objects, samples):
    weights = official_mask_rcnn(checkpoints.TINY["v2"])
    pixels, mask = padded_batch(SIZES, INPUT_SIZE)
    model = converted_model(
        weights,
        "v2",
        rpn_num_samples=samples[0],
        rpn_positive_fraction=samples[1] / samples[0],
        roi_num_samples=samples[2],
        roi_positive_fraction=samples[3] / samples[2],
    ).train()
    torch.manual_seed(1)
    outputs = model(pixels, mask, labels=labels_of(objects))
    outputs.loss.backward()
    drawn = torch.get_rng_state()

    leaves = {key: value.clone().requires_grad_() for key, value in weights.items()}
    levels, raw, shapes = reference_outputs(leaves, pixels)
    masks = [masks_of(image) for image in objects]
    torch.manual_seed(1)
    expected, counts = loops.mask_rcnn_losses(
        reference_heads_of(leaves), levels, raw, shapes, SIZES, INPUT_SIZE, objects, masks, samples
    )
    assert torch.equal(torch.get_rng_state(), drawn)
    if samples is FEW and objects is OBJECTS:
        assert counts == (12, 80)
    sum(expected.values()).backward()
    for name, value in expected.items():
        assert_close(outputs.loss_dict[f"loss_{name}"], value.double(), rtol=1e-10, atol=1e-14)
    assert_close(outputs.loss, sum(expected.values()).double(), rtol=1e-10, atol=0)
    gradients = {key: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for key, leaf in leaves.items()}
    gradients = MaskRCNN().from_official(gradients)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], rtol=1e-7, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_settings_of_the_proposals_count():
    shapes = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    level_sizes = [height * width * 3 for height, width in shapes]
    model = small_model(num_proposals=20, num_candidates=50, num_candidates_train=100).double()
    objectness, deltas = torch.randn(2, sum(level_sizes)).double(), torch.randn(2, sum(level_sizes), 4).double() * 0.3
    raw = list(zip(objectness[..., None].split(level_sizes, dim=1), deltas.split(level_sizes, dim=1), strict=True))
    anchors = model.rpn.anchor_grid.generate_boxes(shapes, like=deltas)
    for training, num_candidates, limit in ((False, 50, 20), (True, 100, 20), (True, 100, 1000)):
        model.train(training).config.num_proposals = limit
        expected = loops.proposals(raw, shapes, SIZES, num_candidates, limit)
        proposals = model.rpn.select_proposals(objectness, deltas, anchors, level_sizes, torch.tensor(SIZES))
        for actual, wanted in zip(proposals, expected, strict=True):
            assert_close(actual[: len(wanted)], torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-9)
            assert not actual[len(wanted) :].any() and len(actual) == limit
            assert len(wanted) == 20 or limit == 1000


def test_samples_hold_the_objects_themselves():
    """The objects come first; the last object whose best proposal it is takes a proposal from a better one."""
    truth = GroundTruth(torch.tensor([[0, 0, 10, 10], [0, 0, 10, 12.0]]), torch.tensor([3, 4]), None)
    proposals = torch.tensor([[50, 50, 60, 60], [0, 0, 10, 10.5]])
    (rois,) = sample_rois([proposals], [truth], pvt_hf.MaskRCNNConfig(), 0.5, 0.5)
    assert rois.objects.tolist() == [0, 1, 1] and rois.num_truths == 2
    assert torch.equal(rois.boxes, torch.cat((truth.boxes, proposals.flip(0))))
    assert torch.equal(rois.positive_boxes, rois.boxes[:3])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_maps_are_copied_once_for_all_heads(batch_size, monkeypatch):
    """torchvision pools contiguous maps, and ours are channels-last: so are those whose rows are summed."""
    level = torch.randn(batch_size, 70, 5, 60).contiguous(memory_format=torch.channels_last).requires_grad_()
    (copy,) = rois.arrange_levels([level])
    assert copy.is_contiguous() and torch.equal(copy, level)
    (gradient,) = torch.autograd.grad(copy.square().sum(), level)
    assert torch.equal(gradient, 2 * level)
    with torch.no_grad():
        assert rois.arrange_levels([level])[0] is level
    pool, given = rois._pool_level, []
    monkeypatch.setattr(rois, "_pool_level", lambda level, *rest: given.append(level) or pool(level, *rest))
    for name in ("mask_rcnn", "cascade_mask_rcnn", "sparse_rcnn"):
        for layout in (torch.contiguous_format, torch.channels_last):
            model = build_dense_model(name).eval()
            with torch.set_grad_enabled(layout == torch.contiguous_format):
                model(**dense_inputs(model, batch_size, 96, 128))
            assert len({level.data_ptr() for level in given}) == 4 < len(given)
            assert all(level.is_contiguous(memory_format=layout) for level in given)
            given.clear()


def test_rois_are_pooled_from_the_level_of_their_scale():
    levels = [torch.randn(2, 3, 512 // stride, 512 // stride).double() for stride in (4, 8, 16, 32)]
    sides = [(10, 20), (100, 110), (120, 115), (250, 300), (500, 450), (30, 400), (0, 5)]
    boxes = [[[3.3, 7.7, 3.3 + w, 7.7 + h] for w, h in sides], [[-20.0, 450.0, 90.0, 530.0]]]
    tensors = [torch.tensor(image, dtype=torch.float64) for image in boxes]
    for size in (7, 14):
        pooled = pool_rois(levels, to_rois(tensors), (4, 8, 16, 32), size)
        assert_close(pooled, loops.roi_features(levels, boxes, size), rtol=0, atol=1e-12)
        with mock.patch.object(rois, "runs_transformed", lambda: True):  # and on GPUs
            assert torch.equal(pool_rois(levels, to_rois(tensors), (4, 8, 16, 32), size), pooled)
        with torch.no_grad():
            assert_close(pool_rois(levels, to_rois(tensors), (4, 8, 16, 32), size), pooled, rtol=0, atol=1e-12)
    none = [tensors[0][:0]] * 2
    assert pool_rois(levels, to_rois(none), (4, 8, 16, 32), 7).shape == (0, 3, 7, 7)
    half = pool_rois([level.bfloat16() for level in levels], to_rois([x.float() for x in tensors]), (4, 8, 16, 32), 7)
    assert half.dtype == torch.bfloat16
    assert_close(half.double(), loops.roi_features(levels, boxes, 7), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("sampling_ratio", [0, 2, 3])
@pytest.mark.parametrize("size", [7, 14])
def test_sums_of_rows_equal_torchvisions_pooling(size, sampling_ratio):
    """For RoIs of all kinds: large and narrow ones, outside of the image, without an area, turned around."""
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(3, 5, 23, 31, generator=generator, dtype=torch.float64)
    corners = torch.rand(200, 2, 2, generator=generator, dtype=torch.float64) * 400 - 100
    starts, ends = corners.sort(dim=1).values.unbind(1)
    boxes = torch.cat((starts, ends), dim=1)
    boxes[:10, 2:] = boxes[:10, :2]
    boxes[10:20, 2] = boxes[10:20, 0]
    boxes[20:30, :2], boxes[20:30, 2:] = ends[20:30], starts[20:30]
    boxes[30:40, 2:] = boxes[30:40, :2] + torch.tensor([8.0 * size, 16.0 * size])  # whole cells
    boxes[40] = torch.tensor([0.0, 0, 31 * 8, 23 * 8])
    regions = torch.cat((torch.arange(200, dtype=torch.float64)[:, None] % 3, boxes), dim=1)
    expected = torchvision.ops.roi_align(level, regions, size, 1 / 8, sampling_ratio, aligned=True)
    found = rois._sum_rows(level, regions, size, 1 / 8, sampling_ratio)
    assert_close(found, expected, rtol=0, atol=1e-12)
    single = rois._sum_rows(level.float(), regions.float(), size, 1 / 8, sampling_ratio).double()
    rounded = torch.arange(30, 40)  # the number of samples may differ by one, with torchvision too
    assert_close(single.index_copy(0, rounded, expected[rounded]), expected, rtol=0, atol=1e-4)
    assert expected.abs().max() > 1


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_pasted_masks_equal_the_reference(threshold):
    boxes = torch.tensor(
        [[5.3, 7.1, 30.2, 25.9], [-10.0, -5.0, 12.5, 60.0], [20.0, 10.0, 20.6, 10.4], [15, 13, 160, 112]]
    ).double()
    logits = torch.randn(4, 28, 28).double() + 2
    expected = [loops.paste(mask, box, (130, 150), threshold) for mask, box in zip(logits, boxes.tolist(), strict=True)]
    pasted = paste_masks(logits, boxes, (130, 150), threshold)
    assert torch.equal(pasted, torch.stack(expected)) and pasted.flatten(1).any(dim=1).sum() >= 3
    box = torch.tensor([[0.0, 0, 32, 32]])
    assert paste_masks(torch.zeros(1, 32, 32), box, (32, 32)).all()  # a probability of 0.5 is enough
    outside = torch.tensor([[160.0, 170, 180, 190], [-30, 0, -20, 10]]).double()
    assert not paste_masks(logits[:2], outside, (130, 150), threshold).any()
    nothing = torch.tensor([[5.0, 5, 5, 5]]).double()  # a few pixels at most, and no error
    assert paste_masks(logits[:1], nothing, (130, 150), threshold).sum() <= 9


def test_best_instance_lies_on_top():
    """The best instance has its pixels; the ids count the instances, best first."""
    outputs = {
        "scores": torch.tensor([[0.9, 0.8, 0.3, 0.0]]),
        "class_labels": torch.tensor([[2, 0, 1, -1]]),
        "pred_boxes": torch.tensor([[[0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 1.0, 1.0], [0.0] * 4]]),
        "pred_masks": torch.full((1, 4, 28, 28), 9.0),
        "image_sizes": torch.tensor([[4, 8]]),
    }
    (result,) = segment_instances(outputs, 0.5)
    assert result["segmentation"].tolist() == [[0] * 4 + [1] * 4] * 4
    infos = [(info["id"], info["label_id"], info["was_fused"]) for info in result["segments_info"]]
    assert infos == [(0, 2, False), (1, 0, False)]
    assert result["segments_info"][0]["score"] == 0.9
    (result,) = segment_instances(outputs, 0.95, target_sizes=[(2, 3)])
    assert result["segmentation"].tolist() == [[-1] * 3] * 2 and result["segments_info"] == []
    (result,) = segment_instances(outputs, 0.5, return_binary_maps=True)
    assert result["segmentation"].sum(dim=(1, 2)).tolist() == [16, 32]
    assert [image["scores"].tolist() for image in detect_objects(outputs, 0.0)] == [outputs["scores"][0, :3].tolist()]
    with pytest.raises(ValueError, match="`target_sizes` must be .* 1 images"):
        segment_instances(outputs, target_sizes=[(2, 3), (2, 3)])


@BACKBONES
def test_trained_model_reloads(backbone, tmp_path):
    model = small_model(backbone).train()
    pixels, mask = padded_batch(SIZES, INPUT_SIZE, torch.float32)
    outputs = model(pixels, mask, labels=labels_of(OBJECTS))
    outputs.loss.backward()
    assert outputs.scores is None and len(outputs.loss_dict) == 5
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    randomize(model).eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(pixels, mask)
        for auto_class in (
            transformers.AutoModelForInstanceSegmentation,
            transformers.AutoModelForImageSegmentation,
            transformers.AutoModelForObjectDetection,
        ):
            loaded = auto_class.from_pretrained(tmp_path)
            assert type(loaded) is pvt_hf.MaskRCNNForInstanceSegmentation
            assert_close(dict(loaded(pixels, mask)), dict(expected), rtol=0, atol=0)


@BACKBONES
def test_without_masks_it_is_faster_rcnn(backbone, tmp_path):
    model = small_model(backbone, use_masks=False).train()
    assert not [name for name in model.state_dict() if "mask" in name]
    pixels, mask = padded_batch(SIZES, INPUT_SIZE, torch.float32)
    labels = [{key: label[key] for key in ("class_labels", "boxes")} for label in labels_of(OBJECTS)]
    outputs = model(pixels, mask, labels=labels)
    assert sorted(outputs.loss_dict) == ["loss_box", "loss_class", "loss_objectness", "loss_rpn_box"]
    outputs.loss.backward()
    model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    outputs = loaded(pixels, mask)
    assert "pred_masks" not in outputs and torch.equal(outputs.pred_boxes, model(pixels, mask).pred_boxes)
    with pytest.raises(ValueError, match="`outputs` have no `pred_masks`"):
        segment_instances(outputs)


def test_evaluation_draws_nothing():
    model = randomize(small_model(rpn_num_samples=32, roi_num_samples=32)).eval()
    pixels, mask = padded_batch(SIZES, INPUT_SIZE, torch.float32)
    before = torch.get_rng_state()
    with torch.no_grad():
        first, second = (model(pixels, mask, labels=labels_of(OBJECTS)) for _ in range(2))
        without_labels = model(pixels, mask)
        assert torch.equal(torch.get_rng_state(), before)
        assert_close(dict(first), dict(second), rtol=0, atol=0)
        assert torch.equal(first.pred_boxes, without_labels.pred_boxes) and without_labels.loss is None
        model.train()
        first, second = (model(pixels, mask, labels=labels_of(OBJECTS)).loss for _ in range(2))
    assert first != second


def test_configuration_is_saved_and_loaded(tmp_path):
    config = pvt_hf.MaskRCNNConfig()
    assert config.num_labels == 80 and config.backbone_config.out_features == STAGES and config.use_masks
    config = pvt_hf.MaskRCNNConfig(id2label={0: "cat", 1: "dog"}, use_masks=False, max_detections=7)
    config.save_pretrained(tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is pvt_hf.MaskRCNNConfig and type(loaded.backbone_config) is pvt_hf.PvtConfig
    assert loaded.to_diff_dict() == config.to_diff_dict() and loaded.num_labels == 2


@torch.no_grad()
def test_initialisation_is_mmdetections():
    model = small_model("v2", neck_channels=64, box_head_size=256)
    for name, parameter in model.named_parameters():
        if name.startswith(("backbone.", "neck.")):
            continue
        if name.endswith("bias"):
            assert not parameter.any(), name
            continue
        fan_in, fan_out = parameter[0].numel(), parameter[:, 0].numel()
        if name.startswith("rpn."):
            std = 0.01
        else:
            std = (2 / (fan_in + fan_out)) ** 0.5 if name.startswith("box_head.") else (2 / fan_out) ** 0.5
        assert abs(parameter.std() / std - 1) < 0.15, name


@torch.no_grad()
def test_another_number_of_classes_keeps_all_other_tensors(tmp_path):
    model = randomize(small_model())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert loaded.eval()(torch.randn(1, 3, 64, 64)).logits.shape[-1] == 4
    saved, kept = model.state_dict(), loaded.state_dict()
    new = {name for name in saved if kept[name].shape != saved[name].shape}
    assert {name.rsplit(".", 1)[0] for name in new} == {
        "box_head.class_predictor",
        "box_head.box_predictor",
        "mask_head.predictor",
    }
    assert all(torch.equal(kept[name], saved[name]) for name in saved.keys() - new)
    model.save_pretrained(tmp_path, state_dict=checkpoints.without(saved, "rpn.conv.weight"))
    with pytest.raises(ValueError, match=r"in another shape, 1 tensors \['rpn.conv.weight'\]"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("backbone", ["v1", "v2"])
def test_pretrained_backbone_fills_every_tensor_of_it(backbone, tmp_path):
    classifier = transformers.AutoModelForImageClassification.from_config(backbone_config(backbone))
    randomize(classifier).save_pretrained(tmp_path)
    model = small_model(backbone)
    saved = classifier.base_model.state_dict()
    count = load_pretrained_backbone(model, tmp_path)
    assert count == len(model.backbone.state_dict())
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.backbone.state_dict().items())


@pytest.mark.parametrize("backbone", ["v1", "v2"])
def test_checkpointing_and_attention_implementation_reach_the_backbone(backbone):
    model = randomize(small_model(backbone)).double().train()
    pixels, mask = padded_batch(SIZES, INPUT_SIZE)

    def step():
        model.zero_grad()
        torch.manual_seed(2)
        loss = model(pixels, mask, labels=labels_of(OBJECTS)).loss
        loss.backward()
        return loss, [parameter.grad.clone() for parameter in model.parameters()]

    plain = step()
    model.activation_checkpointing_enable()
    assert_close(step(), plain, rtol=0, atol=0)
    model.activation_checkpointing_disable()
    model.set_attn_implementation("eager")
    assert model.backbone.config._attn_implementation == "eager"
    assert_close(step(), plain, rtol=1e-8, atol=1e-10)


def test_coordinates_and_losses_stay_in_float32():
    pixels, mask = padded_batch(SIZES, INPUT_SIZE, torch.float32)
    model = small_model("v2").train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(pixels, mask, labels=labels_of(OBJECTS))
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert outputs.loss.dtype == torch.float32
    with torch.no_grad():
        detections = model.eval().bfloat16()(pixels.bfloat16(), mask)
    for name in ("scores", "pred_boxes", "logits", "pred_masks"):
        assert detections[name].dtype == torch.float32, name


def test_images_without_objects_have_a_loss():
    model = small_model().train()
    pixels = torch.randn(2, 3, 64, 64)
    empty = {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4), "masks": torch.zeros(0)}
    outputs = model(pixels, labels=[empty, empty])
    assert [outputs.loss_dict[f"loss_{name}"].item() for name in ("rpn_box", "box", "mask")] == [0, 0, 0]
    outputs.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        model.box_head.class_predictor.bias[-1] = 100.0  # everything is background
        outputs = model.eval()(pixels)
    assert outputs.scores.eq(0).all() and outputs.class_labels.eq(-1).all()
    assert [len(image["labels"]) for image in detect_objects(outputs, 0.0)] == [0, 0]
    assert all(image["segmentation"].eq(-1).all() for image in segment_instances(outputs))


def test_object_without_a_mask_trains_its_box_only():
    """Its RoIs do not count in the loss of the masks; labels that do not say it have all of them."""
    labels = labels_of(OBJECTS)
    sizes = torch.tensor(SIZES)
    boxes = [torch.tensor([box for box, _ in image]) for image in OBJECTS]
    samples = [SampledRoIs(image, torch.arange(len(image)), num_truths=0) for image in boxes]
    logits = torch.randn(4, CLASSES, 28, 28)
    head = MaskHead(small_model().config)

    def loss(has_masks=None, last=True):
        given = [*labels] if has_masks is None else [
            labels[0] | {"has_masks": torch.tensor(has_masks)}, labels[1] | {"has_masks": torch.tensor([last])}
        ]  # fmt: skip
        truths = read_ground_truths(given, sizes, CLASSES, torch.float32, INPUT_SIZE)
        return head.loss(logits, samples, truths)["loss_mask"].item()

    single = [loss([index == 0, index == 1, index == 2], last=index == 3) for index in range(4)]
    assert loss() == loss([True] * 3) == pytest.approx(sum(single) / 4)
    assert loss([True, False, True]) == pytest.approx((single[0] + single[2] + single[3]) / 3)
    assert loss([False] * 3, last=False) == 0 and len(set(single)) == 4
    with pytest.raises(ValueError, match=r"`labels\[0\]\['has_masks'\]` must be bool of shape \(3,\)"):
        loss([True, False])


def test_wrong_masks_are_refused():
    model, pixels = small_model(), torch.randn(1, 3, 64, 64)
    label = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    with pytest.raises(ValueError, match=r"`labels\[0\]` must have tensors .* without \['masks'\]"):
        model(pixels, labels=[label])
    with pytest.raises(ValueError, match=r"`labels\[0\]\['masks'\]` must have shape \(1, 64, 64\), got \(1, 32, 64\)"):
        model(pixels, labels=[label | {"masks": torch.ones(1, 32, 64)}])
    with pytest.raises(ValueError, match="`strides` must have one value for each of the 5 levels"):
        pvt_hf.MaskRCNNConfig(strides=[4])
