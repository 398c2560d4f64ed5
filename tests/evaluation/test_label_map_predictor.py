"""Test-time augmentation: of segmenters and classifiers, against slow averages."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageClassification, AutoModelForSemanticSegmentation

import pvt_hf
from pvt_hf.evaluation.classifier_views import ClassifierViews
from pvt_hf.evaluation.label_map_predictor import LabelMapPredictor
from tests.support.small_models import STAGES, randomize, small_config

PROCESSOR = pvt_hf.PvtSegmentationImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
IMAGE = torch.randint(256, (3, 50, 70), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    config = pvt_hf.SemanticFPNConfig(
        backbone_config=small_config("v2", out_features=STAGES), neck_channels=8, head_channels=8, num_labels=5
    )
    model = randomize(AutoModelForSemanticSegmentation.from_config(config), std=0.3).eval()
    with torch.no_grad():  # no class shall have every pixel
        model.head.classifier.bias -= model(*LabelMapPredictor(PROCESSOR).prepare(IMAGE)).logits.mean((0, 2, 3))
    return model


@torch.no_grad()
def test_views_of_an_image_are_averaged_at_its_size(segmenter):
    """Softmax of each view at the original size, mirrored ones turned back, as mmsegmentation."""
    total = 0
    for edge in (64, 48, 96):
        processor = pvt_hf.PvtSegmentationImageProcessor(size={"shortest_edge": edge, "longest_edge": 4 * edge})
        view = processor(IMAGE, return_tensors="pt").pixel_values
        for mirrored in (False, True):
            logits = segmenter(view.flip(-1) if mirrored else view).logits
            logits = logits.flip(-1) if mirrored else logits
            for size in (view.shape[-2:], (50, 70)):
                logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            total = total + logits.softmax(1)
    predictor = LabelMapPredictor(PROCESSOR, scales=(0.75, 1.5), flip=True)
    labels, logits = predictor(segmenter, predictor.prepare(IMAGE), (50, 70))
    assert torch.equal(labels, total.argmax(1)[0]) and len(labels.unique()) > 1
    single = LabelMapPredictor(PROCESSOR)
    plain, expected = single(segmenter, single.prepare(IMAGE), (50, 70))
    assert torch.equal(logits, expected) and not torch.equal(plain, labels)
    (processed,) = PROCESSOR.post_process_semantic_segmentation(segmenter(*single.prepare(IMAGE)), [(50, 70)])
    assert torch.equal(plain, processed)


@torch.no_grad()
def test_mirrored_image_has_the_mirrored_map(segmenter):
    """With windows too, which then have to lie symmetrically."""
    for windows in ({}, {"window": 64, "stride": 32}):
        predictor = LabelMapPredictor(PROCESSOR, flip=True, **windows)
        labels, mirrored = (
            predictor(segmenter, predictor.prepare(image), (50, 70))[0] for image in (IMAGE, IMAGE.flip(-1))
        )
        assert (labels.flip(-1) == mirrored).float().mean() > 0.999  # but for rounding
    with pytest.raises(ValueError, match=r"`scales` must be positive, got \[0\]"):
        LabelMapPredictor(PROCESSOR, scales=[0])


@torch.no_grad()
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_views_of_a_classifier_are_averaged(version):
    model = randomize(AutoModelForImageClassification.from_config(small_config(version)), std=0.2).eval()
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 4])
    larger = F.interpolate(images, (96, 96), mode="bicubic", antialias=True)
    views = [images, images.flip(-1), larger, larger.flip(-1)]
    mean = torch.stack([model(view).logits.softmax(-1) for view in views]).mean(0)
    outputs = ClassifierViews(model, scales=(1.5,), flip=True)(images, labels)
    torch.testing.assert_close(outputs.logits.exp(), mean)
    torch.testing.assert_close(outputs.loss, F.nll_loss(mean.log(), labels))
    torch.testing.assert_close(ClassifierViews(model)(images).logits.softmax(-1), model(images).logits.softmax(-1))
