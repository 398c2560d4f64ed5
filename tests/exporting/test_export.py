"""What an export leaves: the program, the settings and the card of one model, or nothing."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import pvt_hf
from pvt_hf.exporting.export import export_model
from pvt_hf.exporting.targets import ExportError
from tests.support.dense_models import build_dense_model
from tests.support.exports import small_classifier


def list_files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def read_card(folder):
    return ModelCard.load(folder / "README.md")


def test_folder_has_the_program_the_settings_and_the_card(classifier, processor, exporter, photos, tmp_path):
    report = export_model(classifier, tmp_path / "new" / "out", "onnx", "fp32", processor, photos, name="me/model")
    folder = tmp_path / "new" / "out"
    assert list_files(folder) == ["README.md", "config.json", "onnx/model.onnx", "preprocessor_config.json"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("pvt_v2", ["PvtV2ForImageClassification"])
    assert pvt_hf.PvtImageProcessor.from_pretrained(folder).to_dict() == processor.to_dict()
    assert (report.file, report.difference, report.images, report.agreement) == ("onnx/model.onnx", 0, 3, 1)
    assert (report.inputs, report.outputs) == (("pixel_values",), ("logits",))
    card = read_card(folder)
    assert card.data.to_dict()["export"]["files"][0]["agreement"] == 1 and card.data.base_model == "me/model"
    assert (card.data.library_name, card.data.pipeline_tag) == ("onnx", "image-classification")
    assert "100.0 % (the best class of an image, 3 images)" in card.text and str(tmp_path) not in card.content


def test_program_that_differs_is_not_left(classifier, exporter, tmp_path):
    exporter.change = lambda value: value * 1.01
    with pytest.raises(ExportError, match=r"`logits` differs by 1.0e-02 .* tolerance is 1.0e-04"):
        export_model(classifier, tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())
    assert export_model(classifier, tmp_path / "out", dtype="fp16").difference == pytest.approx(0.01, rel=1e-3)
    assert export_model(classifier, tmp_path / "mine", tolerance=0.1).tolerance == 0.1


@pytest.mark.parametrize(
    "change", [lambda value: value * torch.nan, lambda value: value[:, 1:]], ids=["no number", "another shape"]
)
def test_outputs_that_are_no_outputs_are_refused(change, classifier, exporter, tmp_path):
    exporter.change = change
    with pytest.raises(ExportError, match="differs by inf"):
        export_model(classifier, tmp_path / "out", dtype="int8", tolerance=1e30)


def test_results_that_differ_are_counted(classifier, processor, exporter, photos, tmp_path):
    exporter.change = lambda value: value.roll(1, dims=-1)
    report = export_model(classifier, tmp_path / "out", "onnx", "int8", processor, photos, tolerance=10)
    assert report.agreement == 0 and "0.0 % (the best class" in read_card(tmp_path / "out").text
    assert len(exporter.samples) == 3 and exporter.samples[0]["pixel_values"].shape == (1, 3, 64, 64)


def test_another_dtype_and_another_runtime_are_added(classifier, processor, exporter, tmp_path):
    folder = tmp_path / "out"
    export_model(classifier, folder, image_processor=processor)
    (folder / "mine.txt").write_text("mine")
    former = (folder / "README.md").read_text()
    exporter.change = lambda value: value * 2
    with pytest.raises(ExportError):
        export_model(classifier, folder, dtype="fp16")
    assert (folder / "README.md").read_text() == former
    exporter.change = lambda value: value
    for target, dtype in (("onnx", "fp16"), ("onnx", "int8"), ("openvino", "fp32")):
        export_model(classifier, folder, target, dtype)
    names = ["model.onnx", "model_fp16.onnx", "model_quantized.onnx"]
    found = list_files(folder)
    assert [f"onnx/{name}" for name in names] == [name for name in found if name.startswith("onnx/")]
    assert {"mine.txt", "openvino/openvino_model.xml", "preprocessor_config.json"} <= set(found)
    assert (folder / "onnx/model.onnx").read_text() == "fp32"
    files = read_card(folder).data.to_dict()["export"]["files"]
    assert [entry["dtype"] for entry in files] == ["fp32", "fp16", "int8", "fp32"]
    assert all(f"`{entry['file']}`" in read_card(folder).text for entry in files)
    with pytest.raises(ExportError, match="has onnx/model_fp16.onnx already"):
        export_model(classifier, folder, dtype="fp16")
    with pytest.raises(ExportError, match="has the settings of onnx"):
        export_model(classifier, folder, "web", "fp32")
    with pytest.raises(ExportError, match="other weights"):
        export_model(small_classifier(), folder, "openvino", "int8")


def forge_card(folder):
    (folder / "README.md").write_text("---\nexport:\n  files:\n  - file: a\n---\n")


FOLDERS = {
    "a file of others": lambda folder: (folder / "a.txt").touch(),
    "the card of others": lambda folder: (folder / "README.md").write_text("---\nlicense: mit\n---\n"),
    "a card that is none": forge_card,
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_others_are_refused(name, classifier, exporter, tmp_path):
    FOLDERS[name](tmp_path)
    before = list_files(tmp_path)
    with pytest.raises(ExportError, match="is not empty, and no export is in it"):
        export_model(classifier, tmp_path)
    assert list_files(tmp_path) == before and exporter.samples is None


CHOICES = {
    "target": ({"target": "tflite"}, "`target` must be one of onnx, openvino, executorch, web, got 'tflite'"),
    "dtype": ({"dtype": "int4"}, "`dtype` must be one of fp32, fp16, int8, got 'int4'"),
    "dtype of the target": ({"target": "executorch", "dtype": "int8"}, "`dtype` for ExecuTorch must be one of fp32"),
    "tolerance": ({"tolerance": 0}, "`tolerance` must be a number above 0, got 0"),
    "no size": ({"target": "executorch"}, "take images of one size, and the image processor makes several"),
    "no processor": ({"calibration_images": [Image.new("RGB", (9, 9))]}, "`calibration_images` need the image proc"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_wrong_choices_are_refused(name, classifier, exporter, tmp_path):
    arguments, message = CHOICES[name]
    with pytest.raises(ExportError, match=message):
        export_model(classifier, tmp_path / "out", **arguments)
    assert exporter.samples is None and not list(tmp_path.iterdir())


def test_model_stays_as_it_was(exporter, tmp_path):
    model = small_classifier().train().half()
    export_model(model, tmp_path / "out")
    assert model.training and model.dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v2", ("pvt", "PvtForImageClassification", "PvtImageProcessor")),
        ("semantic_fpn", ("segformer", "SegformerForSemanticSegmentation", "SegformerImageProcessor")),
        ("detr", ("detr", "DetrForObjectDetection", "DetrImageProcessor")),
    ],
)
def test_settings_for_the_web_name_classes_that_it_knows(name, expected, exporter, tmp_path):
    model, processor = {
        "v2": (small_classifier(), pvt_hf.PvtImageProcessor(crop_size=64)),
        "semantic_fpn": (build_dense_model("semantic_fpn"), pvt_hf.PvtSegmentationImageProcessor()),
        "detr": (build_dense_model("detr"), pvt_hf.PvtDetectionImageProcessor()),
    }[name]
    report = export_model(model, tmp_path / "out", "web", "int8", processor)
    config, settings = (
        json.loads((tmp_path / "out" / file).read_text()) for file in ("config.json", "preprocessor_config.json")
    )
    assert (config["model_type"], *config["architectures"], settings["image_processor_type"]) == expected
    assert settings["resample"] == (1 if name == "v2" else 2)
    assert config["transformers.js_config"] == {"dtype": "q8"} and report.inputs == ("pixel_values",)
    assert set(config["id2label"]) == set(map(str, range(model.config.num_labels)))
    assert f'pipeline("{report_tag(tmp_path / "out")}", folder)' in read_card(tmp_path / "out").text


def report_tag(folder):
    return read_card(folder).data.pipeline_tag


def test_detectors_that_the_web_does_not_know_are_refused(exporter, tmp_path):
    with pytest.raises(ExportError, match="transformers.js makes no boxes of the outputs of RetinaNet"):
        export_model(build_dense_model("retinanet"), tmp_path / "out", "web")
