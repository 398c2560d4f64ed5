"""Makes the page that recognises digits in the visitor's browser: what `docs/try` has, the model, and its runtime.

    python examples/quickstart.py
    python docs/make_try_page.py runs/quickstart site/try
    python -m http.server --directory site/try

Any server of files can serve the folder. onnxruntime-web comes from npm (`npm pack`), or from a file of it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

import pvt_hf  # noqa: F401 (registers the models)
from pvt_hf.data.digits import CLASSES, load_digit_images
from pvt_hf.writing.files import hidden_folder

SOURCES = ROOT / "docs" / "try"
RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
TOLERANCE = 1e-3  # of logits, between the model and its export


def load_classifier(folder: Path) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A classifier of digits and its image processor, as the page can do what it does."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    image_processor = AutoImageProcessor.from_pretrained(folder)
    if tuple(model.config.id2label.values()) != CLASSES:
        raise SystemExit(f"{folder} is not a classifier of the digits, as examples/quickstart.py trains it")
    if image_processor.do_center_crop or not image_processor.size.get("height"):
        raise SystemExit(
            f"{folder} resizes to {image_processor.size} with a crop; the page resizes to height and width"
        )
    return model, image_processor


@torch.no_grad()
def export_model(model: PreTrainedModel, image_processor: BaseImageProcessor, folder: Path) -> None:
    """Writes the model for onnxruntime, and compares the two."""
    import onnxruntime

    size = image_processor.size
    pixels = torch.randn(1, 3, size["height"], size["width"])
    file = folder / "model.onnx"
    names = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    torch.onnx.export(model, (pixels,), file, dynamo=True, external_data=False, verbose=False, **names)
    (logits,) = onnxruntime.InferenceSession(file).run(None, {"pixel_values": pixels.numpy()})
    difference = float(np.abs(logits - model(pixels).logits.numpy()).max())
    if difference > TOLERANCE:
        raise SystemExit(f"the exported model's logits differ by {difference:.2g}, more than {TOLERANCE:g}")
    model.config.save_pretrained(folder)
    image_processor.save_pretrained(folder)


def write_examples(folder: Path) -> None:
    """One digit of each class that the quickstart does not train on, as it is stored: 8 x 8 pixels."""
    images, labels = load_digit_images("validation")
    names = [f"{name}.png" for name in CLASSES]
    for label, name in enumerate(names):
        Image.fromarray(images[labels.index(label)]).save(folder / name)
    (folder / "examples.json").write_text(json.dumps(names))


def fetch_runtime(archive: Path | None, folder: Path) -> None:
    """Writes the files of onnxruntime-web that the page uses."""
    if archive is None:
        command = ["npm", "pack", RUNTIME, "--silent", "--pack-destination", str(folder)]
        archive = folder / subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    with tarfile.open(archive) as package:
        for name in RUNTIME_FILES:
            content = package.extractfile(f"package/dist/{name}")
            (folder / name).write_bytes(content.read())
    if archive.parent == folder:
        archive.unlink()


def check_output(folder: Path) -> None:
    """Ends the program if there is something else than a page that this program wrote."""
    written = {"examples", "model", "onnxruntime", *(path.name for path in SOURCES.iterdir())}
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - written):
        raise SystemExit(f"{folder} exists and is not a page of this program")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the quickstart's model")
    parser.add_argument("output_dir", type=Path, help="folder that is written; a former page is replaced")
    parser.add_argument("--runtime", type=Path, help=f"the file that `npm pack {RUNTIME}` left (default: from npm)")
    args = parser.parse_args()
    check_output(args.output_dir)
    model, image_processor = load_classifier(args.model)
    with hidden_folder(args.output_dir.resolve().parent) as hidden:
        page = shutil.copytree(SOURCES, hidden / args.output_dir.name)
        for name in ("model", "examples", "onnxruntime"):
            (page / name).mkdir()
        export_model(model, image_processor, page / "model")
        write_examples(page / "examples")
        fetch_runtime(args.runtime, page / "onnxruntime")
        if args.output_dir.exists():
            shutil.rmtree(args.output_dir)
        page.rename(args.output_dir)
    print(f"the page is in {args.output_dir}: python -m http.server --directory {args.output_dir}")


if __name__ == "__main__":
    main()
