"""The registry against what it describes: each variant is rebuilt, and its parameters and multiply-adds are counted."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

import pvt_hf
from pvt_hf.variants import get_variant


def build_on_meta(name: str):
    with torch.device("meta"):
        return AutoModelForImageClassification.from_config(pvt_hf.build_config(name)).eval()


def multiply_adds(name: str) -> float:
    model = build_on_meta(name)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", pvt_hf.VARIANTS)
def test_parameters_are_the_released_ones(name):
    parameters = sum(parameter.numel() for parameter in build_on_meta(name).parameters()) / 1e6
    assert parameters == pytest.approx(pvt_hf.VARIANTS[name].released_params, abs=0.051)


@pytest.mark.process
@pytest.mark.parametrize("name", pvt_hf.VARIANTS)
def test_multiply_adds_are_the_papers(name):
    assert multiply_adds(name) == pytest.approx(pvt_hf.VARIANTS[name].paper_gflops, abs=0.15)


def test_disagreements_of_paper_and_release_are_stored():
    variants = pvt_hf.VARIANTS
    differing = {
        name: (variant.paper_params, variant.released_params)
        for name, variant in variants.items()
        if variant.paper_params != variant.released_params
    }
    assert differing == {"pvt_v2_b0": (3.4, 3.7), "pvt_v2_b1": (13.1, 14.0)}
    assert [(v.name, v.paper_top1, v.released_top1) for v in variants.values() if v.paper_top1 != v.released_top1] == [
        ("pvt_v2_b3", 83.2, 83.1)
    ]


def test_urls_are_those_of_the_release():
    url = "https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b2_li.pth"
    assert pvt_hf.VARIANTS["pvt_v2_b2_li"].checkpoint_url == url
    assert len({variant.checkpoint_url for variant in pvt_hf.VARIANTS.values()}) == 11


def test_overrides_are_fields():
    config = pvt_hf.build_config("pvt_small", num_labels=7, drop_path_rate=0.2, image_size=(512, 2048))
    assert (config.num_labels, config.drop_path_rate, config.image_shape) == (7, 0.2, (512, 2048))
    assert pvt_hf.build_config("pvt_v2_b2").num_labels == 1000
    assert pvt_hf.build_config("pvt_v2_b2", id2label=None).num_labels == 1000
    assert pvt_hf.build_config("pvt_v2_b2", id2label={0: "cat", 1: "dog"}).num_labels == 2


def test_unknown_variant_names_the_nearest():
    with pytest.raises(ValueError, match=r"`name`.*'pvt_v2_b2li'.*pvt_v2_b2_li"):
        pvt_hf.build_config("pvt_v2_b2li")
    with pytest.raises(ValueError, match="pvt_tiny"):
        get_variant("")


def test_unknown_field_names_the_nearest():
    with pytest.raises(ValueError, match="'drop_path'.*drop_path_rate"):
        pvt_hf.build_config("pvt_tiny", drop_path=0.1)
