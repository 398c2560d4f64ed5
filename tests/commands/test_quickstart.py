"""`pvt-hf quickstart` on a stranger's images; on the digits, `test_readme.py` runs it."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageClassification

from pvt_hf.commands.quickstart import load_model, main, parse

pytestmark = pytest.mark.process


@pytest.fixture
def images(tmp_path, monkeypatch) -> Path:
    """Two classes, in a folder that is the current one's."""
    monkeypatch.chdir(tmp_path)
    for index in range(24):
        folder = Path("images", ("bright", "dark")[index % 2])
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + index, 50), color=(10 * index, 128, 255 * (index % 2))).save(folder / f"{index}.png")
    return tmp_path / "images"


def test_on_an_image_folder_and_a_checkpoint(images, capsys):
    """v1 from random weights, then again from the checkpoint that this leaves; the program of its card loads it."""
    common = ["--data_dir", str(images), "--epochs", "1", "--batch_size", "4"]
    first = ["--variant", "pvt_tiny", "--image_size", "32", "--output_dir", "first"]
    for arguments in (first, ["--model_name_or_path", "first", "--output_dir", "second", "--license", "mit"]):
        assert main([*common, *arguments]) == 0
    accuracy = re.findall(r"validation accuracy ([\d.]+); ", capsys.readouterr().out)[1]
    model = AutoModelForImageClassification.from_pretrained("second")
    assert model.config.model_type == "pvt" and model.config.id2label == {0: "bright", 1: "dark"}
    card = ModelCard.load("second/README.md")
    assert card.data.license == "mit" and "license" not in ModelCard.load("first/README.md").data.to_dict()
    assert [f"{result.metric_value:.4f}" for result in card.data.eval_results] == [accuracy]
    assert "trained by pvt_hf on `images` from\n`first`. On the 5 validation" in card.content
    assert "![predictions](predictions.png)" in card.content and Path("second/predictions.png").is_file()
    assert str(images.parent) not in card.content
    namespace = {}
    Image.new("RGB", (40, 50)).save("image.jpg")
    exec(re.search(r"```python\n(.*?)```", card.text, flags=re.DOTALL)[1], namespace)
    assert {found["label"] for found in namespace["predict"](Image.open("image.jpg"))} == {"bright", "dark"}


@pytest.mark.parametrize(
    ("arguments", "side"), [([], 64), (["--image_size", "32"], 32), (["--data_dir", "images"], 224)]
)
def test_size_is_that_of_the_data(arguments, side):
    model, image_processor = load_model(parse(["--variant", "pvt_tiny", *arguments]), ["a", "b"])
    assert model.config.image_shape == (side, side)
    assert image_processor(Image.new("RGB", (30, 40)), return_tensors="pt").pixel_values.shape == (1, 3, side, side)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_dir", "none"], "--data_dir none cannot be read: "),
        (["--data_dir", "images/dark"], "--data_dir must have a folder of images for each class, and images/dark has"),
        (["--model_name_or_path", "images"], "images cannot be loaded: it must be a folder with a model's config.json"),
    ],
)
def test_wrong_arguments_are_a_line(arguments, message, images):
    with pytest.raises(SystemExit) as raised:
        main([*arguments, "--output_dir", "out"])
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value) and not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--license", "Apache 2"], "`license` must be the Hub's identifier of a licence"),
        (["--output_dir", "images/dark/1.png/x"], "--output_dir images/dark/1.png/x cannot be written: "),
    ],
)
def test_wrong_values_are_a_usage_error(arguments, message, images, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
