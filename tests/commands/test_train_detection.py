"""`pvt-hf train-detection`: runs on bundled and on own data, what a recipe decides, and bad input that ends clearly."""

import dataclasses
import json
import shutil

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import AutoModelForImageClassification, AutoModelForObjectDetection, pipeline

import pvt_hf
from pvt_hf.commands.train_detection import build_detector, check_splits, load_splits, main, parse
from pvt_hf.data.digits import write_scenes
from pvt_hf.data.images import ImageError
from pvt_hf.evaluation.metrics import COCO_METRICS
from pvt_hf.models.annotations import AnnotationError
from tests.support.detection_run import HEADS, build, small_detector
from tests.support.small_models import small_config

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", images=16, validation=5)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    AutoModelForImageClassification.from_config(small_config("v2")).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run():
    return lambda *arguments: main(["--disable_tqdm", "true", *map(str, arguments)])


def coco_arguments(folder):
    arguments = []
    for name, split in (("train", "train"), ("eval", "validation")):
        arguments += [f"--{name}_annotations", folder / split / "annotations.json"]
        arguments += [f"--{name}_images", folder / split / "images"]
    return arguments


def test_smoke_run_leaves_what_pycocotools_finds(run, classifier, tmp_path, capsys):
    """Mask R-CNN from a classifier: what it says, saves and draws is what pycocotools finds in its json."""
    folder = tmp_path / "run"
    arguments = ["--smoke", "--recipe", "mask_rcnn_1x", "--backbone_checkpoint", classifier, "--output_dir", folder]
    small = json.dumps(HEADS["mask_rcnn"])
    run(*arguments, "--num_train_epochs", "1", "--eval_strategy", "no", "--config_overrides", small)
    printed = capsys.readouterr().out
    count = len(pvt_hf.PvtV2Backbone.from_pretrained(classifier).state_dict())
    assert f"all {count} tensors of the backbone are from {classifier}" in printed
    assert "on 8 images\n0 corrupt images were skipped" in printed
    measured = json.loads((folder / "eval_results.json").read_text())
    card = ModelCard.load(folder / "README.md")
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values.keys() == {"AP", "AP50", "mask_AP", "mask_AP50"} and card.data.pipeline_tag == "object-detection"
    truth = COCO(str(tmp_path / "scenes-16" / "validation" / "annotations.json"))
    for kind, prefix in (("bbox", ""), ("segm", "mask_")):
        found = json.loads((folder / "predictions.json").read_text())
        if kind == "segm":
            found = [{key: value for key, value in result.items() if key != "bbox"} for result in found]
        evaluation = COCOeval(truth, truth.loadRes(found), kind)
        for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
            step()
        numbers = dict(zip([f"eval_{prefix}{name}" for name in COCO_METRICS], evaluation.stats, strict=True))
        missing = {key for key, value in numbers.items() if value == -1}  # no digit is large
        assert missing == {f"eval_{prefix}AP_large", f"eval_{prefix}AR_large"} and not missing & measured.keys()
        found = {key: pytest.approx(value, abs=1e-9) for key, value in numbers.items() if key not in missing}
        assert measured == measured | found
        assert values[f"{prefix}AP50"] == pytest.approx(evaluation.stats[1], abs=1e-9)
    assert not list(folder.glob("*.incomplete")) and not list(folder.glob("scenes*"))
    for name in ("curves.png", "predictions.png"):
        with Image.open(folder / name) as picture:
            assert len(picture.convert("RGB").getcolors(10**7)) > 100
        assert f"]({name})" in card.content
    detections = pipeline("object-detection", model=str(folder), threshold=0.0)(Image.new("RGB", (150, 120)))
    assert all(detection["label"] in "0123456789" for detection in detections)
    with pytest.raises(SystemExit, match="--resume_from_checkpoint true resumes from them"):
        run(*arguments)


def test_fine_tuning_on_other_classes_keeps_the_rest(run, scenes, tmp_path, capsys):
    """From a checkpoint with ten classes to a data set of the Hub with two; the ids of the json stay in the results."""
    build(tmp_path / "first", scenes).save_model()
    content = json.loads((scenes / "validation" / "annotations.json").read_text())
    rows = []
    for image in content["images"]:
        own = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        objects = {"bbox": [entry["bbox"] for entry in own], "category": [entry["category_id"] % 2 for entry in own]}
        path = scenes / "validation" / "images" / image["file_name"]
        rows.append({"image_id": image["id"], "image": {"path": str(path), "bytes": None}, "objects": objects})
    rows.append({"image_id": 99, "image": {"path": "99.png", "bytes": b"no image"}, "objects": objects})
    label = datasets.ClassLabel(names=["even", "odd"])
    objects = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(label)}
    features = {"image_id": datasets.Value("int64"), "image": datasets.Image(decode=False), "objects": objects}
    data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    data.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "data.parquet"))
    run(
        *("--smoke", "--model_name_or_path", tmp_path / "first", "--dataset_name", tmp_path / "data.parquet"),
        *("--output_dir", tmp_path / "second", "--num_train_epochs", "1", "--warmup_iterations", "0"),
        *("--save_strategy", "no", "--skip_corrupt", "--max_detections", "200"),
    )
    first, second = (AutoModelForObjectDetection.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert second.config.id2label == {0: "even", 1: "odd"} and first.config.num_labels == 10
    printed = capsys.readouterr().out
    assert "on 5 images" in printed and "the validation set: 5 images" in printed
    assert {"eval_AR10", "eval_AR200"} < json.loads((tmp_path / "second" / "eval_results.json").read_text()).keys()
    assert "2 corrupt images were left out before training:\n  row 5: row 5 cannot be read" in printed
    # One step with the recipe's small rate moves nothing far: the rest really came from the checkpoint.
    torch.testing.assert_close(second.neck.state_dict(), first.neck.state_dict(), atol=2e-3, rtol=0)


def test_bad_input_ends_before_any_work(run, scenes, classifier, tmp_path, capsys):
    """It ends before any work is done, with a message that says what to change."""
    wrong = tmp_path / "wrong"
    for split in ("train", "validation"):
        (wrong / split).mkdir(parents=True)
        content = json.loads((scenes / split / "annotations.json").read_text())
        del content["categories"]
        (wrong / split / "annotations.json").write_text(json.dumps(content))
    arguments = ["--smoke", "--output_dir", tmp_path / "run"]
    with pytest.raises(SystemExit, match=r"annotations.json is not COCO json: it has no list \['categories'\]"):
        run(*arguments, *coco_arguments(wrong))
    with pytest.raises(SystemExit):
        run(*arguments, *coco_arguments(scenes)[:4])
    wanted = "--train_annotations, --train_images, --eval_annotations and --eval_images go together"
    assert wanted in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--with_code cannot be used for a model of type detr: its class is"):
        run(*arguments, *coco_arguments(wrong), "--with_code", "--recipe", "detr_50ep")
    with pytest.raises(SystemExit, match="a RetinaNetConfig has no fields \\['neck_chanels'\\]"):
        run(*arguments, *coco_arguments(scenes), "--config_overrides", '{"neck_chanels": 8}')
    fewer = tmp_path / "fewer"
    shutil.copytree(scenes, fewer)
    content = json.loads((fewer / "validation" / "annotations.json").read_text())
    content["categories"].pop()
    content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] < 10]
    (fewer / "validation" / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="The training set has the classes .*'9'], the validation set .*'8']"):
        run(*arguments, *coco_arguments(fewer))
    small_detector("retinanet").save_pretrained(tmp_path / "detector")
    with pytest.raises(SystemExit, match="--recipe detr_50ep is not for a pvt_hf_retinanet"):
        run(*arguments, "--recipe", "detr_50ep", "--model_name_or_path", tmp_path / "detector")
    with pytest.raises(SystemExit, match="is not a pvt_v2_b2"):
        run(*arguments, "--variant", "pvt_v2_b2", "--backbone_checkpoint", classifier)
    with pytest.raises(SystemExit, match="`warmup_iterations` must be less than the 10 steps .* got 500"):
        run(*arguments, *coco_arguments(scenes), "--warmup_iterations", "500")
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_image_that_turns_out_to_be_corrupt_ends_the_run_with_a_message(run, scenes, workers, tmp_path):
    """Its header was good. A message of a loader's process has no traceback either."""
    shutil.copytree(scenes, tmp_path / "scenes")
    for file in (tmp_path / "scenes" / "train" / "images").iterdir():
        file.write_bytes(file.read_bytes()[:-3000])
    arguments = ["--output_dir", tmp_path / "run", *coco_arguments(tmp_path / "scenes"), "--warmup_iterations", "0"]
    arguments += ["--config_overrides", json.dumps(HEADS["retinanet"]), "--dataloader_num_workers", workers]
    message = r"^[\w.]*\.png \(image \d+\) cannot be read: .*\n--skip_corrupt leaves out images"
    with pytest.raises(SystemExit, match=message):
        run(*arguments, "--use_cpu", "true")


def load(tmp_path, *arguments):
    (_, data_args, *_), _, _, args = parse(["--output_dir", str(tmp_path / "run"), *map(str, arguments)])
    args.dataloader_num_workers = 0
    return load_splits(data_args, args), data_args, args


def test_classes_of_both_splits_are_matched_by_name(scenes, tmp_path):
    """In the validation set they have other ids; `--class_names` orders those of both."""
    other = tmp_path / "other"
    shutil.copytree(scenes, other)
    content = json.loads((other / "validation" / "annotations.json").read_text())
    for entry in content["categories"]:
        entry["id"] = 100 - entry["id"]
    for entry in content["annotations"]:
        entry["category_id"] = 100 - entry["category_id"]
    (other / "validation" / "annotations.json").write_text(json.dumps(content))
    names = tmp_path / "names.json"
    names.write_text(json.dumps({str(label): str((label + 3) % 10) for label in range(10)}))
    (_, expected), *_ = load(tmp_path, *coco_arguments(scenes))
    for arguments, order in (([], range(10)), (["--class_names", names], [*range(3, 10), *range(3)])):
        (train, validation), *_ = load(tmp_path, *coco_arguments(other), *arguments)
        assert train.label_names == validation.label_names == list(map(str, order))
        for ours, theirs in zip(validation.records, expected.records, strict=True):
            for one, other_one in zip(ours.annotations, theirs.annotations, strict=True):
                assert train.label_names[one["category_id"]] == expected.label_names[other_one["category_id"]]
    names.write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"names.json cannot be read"):
        load(tmp_path, *coco_arguments(other), "--class_names", names)


def test_validation_set_that_lacks_classes_has_those_of_the_training_set(tmp_path):
    """Categories of the Hub are integers without names, in rows of which some have no objects."""
    Image.new("RGB", (60, 50)).save(tmp_path / "a.png")
    for split, labels in (("train", [[0, 2], [1], None]), ("validation", [[1]])):
        rows = [
            {
                "picture": str(tmp_path / "a.png"),
                "things": values and {"bbox": [[5, 5, 45, 45]] * len(values), "category": values},
            }
            for values in labels
        ]
        integers = datasets.List(datasets.Value("int32"))
        things = {"bbox": datasets.List(integers), "category": integers}
        features = datasets.Features({"picture": datasets.Image(), "things": things})
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    columns = ["--image_column", "picture", "--objects_column", "things", "--bbox_format", "voc"]
    splits, data_args, args = load(tmp_path, "--dataset_name", tmp_path / "data", *columns)
    assert splits[0].label_names == splits[1].label_names == ["0", "1", "2"]
    assert splits[1].records[0].annotations[0]["bbox"] == [5, 5, 40, 40]
    train, validation = check_splits(splits, small_detector("retinanet", 3), data_args, 100, args)
    assert [len(train), len(validation)] == [2, 1] and train.image(0).shape == (3, 50, 60)


def test_part_of_the_training_set_is_the_validation_set(scenes, tmp_path, capsys):
    """Of COCO json and of the bundled scenes, as of a data set: without files for a validation set."""
    train_files = coco_arguments(scenes)[:4]
    (train, validation), *_ = load(tmp_path, *train_files, "--train_val_split", "0.25")
    assert (len(train), len(validation)) == (12, 4) and train.label_names == validation.label_names
    (train, validation), *_ = load(tmp_path, "--num_scenes", 16, "--train_val_split", "0.25")
    assert (len(train), len(validation)) == (12, 4)
    for share, files, message in (
        ("0.25", coco_arguments(scenes), "leave --eval_annotations and --eval_images out"),
        ("1.5", train_files, "--train_val_split must be between 0 and 1, got 1.5"),
        ("0.25", train_files[:2], "--train_annotations and --train_images go together"),
    ):
        with pytest.raises(SystemExit):
            load(tmp_path, *files, "--train_val_split", share)
        assert message in capsys.readouterr().err


def test_data_may_lack_classes_where_that_is_allowed(scenes, tmp_path, caplog):
    """Of `--class_names`, and of the training set: the message names the option."""
    fewer = tmp_path / "fewer"
    shutil.copytree(scenes, fewer)
    for split, kept in (("train", 9), ("validation", 8)):
        file = fewer / split / "annotations.json"
        content = json.loads(file.read_text())
        content["categories"] = content["categories"][:kept]
        content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] <= kept]
        for entry in content["annotations"]:
            entry["iscrowd"] = int(split == "train" and entry["category_id"] == 1)
        file.write_text(json.dumps(content))
    (tmp_path / "names.txt").write_text("\n".join(["x", *"0123456789"]))
    arguments = [*coco_arguments(fewer), "--class_names", tmp_path / "names.txt"]
    with pytest.raises(ValueError, match=r"only the first has \['x', '9'\].*--allow_missing_classes"):
        load(tmp_path, *arguments)
    with pytest.raises(ValueError, match=r"only the first has \['8'\].*--allow_missing_classes"):
        load(tmp_path, *coco_arguments(fewer))
    splits, data_args, args = load(tmp_path, *arguments, "--allow_missing_classes")
    assert splits[0].label_names == splits[1].label_names == ["x", *"0123456789"]
    check_splits(splits, small_detector("retinanet", 11), data_args, 100, args)
    assert "No annotation of 1 of 9 classes can be trained on. Left out, by class and reason: {'0'" in caplog.text
    data_args.allow_missing_classes = False
    with pytest.raises(AnnotationError, match=r"'0'.*`allow_missing` \(`--allow_missing_classes`\)"):
        check_splits(splits, small_detector("retinanet", 11), data_args, 100, args)


def test_folder_of_yolo_is_read(tmp_path, capsys):
    for split in ("train", "valid"):
        (tmp_path / "data" / split / "images").mkdir(parents=True)
        (tmp_path / "data" / split / "labels").mkdir()
        Image.new("RGB", (60, 50)).save(tmp_path / "data" / split / "images" / "a.png")
        (tmp_path / "data" / split / "labels" / "a.txt").write_text("0 0.5 0.5 0.5 0.4\n")
    (tmp_path / "data" / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: [cat, dog]\n")
    splits, data_args, args = load(tmp_path, "--dataset_name", tmp_path / "data")
    assert splits[1].records[0].annotations[0]["bbox"] == pytest.approx([15, 15, 30, 20])
    check_splits(splits, small_detector("retinanet", 2), data_args, 100, args)
    printed = capsys.readouterr().out
    assert "the training set: 1 images, 1 objects of 2 classes (0 to 1 of a class)" in printed
    assert "at most 1 in an image (valid/images/a.png); none of ['dog']" in printed


def test_data_are_checked_before_the_first_step(scenes, tmp_path, caplog):
    """Files of the validation set and objects of both: everything that would stop a run hours later."""
    splits, data_args, args = load(tmp_path, *coco_arguments(scenes))
    model = small_detector("detr", num_queries=1)
    check_splits(splits, model, data_args, 100, args)
    assert "raise `num_queries` (`--config_overrides`)" in caplog.text and "`--max_detections`" not in caplog.text
    check_splits(splits, model, data_args, 1, args)
    assert "but at most 1 are found in an image and measured: raise `max_detections`" in caplog.text
    data = splits[1]
    splits = (
        splits[0],
        dataclasses.replace(
            data, records=[dataclasses.replace(record, stored=f"{record.stored}.gone") for record in data.records]
        ),
    )
    with pytest.raises(ImageError, match=r"5 of 5 images of the validation set cannot be used:\n.*FileNotFoundError"):
        check_splits(splits, model, data_args, 100, args)
    splits = (
        splits[0],
        dataclasses.replace(data, records=[dataclasses.replace(record, annotations=[]) for record in data.records]),
    )
    with pytest.raises(AnnotationError, match="There is nothing to measure"):
        check_splits(splits, model, data_args, 100, args)


def test_recipe_decides_what_the_command_line_leaves_open(tmp_path):
    """Without arguments it is the papers' run, its rate scaled to the real number of images per step."""

    def parsed(*arguments):
        *_, recipe, args = parse(["--output_dir", str(tmp_path / "x"), *arguments])
        return (args.learning_rate, args.weight_decay, args.max_grad_norm, args.num_train_epochs), recipe

    assert parsed()[0] == (pytest.approx(1e-4 * 2 / 16), 1e-4, 0, 12)
    assert parsed("--recipe", "detr_50ep", "--variant", "pvt_small")[0] == (pytest.approx(1.25e-5), 1e-4, 0.1, 50)
    numbers, recipe = parsed("--recipe", "mask_rcnn_3x_ms", "--per_device_train_batch_size", "8")
    assert numbers == (pytest.approx(5e-5), 0.05, 0, 36) and not recipe.decays_norms
    numbers, _ = parsed("--recipe", "mask_rcnn_1x", "--variant", "pvt_v2_b5", "--gradient_accumulation_steps", "4")
    assert numbers == (pytest.approx(2e-4 / 1.4), 1e-4, 0, 12)
    numbers, recipe = parsed("--learning_rate", "0.01", "--num_train_epochs", "3", "--shortest_edges", "96", "128")
    assert numbers == (0.01, 1e-4, 0, 3) and recipe.shortest_edges == [96, 128] and recipe.longest_edge == 1333


@pytest.mark.parametrize(
    "recipe",
    [
        "retinanet_1x",
        "atss_3x_ms",
        "gfl_3x_ms",
        "mask_rcnn_1x",
        "cascade_mask_rcnn_3x_ms",
        "sparse_rcnn_3x_ms",
        "detr_50ep",
    ],
)
def test_small_detectors_can_be_built(recipe):
    """The presets of `--smoke` and `--demo` are fields of the configurations."""
    (model_args, *_), backbone, recipe, _ = parse(["--demo", "--recipe", recipe])
    config = build_detector(recipe.architecture, backbone, model_args.config_overrides).config
    assert model_args.config_overrides.items() <= config.to_dict().items()
