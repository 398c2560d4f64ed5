"""What `pip install pvt_hf` alone can do: every model, processor and the converter, and a clear word about the rest."""

import subprocess

import pytest

from tests.support.forks import run_fork
from tests.support.processes import list_variables

pytestmark = pytest.mark.process

EXTRAS = (
    "accelerate",
    "cv2",
    "datasets",
    "evaluate",
    "faster_coco_eval",
    "matplotlib",
    "peft",
    "scipy",
    "sklearn",
    "timm",
)
EXTRAS += ("av", "gradio", "mkdocs", "onnx", "onnxruntime", "onnxscript", "openvino")
# They may be installed here, so the process is told that they are not, and forgets those that it has imported.
WITHOUT = f"""
import importlib.util, sys
EXTRAS = {EXTRAS!r}
for name in [name for name in sys.modules if name.split(".")[0] in EXTRAS]:
    del sys.modules[name]

class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing)
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in EXTRAS else find_spec(name, *rest)
"""


def run(code: str, tmp_path) -> subprocess.CompletedProcess:
    return run_fork(["-c", WITHOUT + code], list_variables(), tmp_path)


def test_every_model_and_processor_works(tmp_path):
    code = """
import torch, pvt_hf
image = torch.zeros(3, 64, 96, dtype=torch.uint8)
for variant in ("pvt_tiny", "pvt_v2_b0"):
    config = pvt_hf.build_config(variant, num_labels=3)
    model = {"pvt": pvt_hf.PvtForImageClassification, "pvt_v2": pvt_hf.PvtV2ForImageClassification}[config.model_type]
    pixels = pvt_hf.PvtImageProcessor(crop_size=64)(image, return_tensors="pt").pixel_values
    assert model(config).eval()(pixels).logits.shape == (1, 3)
for model_class, processor in (
    (pvt_hf.RetinaNetForObjectDetection, pvt_hf.PvtDetectionImageProcessor),
    (pvt_hf.MaskRCNNForInstanceSegmentation, pvt_hf.PvtDetectionImageProcessor),
    (pvt_hf.SemanticFPNForSemanticSegmentation, pvt_hf.PvtSegmentationImageProcessor),
):
    batch = processor(size={"shortest_edge": 64, "longest_edge": 96})(image, return_tensors="pt")
    with torch.no_grad():
        model_class(model_class.config_class(num_labels=3)).eval()(batch["pixel_values"])
"""
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_converter_works(tmp_path):
    code = """
import torch
from tests.support.checkpoints import TINY, official_weights
from pvt_hf.commands.main import main
torch.save(official_weights(TINY["v2"]), "tiny.pth")
sys.exit(main(["convert", "tiny.pth", "converted"]))
"""
    result = run(code, tmp_path)
    assert result.returncode == 0 and (tmp_path / "converted" / "model.safetensors").is_file(), result.stderr


def test_predictions_and_information_work(tmp_path):
    code = """
import pvt_hf
from PIL import Image
from pvt_hf.commands.main import main
from tests.support.small_models import small_config
pvt_hf.PvtForImageClassification(small_config("v1")).save_pretrained("model")
pvt_hf.PvtImageProcessor(crop_size=32).save_pretrained("model")
Image.new("RGB", (40, 50)).save("a.png")
sys.exit(main(["predict", "model", "a.png", "--output_dir", "out"]) or main(["info", "model"]))
"""
    result = run(code, tmp_path)
    assert result.returncode == 0 and (tmp_path / "out" / "pictures" / "a.jpg").is_file(), result.stderr
    assert "at random      none" in result.stdout


@pytest.mark.parametrize(
    "command",
    [
        "evaluate",
        *(
            pytest.param(f"train-{task}", marks=pytest.mark.slow)
            for task in ("classification", "detection", "segmentation")
        ),
    ],
)
def test_a_program_says_what_to_install(tmp_path, command):
    result = run(f"from pvt_hf.commands.main import main\nsys.exit(main([{command!r}, '--smoke']))", tmp_path)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert 'pip install "pvt_hf[training]"' in result.stderr + result.stdout


def test_help_works(tmp_path):
    result = run("from pvt_hf.commands.main import main\nmain(['--help'])", tmp_path)
    assert result.returncode == 0 and "train-detection" in result.stdout
