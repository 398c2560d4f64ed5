"""The page without a server: what its JavaScript does to an image, what makes it, and the page in a real browser."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

import pvt_hf
from pvt_hf.data.digits import load_digit_images
from tests.support.browser import open_browser, open_page, serve_folder
from tests.support.small_models import ROOT, SMALL_V2, randomize

PREPROCESS = (ROOT / "docs" / "try" / "preprocess.js").as_uri()
MAKE = ROOT / "docs" / "make_try_page.py"


def run_javascript(program: str, *values) -> object:
    """What a program that knows `preprocess` and `values` prints, which is JSON."""
    if shutil.which("node") is None:
        pytest.skip("there is no node")
    code = f"import * as preprocess from '{PREPROCESS}';\nconst values = {json.dumps(values)};\n{program}"
    command = ["node", "--input-type=module", "-"]
    result = subprocess.run(command, input=code, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def as_image(pixels: np.ndarray) -> dict:
    height, width = pixels.shape[:2]
    return {"width": width, "height": height, "data": pixels.flatten().tolist()}


@pytest.mark.process
@pytest.mark.parametrize("shape", [(8, 8), (50, 31), (64, 64), (70, 130)])
def test_pixels_are_those_of_the_image_processor(shape):
    """Enlarged, shrunk in one direction or both, and as it is: within a grey level of 8 bits."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    processor = pvt_hf.PvtImageProcessor(size={"height": 64, "width": 48})
    settings = json.loads(processor.to_json_string())
    program = "const {shape, values: found} = preprocess.prepare(values[0], values[1]);"
    found = run_javascript(f"{program} console.log(JSON.stringify([shape, [...found]]))", as_image(pixels), settings)
    assert found[0] == [1, 3, 64, 48]
    expected = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
    std = torch.tensor(processor.image_std)[:, None, None]
    levels = 255 * std * (torch.tensor(found[1]).reshape(found[0]) - expected).abs()
    assert levels.max() < 1.01 and levels.mean() < 0.02


@pytest.mark.process
def test_a_drawing_becomes_a_digit_as_those_of_the_data():
    """Its ink fills the height or the width, in the middle, wherever and however large it was drawn."""
    drawing = np.zeros((280, 280), dtype=np.uint8)
    drawing[100:180, 40:60] = 255  # a stroke of 80 x 20
    empty = np.zeros_like(drawing)
    program = "console.log(JSON.stringify(values.map(preprocess.toDigit)))"
    digit, none = run_javascript(program, as_image(drawing), as_image(empty))
    pixels = np.array([digit["data"][str(place)] for place in range(192)]).reshape(8, 8, 3)[..., 0]
    assert (pixels[:, 3:5] == 255).all() and pixels[:, [0, 1, 2, 5, 6, 7]].sum() == 0 and none is None


def test_a_model_that_the_page_cannot_have_is_a_line(tmp_path):
    """Checked before anything is exported or fetched."""
    namespace = {"__name__": "make_try_page", "__file__": str(MAKE)}
    exec(compile(MAKE.read_text(), MAKE, "exec"), namespace)
    config = pvt_hf.PvtV2Config(**SMALL_V2 | {"num_labels": 10}, id2label={n: str(n) for n in range(10)})
    model = pvt_hf.PvtV2ForImageClassification(config)
    model.save_pretrained(tmp_path)
    pvt_hf.PvtImageProcessor(crop_size=64).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="with a crop"):
        namespace["load_classifier"](tmp_path)
    pvt_hf.PvtImageProcessor(size=64).save_pretrained(tmp_path)
    namespace["load_classifier"](tmp_path)
    with pytest.raises(SystemExit, match="is not a page of this program"):
        namespace["check_output"](tmp_path)
    model.config.id2label = {n: f"class {n}" for n in range(10)}
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="not a classifier of the digits"):
        namespace["load_classifier"](tmp_path)


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory):
    """A small classifier that has learned nothing, but says something else of each digit."""
    folder = tmp_path_factory.mktemp("digits") / "model"
    config = pvt_hf.PvtV2Config(**SMALL_V2 | {"num_labels": 10}, id2label={n: str(n) for n in range(10)})
    randomize(pvt_hf.PvtV2ForImageClassification(config), std=0.2).eval().save_pretrained(folder)
    pvt_hf.PvtImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def try_page(digits_model):
    if shutil.which("npm") is None:
        pytest.skip("there is no npm")
    folder = digits_model.parent / "site" / "try"
    command = [sys.executable, MAKE, digits_model, folder]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def read_classes(page) -> dict[str, float]:
    """What the page shows, when it is there."""
    page.locator("#classes li").nth(4).wait_for()
    page.get_by_text("Computed on this device").wait_for()
    rows = page.locator("#classes li").all()
    return {row.locator("span").inner_text(): float(row.locator("data").get_attribute("value")) for row in rows}


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(900)
def test_a_visitor_gets_the_probabilities_of_the_pipeline(digits_model, try_page, tmp_path):
    images, labels = load_digit_images("validation")
    digit = Image.fromarray(images[labels.index(3)])
    digit.save(tmp_path / "three.png")
    expected = {found["label"]: found["score"] for found in pipeline("image-classification", str(digits_model))(digit)}
    with open_browser() as browser, serve_folder(try_page) as address:
        page, outside = open_page(browser, address, viewport={"width": 360, "height": 740}, has_touch=True)
        page.get_by_role("button", name="3.png").click()
        assert read_classes(page) == pytest.approx(expected, abs=1e-3)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.screenshot(path=tmp_path / "phone.png", full_page=True)

        page.get_by_role("button", name="Clear").click()
        assert page.locator("#classes li").count() == 0
        page.set_input_files("#file", tmp_path / "three.png")
        assert read_classes(page) == pytest.approx(expected, abs=1e-3)

        box = page.locator("#pad").bounding_box()
        page.mouse.move(box["x"] + 140, box["y"] + 40)
        page.mouse.down()
        page.mouse.move(box["x"] + 140, box["y"] + 240, steps=5)
        page.mouse.up()
        page.wait_for_function("document.getElementById('seen').width == 8")
        assert sum(read_classes(page).values()) <= 1.001
        page.screenshot(path=tmp_path / "drawing.png", full_page=True)

        page.set_input_files("#file", {"name": "bad.png", "mimeType": "image/png", "buffer": b"no image"})
        page.get_by_text("bad.png is not an image that this browser can read.").wait_for()
        assert page.locator("#classes li").count() == 0 and not outside


@pytest.mark.slow
@pytest.mark.process
def test_a_page_without_its_model_says_so(tmp_path):
    shutil.copytree(ROOT / "docs" / "try", tmp_path / "try")
    with open_browser() as browser, serve_folder(tmp_path / "try") as address:
        page, _ = open_page(browser, address)
        page.get_by_text("The model could not be loaded.").wait_for()
