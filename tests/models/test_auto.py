"""`import pvt_hf` costs what transformers costs, and every Auto class and pipeline knows PVT."""

import os
import pickle
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import pipeline

import pvt_hf
from tests.support.small_models import ROOT, STAGES, randomize, small_config


def run(code: str, *args: str) -> str:
    """The output of a fresh Python process in which this repository can be imported."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_cheap():
    """In CPU time, at most a tenth over what every program that trains a classifier imports anyway."""

    def cpu_seconds(code: str) -> float:
        return float(run(f"{code}\nimport time; print(time.process_time())").splitlines()[-1])

    base, ours = "from transformers import AutoModelForImageClassification, Trainer", "import pvt_hf"
    pairs = [(cpu_seconds(base), cpu_seconds(ours)) for _ in range(3)]
    assert statistics.median(b / a for a, b in pairs) <= 1.1


@pytest.mark.parametrize("order", ["pvt_hf first", "transformers first", "auto used first"])
def test_every_auto_class(order):
    imports = {
        "pvt_hf first": "import pvt_hf\nfrom transformers import *",
        "transformers first": "from transformers import *\nimport pvt_hf",
        "auto used first": "from transformers import *\nAutoConfig.for_model('pvt')\nPvtModel\nimport pvt_hf",
    }[order]
    run(
        imports.replace(
            "import *",
            "import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, PvtModel, PvtV2Model, "
            "AutoModelForImageClassification",
        )
        + """
import sys, torch, transformers
for model_type, prefix in (("pvt", "Pvt"), ("pvt_v2", "PvtV2")):
    config = AutoConfig.for_model(model_type)
    assert type(config) is getattr(pvt_hf, f"{prefix}Config"), type(config)
    with torch.device("meta"):
        for auto_class, name in (
            (AutoModel, "Model"),
            (AutoModelForImageClassification, "ForImageClassification"),
            (AutoBackbone, "Backbone"),
        ):
            assert type(auto_class.from_config(config)) is getattr(pvt_hf, prefix + name)
    # transformers' own classes stay what they are
    assert getattr(transformers, f"{prefix}Model").__module__.startswith("transformers.")
"""
    )


@pytest.mark.parametrize(
    "config",
    [
        "from pvt_hf.models.configuration_pvt_v2 import PvtV2Config; config = PvtV2Config()",
        "from pvt_hf.models.modeling_pvt_v2 import PvtV2Backbone; config = PvtV2Backbone.config_class()",
        "import pvt_hf; config = pvt_hf.PvtV2Backbone.config_class()",
        "import pickle, sys; config = pickle.loads(bytes.fromhex(sys.argv[1]))",
        "import pvt_hf, transformers; config = transformers.AutoConfig.for_model('pvt_v2')",
        "from transformers import AutoImageProcessor; import pvt_hf; config = pvt_hf.build_config('pvt_v2_b0')",
    ],
    ids=["submodule", "model", "class attribute", "pickle", "auto", "processor first"],
)
def test_a_configuration_from_anywhere_is_known(config):
    """Where transformers' class of the same name has been imported before: the fallback by name would find that."""
    run(
        f"""
from transformers import AutoBackbone, AutoModel, PvtV2Backbone, PvtV2Model
{config}
import pvt_hf
assert type(AutoModel.from_config(config)) is pvt_hf.PvtV2Model
assert type(AutoBackbone.from_config(config)) is pvt_hf.PvtV2Backbone
""",
        pickle.dumps(pvt_hf.PvtV2Config()).hex(),
    )


def test_native_modules_import_quietly_after_ours():
    """transformers reads the checkpoint name in our docstring when it documents its own classes."""
    code = "import pvt_hf; pvt_hf.PvtModel; import transformers; transformers.PvtModel; transformers.PvtV2Backbone"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and "ERROR" not in result.stdout + result.stderr


@pytest.fixture(scope="module", params=["v1", "v2"])
def checkpoint(request, tmp_path_factory):
    """A saved classifier with its image processor."""
    folder = tmp_path_factory.mktemp(request.param)
    model_class = pvt_hf.PvtForImageClassification if request.param == "v1" else pvt_hf.PvtV2ForImageClassification
    names = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
    config = {key: value for key, value in small_config(request.param).to_dict().items() if key not in names}
    del config["num_labels"]
    randomize(model_class(model_class.config_class(**(config | names)))).save_pretrained(folder)
    pvt_hf.PvtImageProcessor(crop_size=64).save_pretrained(folder)
    return folder


def test_from_pretrained(checkpoint):
    native = type(transformers.AutoConfig.from_pretrained(checkpoint)).__name__.removesuffix("Config")
    for auto_class, suffix in (
        (transformers.AutoModel, "Model"),
        (transformers.AutoModelForImageClassification, "ForImageClassification"),
    ):
        assert type(auto_class.from_pretrained(checkpoint)) is getattr(pvt_hf, native + suffix)
    config = transformers.AutoConfig.from_pretrained(checkpoint, out_features=STAGES)
    backbone = transformers.AutoBackbone.from_config(config)
    assert type(backbone) is getattr(pvt_hf, f"{native}Backbone") and len(backbone.channels) == 4
    for backend, suffix in (("torchvision", ""), ("pil", "Pil")):
        processor = transformers.AutoImageProcessor.from_pretrained(checkpoint, backend=backend)
        assert type(processor) is getattr(pvt_hf, f"PvtImageProcessor{suffix}")
        assert dict(processor.size) == {"shortest_edge": 73}


def test_pipelines(checkpoint):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    best = pipeline("image-classification", model=str(checkpoint))(image)
    assert {entry["label"] for entry in best} == {"cat", "dog", "owl"}
    assert sum(entry["score"] for entry in best) == pytest.approx(1)
    model = transformers.AutoModelForImageClassification.from_pretrained(checkpoint)
    processor = transformers.AutoImageProcessor.from_pretrained(checkpoint)
    logits = model(**processor(image, return_tensors="pt")).logits
    assert best[0]["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)
    features = pipeline("image-feature-extraction", model=str(checkpoint))(image, return_tensors=True)
    expected = model.base_model(**processor(image, return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
