"""What a training run leaves is published as it is: its card is true, and the programs in it load the model."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image
from transformers import DetrForObjectDetection

import pvt_hf
from pvt_hf.data.digits import write_scenes
from pvt_hf.writing.hub import UploadError
from tests.support import classification_run, detection_run, segmentation_run

CODE = {"classifier": "pvt_v2", "detector": "retinanet", "segmenter": "semantic_fpn"}
WITHOUT_PVT_HF = """
import os, sys
sys.modules["pvt_hf"] = None  # not installed
os.chdir(sys.argv[1])
from transformers import PreTrainedModel
for program in sys.argv[2:]:
    namespace = {}
    exec(program, namespace)
    loaded = namespace["predict"]
    parts = [part for part in loaded.model.modules() if isinstance(part, PreTrainedModel)]
    for part in (*parts, *(part.config for part in parts), loaded.image_processor):
        assert type(part).__module__.startswith("transformers_modules."), type(part)
"""


def list_programs(card: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "scenes", images=8, validation=2)


def build(name: str, folder: Path, scenes: Path, **arguments):
    arguments = {"max_steps": 1, "trainer": {"with_code": True}} | arguments
    if name == "classifier":
        processor = pvt_hf.PvtImageProcessorPil(crop_size=32)
        arguments["trainer"] = {"processing_class": processor} | arguments["trainer"]
        return classification_run.build(folder / name, **arguments)
    if name == "detector":
        return detection_run.build(folder / name, scenes, changes={"warmup_iterations": 0}, **arguments)
    return segmentation_run.build(folder / name, scenes, **arguments)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, scenes) -> Path:
    """A folder with what one step of each training program's trainer leaves, and an image."""
    folder = tmp_path_factory.mktemp("runs")
    Image.linear_gradient("L").convert("RGB").resize((96, 64)).save(folder / "image.jpg")
    for name in CODE:
        trainer = build(name, folder, scenes)
        trainer.train()
        trainer.finish()
        assert not any(saved._auto_class for saved in trainer.code.values())
    return folder


@pytest.mark.process
@pytest.mark.parametrize("name", CODE)
def test_card_is_true_and_its_program_runs(name, runs, monkeypatch, logged_errors):
    monkeypatch.chdir(runs)
    card, metadata = ModelCard.load(f"{name}/README.md"), metadata_load(f"{name}/README.md")
    assert metadata == card.data.to_dict() and str(runs) not in card.content
    # What the Hub's own library makes of the metadata, there and back.
    model_name, results = model_index_to_eval_results(metadata["model-index"])
    assert model_name == name and eval_results_to_model_index(name, results) == metadata["model-index"]
    measured = json.loads(Path(name, "eval_results.json").read_text())
    assert results and all(result.metric_value == measured[f"eval_{result.metric_type}"] >= 0 for result in results)
    assert {result.task_type for result in results} == {metadata["pipeline_tag"]}
    pictures = set(re.findall(r"!\[\w+\]\((.*?)\)", card.text))
    assert pictures == {"curves.png", "predictions.png"} and all(Path(name, picture).is_file() for picture in pictures)
    program, _ = list_programs(card)
    namespace = {}
    exec(program, namespace)
    assert isinstance(namespace["predict"](Image.open("image.jpg")), list) and not logged_errors
    assert type(namespace["predict"].model).__module__ == f"pvt_hf.models.modeling_{CODE[name]}"


@pytest.mark.process
def test_saved_code_loads_without_pvt_hf(runs, python):
    """The second program of each card, where pvt_hf cannot be imported."""
    programs = [list_programs(ModelCard.load(runs / name / "README.md"))[1] for name in CODE]
    assert all("trust_remote_code=True" in program and "pvt_hf" not in program for program in programs)
    result = python("-c", WITHOUT_PVT_HF, runs, *programs)
    assert result.returncode == 0, result.stderr
    assert "label" in result.stdout


def test_code_is_saved_only_when_it_is_asked_for(scenes, tmp_path):
    trainer = build("detector", tmp_path, scenes, trainer={})
    trainer.save_model()
    assert not list((tmp_path / "detector").glob("*.py")) and trainer.code == {}
    assert "auto_map" not in (tmp_path / "detector" / "config.json").read_text()


def test_code_of_transformers_is_not_saved(scenes, tmp_path):
    with pytest.raises(ValueError, match="`with_code` needs a model of pvt_hf: a DetrForObjectDetection is"):
        build("detector", tmp_path, scenes, recipe="detr_50ep")
    assert issubclass(type(detection_run.small_detector("detr")), DetrForObjectDetection)


@pytest.mark.parametrize("name", CODE)
def test_a_hub_that_refuses_the_repository_is_a_line(name, online, scenes, tmp_path):
    """It is made before the first step."""
    online.fault = {"repos/create": 401}
    with pytest.raises(UploadError) as raised:
        build(name, tmp_path, scenes, push_to_hub=True, hub_model_id="me/run")
    message = str(raised.value)
    assert message.startswith("The repository me/run could not be made: the Hub answers 401: it does not accept your")
    assert "hf auth login" in message and "\n" not in message
