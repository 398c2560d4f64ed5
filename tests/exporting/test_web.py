"""transformers.js, of npm, loads what is exported for the web, and gives what `pipeline` gives."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

import pvt_hf
from pvt_hf.exporting.export import export_model

pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.timeout(900)]

PROGRAM = """
import { AutoProcessor, RawImage, env, pipeline } from "@huggingface/transformers";

const [folder, name, ...images] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = folder;
const processor = await AutoProcessor.from_pretrained(name);
const results = [];
for (const settings of [{}, { dtype: "q8" }]) {
    const classify = await pipeline("image-classification", name, settings);
    for (const image of images) {
        const { pixel_values } = await processor(await RawImage.read(image));
        results.push({ scores: await classify(image, { top_k: 5 }), pixels: Array.from(pixel_values.data) });
    }
}
console.log(JSON.stringify(results));
"""


@pytest.fixture
def node(tmp_path):
    """Runs a program of JavaScript that imports transformers.js."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = tmp_path / "node"
    folder.mkdir()
    install = [
        "npm",
        "install",
        "--no-audit",
        "--no-fund",
        "--ignore-scripts",
        "--prefix",
        folder,
        "@huggingface/transformers@4.3.1",
    ]
    if (done := subprocess.run(install, capture_output=True, text=True)).returncode:
        pytest.skip(f"npm has no transformers.js: {done.stderr[-200:]}")

    def run(program: str, *arguments) -> str:
        (folder / "program.mjs").write_text(program)
        done = subprocess.run(["node", folder / "program.mjs", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


def test_classes_are_those_of_the_pipeline(node, classifier, processor, photos, tmp_path):
    for dtype in ("fp32", "int8"):
        export_model(classifier, tmp_path / "site" / "mine", "web", dtype, processor, photos)
    classifier.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    images = sorted(map(str, photos.rglob("*.png")))
    with Image.open(images[0]) as image:  # of the size that images are resized to
        image.resize((73, 73)).save(tmp_path / "small.png")
    images.append(str(tmp_path / "small.png"))
    results = json.loads(node(PROGRAM, f"{tmp_path}/site/", "mine", *images))
    classify = pipeline("image-classification", model=str(tmp_path / "saved"), top_k=5)
    prepare = pvt_hf.PvtImageProcessorPil.from_pretrained(tmp_path / "saved")
    for index, result in enumerate(results):
        image, is_int8 = images[index % 4], index >= 4
        resized = not image.endswith("small.png")
        expected = {row["label"]: row["score"] for row in classify(image)}
        found = {row["label"]: row["score"] for row in result["scores"]}
        assert max(found, key=found.get) == max(expected, key=expected.get)
        tolerance = 0.03 if resized or is_int8 else 1e-5
        assert all(abs(found[name] - score) < tolerance for name, score in expected.items())
        pixels = prepare(Image.open(image), return_tensors="np")["pixel_values"]
        difference = np.abs(np.array(result["pixels"]).reshape(pixels.shape) - pixels)
        assert resized or difference.max() < 1e-5
