"""The tables of the migration pages name what there is. (Their blocks run and their options are looked up with those of
all pages.)"""

import re
from dataclasses import fields

import pytest
import torch
import transformers

import pvt_hf
from pvt_hf.models.configuration_pvt import LabelledConfig
from pvt_hf.recipes import DETECTION_RECIPES, SEGMENTATION_RECIPES
from tests.support.pages import PAGES
from tests.support.small_models import small_config

MIGRATION = {page.stem: page.read_text() for page in PAGES if page.parent.name == "migration"}
DETECTORS = [name for name in pvt_hf.__all__ if name.endswith("Config") and "Pvt" not in name and "FPN" not in name]


def build_config(name: str):
    return (getattr(pvt_hf, name, None) or getattr(transformers, name))()


@pytest.mark.parametrize("page", MIGRATION)
def test_fields_exist(page):
    """Those that are written as `Config.field`."""
    named = re.findall(r"`(\w+Config)\.(\w+)`", MIGRATION[page])
    assert named or not page.startswith("mm")
    configs = {name: build_config(name) for name in {name for name, _ in named}}
    assert not [(name, field) for name, field in named if not hasattr(configs[name], field)]


@pytest.mark.parametrize("name", DETECTORS)
def test_every_field_of_a_detector_has_a_counterpart(name):
    """But for those that another table or a column beside it is about."""
    elsewhere = {"backbone_config", "use_masks"}
    own = {field.name for field in fields(getattr(pvt_hf, name))} - {field.name for field in fields(LabelledConfig)}
    assert own - elsewhere <= set(re.findall(rf"`{name}\.(\w+)`", MIGRATION["mmdetection"]))


def test_every_recipe_is_named():
    for page, recipes in (("mmdetection", DETECTION_RECIPES), ("mmsegmentation", SEGMENTATION_RECIPES)):
        assert set(re.findall(r"--recipe (\w+)", MIGRATION[page])) == recipes.keys()


def test_module_names_of_the_released_code():
    """The second and third column are attributes of the backbones."""
    rows = re.findall(r"^\| `\w+1\b.*?` \|(.*)\|(.*)\|$", MIGRATION["official-code"], flags=re.MULTILINE)
    assert len(rows) == 6
    backbones = pvt_hf.PvtV2Backbone(small_config("v2")), pvt_hf.PvtBackbone(small_config("v1"))
    for row in rows:
        for backbone, cell in zip(backbones, row, strict=True):
            if name := cell.strip(" `"):
                assert isinstance(
                    eval(f"backbone.{name}", {"backbone": backbone}), torch.nn.Module | torch.nn.Parameter
                )
