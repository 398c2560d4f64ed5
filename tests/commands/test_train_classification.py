"""`pvt-hf train-classification`: runs on bundled data, published and measured, streamed, adapted; wrong arguments."""

import io
import json
import pickle
import re

import datasets
import pytest
from huggingface_hub import ModelCard, get_token
from PIL import Image
from transformers import AutoModelForImageClassification, ResNetConfig

from pvt_hf import build_config
from pvt_hf.commands.train_classification import (
    build_training_set,
    check_splits,
    load_splits,
    main,
    match_labels,
    name_classes,
    parse,
)
from pvt_hf.data.classification import find_labels
from pvt_hf.data.images import ImageError
from pvt_hf.recipes import imagenet_recipe
from tests.support.run_checkpoints import write_checkpoint
from tests.support.small_models import small_config

pytestmark = pytest.mark.process

SMOKE = ["--smoke", "--disable_tqdm", "true", "--use_cpu", "true"]
# One process trains, publishes and measures: it takes most of its time to start.
PUBLISH_AND_MEASURE = """
import sys
from pvt_hf.commands.main import main
train, evaluate = sys.argv[1:].index("train-classification"), sys.argv[1:].index("evaluate")
sys.exit(main(sys.argv[1 + train : 1 + evaluate]) or main(sys.argv[1 + evaluate :]))
"""


@pytest.mark.process
def test_smoke_run_is_published_and_measured_again(python, hub, tmp_path):
    """Training on bundled data, pushed to a Hub; the evaluation of that repository gives the number of its card."""
    arguments = [*SMOKE, "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "4", "--eval_strategy", "no"]
    arguments += ["--output_dir", "run", "--ema_decay", "0.9", "--push_to_hub", "true", "--hub_model_id", "me/digits"]
    arguments += ["--hub_strategy", "checkpoint", "--with_code"]
    measure = ["--model_name_or_path", "me/digits", "--output_dir", "measured", "--dataloader_num_workers", "0"]
    result = python("-c", PUBLISH_AND_MEASURE, "train-classification", *arguments, "evaluate", *measure)
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"eval: top-1 0\.\d+, top-5 0\.\d+ on 360 images\nema: top-1", result.stdout)
    files = {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", "curves.png"}
    files |= {"last-checkpoint/model.safetensors", "last-checkpoint/complete.json"}  # pushed when it was complete
    files |= {"modeling_pvt_v2.py", "last-checkpoint/modeling_pvt_v2.py", "image_processing_pvt.py"}
    assert files <= hub.repos["me/digits"].keys() and (tmp_path / "run" / "ema" / "model.safetensors").exists()
    card = ModelCard(hub.repos["me/digits"]["README.md"].decode())
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    accuracy = next(result.metric_value for result in card.data.eval_results if result.metric_type == "accuracy")
    assert "trained by pvt_hf on `scikit-learn digits`" in card.content
    assert "| learning-rate schedule | the recipe's |" in card.content
    assert f"**{100 * accuracy:.2f} %** top-1" in card.content and "More information" not in card.content
    with Image.open(io.BytesIO(hub.repos["me/digits"]["curves.png"])) as picture:
        assert picture.size == (1000, 700) and len(picture.convert("RGB").getcolors(10**6)) > 100
    assert results["eval_accuracy"] == accuracy and results["ema_images"] == 360
    assert 'pipeline("image-classification", model="me/digits")' in card.content and "# digits\n" in card.content
    assert "The EMA weights (in `ema`) reach **" in card.content

    measured = json.loads((tmp_path / "measured" / "results.json").read_text())["me/digits"]
    assert measured["accuracy"] == pytest.approx(100 * accuracy) and measured["images"] == 360
    assert f"| me/digits | accuracy |  | {100 * accuracy:.2f} |  | 360 |" in result.stdout


def test_output_folder_with_checkpoints_is_not_overwritten(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-1")
    with pytest.raises(SystemExit, match="has checkpoints: --resume_from_checkpoint true resumes from them"):
        main([*SMOKE, "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "pvt_small", "--model_name_or_path", "checkpoint"], "checkpoint is not a pvt_small"),
        (["--output_dir", "x" * 300], "--output_dir x* cannot be written: a name of 300 bytes is longer"),
        (["--output_dir", "checkpoint/config.json/run"], "cannot be written: Not a directory"),
        (["--with_code", "--model_name_or_path", "other"], "--with_code cannot be used for a model of type resnet: "),
        (["--license", "Apache 2"], "2"),  # the exit status of a wrong option; what is wrong is printed
        (["--resume_from_checkpoint", "nowhere"], "nowhere is not a complete checkpoint: there is no such folder"),
    ],
)
def test_wrong_arguments_end_before_training(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build_config("pvt_v2_b0", depths=[1, 1, 1, 1]).save_pretrained("checkpoint")
    ResNetConfig().save_pretrained("other")
    with pytest.raises(SystemExit, match=message):
        main([*SMOKE, *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora_rank", "4"], "--lora_rank adapts a trained model"),
        (["--train_val_split", "0.2", "--streaming"], "--train_val_split needs all the images"),
        (["--shuffle_buffer", "0"], "--shuffle_buffer must be at least 1, got 0"),
        (["--dataset_name", "x/*.tar"], "pass --eval_dataset_name with those for evaluation"),
    ],
)
def test_arguments_that_contradict_each_other_are_a_usage_error(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main([*SMOKE, *arguments])
    assert message in capsys.readouterr().err


@pytest.fixture
def checkpoint(tmp_path) -> str:
    model = AutoModelForImageClassification.from_config(small_config("v2", num_labels=10))
    model.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def test_classes_of_the_validation_set_are_matched_by_name(tmp_path, capsys):
    """It may lack some, and have others in between; new ones are refused with both lists."""
    folders = {"train": ["ant", "bee", "cat"], "validation": ["bee", "cat"], "other": ["bee", "cow"]}
    for split, names in folders.items():
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "a.png")
    arguments = ["--dataset_name", str(tmp_path / "train"), "--eval_split", "train"]

    def load(split):
        (_, data_args, *_), _, args = parse([*arguments, "--eval_dataset_name", str(tmp_path / split)])
        args.dataloader_num_workers = 0
        train, validation = load_splits(data_args, args)
        found, places = match_labels(validation, find_labels(train))
        check_splits(train, validation, find_labels(train), found, data_args, args)
        return places

    assert load("validation") == [1, 2]
    printed = capsys.readouterr().out
    assert "the training set: 3 images of 3 classes (1 to 1 of a class)\nthe validation set: 2 images" in printed
    with pytest.raises(ValueError, match=r"training set has the classes \['ant'.*, the validation set \['bee',"):
        load("other")
    (tmp_path / "validation" / "bee" / "a.png").write_text("x")
    with pytest.raises(ImageError, match="(?s)1 of 2 images of the validation set.*bee/a.png"):
        load("validation")


def test_a_token_of_the_command_line_is_used_and_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "another")
    *_, args = parse(["--output_dir", str(tmp_path), "--hub_token", "hf_secret"])
    assert get_token() == "hf_secret" and b"hf_secret" not in pickle.dumps(args)


def test_class_names_order_and_name_the_labels(tmp_path, capsys):
    """Those of a folder are put in their order, and numbers get them; the data may lack some, and have no others."""
    for name in ("bee", "ant"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / "train" / name / "a.png")
    rows = datasets.Dataset.from_dict({"image": [{"path": None, "bytes": b"x"}] * 3, "label": [0, 1, 1]})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    rows.to_parquet(str(tmp_path / "numbers.parquet"))

    def load(names, *arguments):
        (tmp_path / "names.txt").write_text("\n".join(names))
        arguments = [*arguments, "--class_names", str(tmp_path / "names.txt"), "--output_dir", str(tmp_path / "run")]
        (_, data_args, *_), _, args = parse([*arguments, "--eval_split", "train"])
        train, validation = load_splits(data_args, args)
        (column, names), (_, places) = name_classes(train, data_args, args)
        items = build_training_set(train, column, places, lambda image: image, data_args, args)
        return items, names, match_labels(validation, (column, names))[1]

    folder = ["--dataset_name", str(tmp_path / "data")]
    items, names, places = load(["bee", "cat", "ant"], *folder)
    assert names == ["bee", "cat", "ant"] and places == [2, 0]
    assert [items[index, 0]["labels"] for index in range(2)] == [2, 0]
    assert "the training set has none of the classes ['cat']" in capsys.readouterr().out
    streamed, *_ = load(["bee", "cat", "ant"], *folder, "--streaming", "--samples_per_epoch", "2")
    assert sorted(row["labels"] for row in streamed) == [0, 2]
    with pytest.raises(ValueError, match=r"names.txt has the classes \['bee'\], the training set \['ant', 'bee'\]"):
        load(["bee"], *folder)

    numbers = str(tmp_path / "numbers.parquet")
    options = ["--dataset_name", numbers, "--eval_dataset_name", numbers]
    for arguments in (options, [*options, "--streaming", "--samples_per_epoch", "2"]):
        _, names, places = load(["cat", "dog"], *arguments)
        assert names == ["cat", "dog"] and places == [0, 1]
    with pytest.raises(ValueError, match="`num_labels` is 3, but there are 2 names"):
        load(["cat", "dog"], *options, "--num_labels", "3")


def test_stream_is_an_epoch_of_all_images(checkpoint, tmp_path, capsys):
    """And every validation image is counted."""
    arguments = ["--model_name_or_path", checkpoint, "--output_dir", str(tmp_path / "run"), "--num_train_epochs", "1"]
    main([*SMOKE, *arguments, "--streaming"])
    assert "on 360 images" in capsys.readouterr().out
    state = json.loads(next(tmp_path.glob("run/checkpoint-*/trainer_state.json")).read_text())
    assert state["global_step"] == 1437 // 32


def test_adapter_is_saved_beside_the_merged_model(checkpoint, tmp_path, capsys):
    """And a part of the training split becomes the validation set."""
    arguments = ["--model_name_or_path", checkpoint, "--output_dir", str(tmp_path / "run")]
    main([*SMOKE, *arguments, "--lora_rank", "2", "--max_steps", "1", "--train_val_split", "0.05"])
    assert "on 72 images" in capsys.readouterr().out
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    assert not (tmp_path / "run" / "adapter" / "README.md").exists()  # it would name the folder of the checkpoint
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert not any("lora" in name for name in merged.state_dict())


def test_recipe_decides_what_the_command_line_leaves_open():
    """Without arguments it is the papers' run of the variant."""

    def parsed(*arguments) -> tuple:
        *_, recipe, args = parse(["--output_dir", "x", "--variant", *arguments])
        return args.learning_rate, args.weight_decay, args.max_grad_norm, args.num_train_epochs, recipe

    assert parsed("pvt_medium") == (0.000125, 0.05, 1.0, 300, imagenet_recipe("pvt_medium"))
    chosen = ["--learning_rate", "0.01", "--mixup", "0", "--max_grad_norm", "3", "--num_train_epochs", "9"]
    *numbers, recipe = parsed("pvt_v2_b0", *chosen)
    assert numbers == [0.01, 0.05, 3.0, 9.0] and recipe.mixup == 0


@pytest.mark.slow
@pytest.mark.process
def test_three_epochs_in_two_processes(python, tmp_path):
    """Digits, launched by accelerate: it learns, resumes where it ended, and counts every validation image once."""
    arguments = ["--variant", "pvt_v2_b0", "--image_size", "32", "--num_train_epochs", "3", "--learning_rate", "2e-4"]
    arguments += ["--per_device_train_batch_size", "16", "--warmup_epochs", "0", "--output_dir", "run"]
    arguments += ["--repeats", "1", "--mixup", "0", "--cutmix", "0", "--drop_path_rate", "0"]
    arguments += ["--dataloader_num_workers", "0", "--seed", "1", "--use_cpu", "true", "--disable_tqdm", "true"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["-m", "pvt_hf.commands.train_classification"]
    result = python(*launch, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    first = re.search(r"top-1 ([\d.]+), top-5 ([\d.]+) on 360 images", result.stdout)
    print(first[0])
    assert float(first[1]) > 0.5
    again = python(*launch, *arguments, "--resume_from_checkpoint", "true")
    assert again.returncode == 0 and first[0] in again.stdout
