"""Two processes train and evaluate as one does. They do all their runs one after the other, for all tests here."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection

from pvt_hf.data.digits import write_scenes
from pvt_hf.evaluation.metrics import COCO_METRICS
from pvt_hf.training.run_checkpoints import CheckpointError, incompleteness
from pvt_hf.training.sharded import load_model_shards, load_optimizer_shards
from tests.support import classification_run, detection_run, normalizers_run, segmentation_run
from tests.support.small_models import assert_close
from tests.support.training_processes import Run, read_result, run_in_two_processes

pytestmark = pytest.mark.process

MODELS = [(version, is_backbone) for version in ("v1", "v2") for is_backbone in (False, True)]
# Detectors whose losses are divided by numbers of all processes.
GLOBAL_NORMALIZERS = ("atss", "gfl", "sparse_rcnn")
SGD = {"optim": "sgd", "learning_rate": 0.1}
CLASSIFICATION = SGD | {"trainer": {"ema_decay": 0.9}}
SHARDED = {"sharded": "FULL_STATE_DICT", "adam_epsilon": 1e-3, "save_strategy": "steps", "save_steps": 3, "images": 32}
SHARDS = SHARDED | {"sharded": "SHARDED_STATE_DICT", "max_steps": 4, "save_steps": 2}
# With accumulation, workers and everything random.
RANDOM = {
    "recipe": {
        "mixup": 0.8,
        "cutmix": 1.0,
        "repeats": 3,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "random_erasing": 0.25,
    },
    "model": {"drop_path_rate": 0.2},
    "images": 144,
    "dataloader_num_workers": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 4,
}
SEGMENTATION = SGD | {
    "fixed_norms": True,
    "drop_path_rate": 0.0,
    "max_steps": 3,
    "fields": {"classifier_dropout": 0.0},
}


def list_runs(folder: Path) -> list[Run]:
    """All of them, each in a folder of its own."""
    scenes = write_scenes(folder / "detection_data", images=16, validation=5)
    maps = segmentation_run.write_data(folder / "segmentation_data")
    part = {"per_device_train_batch_size": 4}
    detection = {"scenes": scenes, "recipe": "mask_rcnn_1x", "max_steps": 3, "per_device_train_batch_size": 2}
    detection |= {"per_device_eval_batch_size": 1}  # in a batch, an image's padding depends on the others
    runs = [
        ("distributed", f"{version}-{is_backbone}", {"version": version, "is_backbone": is_backbone})
        for version, is_backbone in MODELS
    ]
    runs += [
        ("classification", "classification", CLASSIFICATION | part),
        ("classification", "random", RANDOM),
        ("classification", "resumed", RANDOM | {"resume": folder / "random" / "checkpoint-12"}),
        ("classification", "ended", RANDOM | {"end_at": 3}),
        ("classification", "ended", RANDOM | {"resume": True}),
        ("detection", "detection", detection),
        *(("normalizers", architecture, {"architecture": architecture}) for architecture in GLOBAL_NORMALIZERS),
        ("segmentation", "segmentation", SEGMENTATION | part | {"scenes": maps}),
        # The last ones: what is done so that CPUs shard stays.
        ("classification", "sharded", SHARDED | part),
        ("classification", "sharded_resumed", SHARDED | part | {"resume": folder / "sharded" / "checkpoint-6"}),
        ("classification", "shards", SHARDS | part),
        ("classification", "shards_resumed", SHARDS | part | {"resume": folder / "shards" / "checkpoint-2"}),
    ]
    return [(task, folder / name, settings) for task, name, settings in runs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, worker_id):
    """What the two processes left. The workers of pytest share it."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    folder = root / "two_processes"
    with FileLock(root / "two_processes.lock"):
        if not (folder / "complete").exists():
            run_in_two_processes(list_runs(folder))
            (folder / "complete").touch()
    return folder


def weights(output_dir) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "model.safetensors")


@pytest.mark.parametrize(("version", "is_backbone"), MODELS)
def test_every_parameter_has_the_same_gradient_in_both_processes(version, is_backbone, folder):
    run = folder / f"{version}-{is_backbone}"
    for a, b in zip(*(torch.load(run / f"gradients-{rank}.pt", weights_only=True) for rank in (0, 1)), strict=True):
        assert a.any() and torch.equal(a, b)


def test_classifier_of_two_processes_is_that_of_one(folder, tmp_path):
    """DDP with gloo: 2 x 4 images are 8; and 13 validation images are counted once each."""
    classification_run.main(tmp_path, CLASSIFICATION | {"per_device_train_batch_size": 8})
    one, two = read_result(tmp_path), read_result(folder / "classification")
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert_close(weights(folder / "classification"), weights(tmp_path))
    assert_close(*(torch.load(run / "ema.pt") for run in (folder / "classification", tmp_path)))
    for key in ("eval_images", "eval_accuracy", "eval_top5_accuracy"):
        assert two["metrics"][key] == one["metrics"][key]
    assert one["metrics"]["eval_images"] == 13
    assert two["metrics"]["eval_loss"] == pytest.approx(one["metrics"]["eval_loss"], rel=1e-4)


def test_sharded_classifier_is_that_of_one_process(folder, tmp_path):
    """FSDP2 over two processes: the same losses and weights, complete in every file, also after a resume."""
    classification_run.main(tmp_path, SHARDED | {"sharded": None, "per_device_train_batch_size": 8})
    one, two = read_result(tmp_path), read_result(folder / "sharded")
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert_close(weights(folder / "sharded"), weights(tmp_path))
    assert two["metrics"]["eval_accuracy"] == one["metrics"]["eval_accuracy"] and two["metrics"]["eval_images"] == 13
    assert read_result(folder / "sharded_resumed")["losses"] == two["losses"] and len(two["losses"]) == 8
    assert_close(weights(folder / "sharded_resumed"), weights(tmp_path))


def test_any_number_of_processes_resumes_from_shards(folder, tmp_path):
    """Bit for bit in two processes; as closely as sums in another order allow in one, without FSDP."""
    run, resumed = folder / "shards", folder / "shards_resumed"
    assert len(read_result(run)["losses"]) == 4
    assert read_result(resumed)["losses"] == read_result(run)["losses"]
    final = weights(resumed)
    assert all(torch.equal(value, final[key]) for key, value in weights(run).items())
    alone = SHARDS | {"sharded": None, "save_strategy": "no", "per_device_train_batch_size": 8}
    classification_run.main(tmp_path, alone | {"resume": run / "checkpoint-2"})
    assert read_result(tmp_path)["losses"] == pytest.approx(read_result(run)["losses"], rel=1e-4)
    assert_close(weights(tmp_path), weights(run))


def test_shards_are_complete_if_those_of_all_processes_are(folder, tmp_path):
    checkpoint = shutil.copytree(folder / "shards" / "checkpoint-4", tmp_path / "checkpoint-4")
    assert not (checkpoint / "model.safetensors").exists() and incompleteness(checkpoint) is None
    written = {path.suffix for path in checkpoint.glob("*_shards/*")}
    assert written == {".safetensors"}  # and nothing that would be unpickled
    lost = next(checkpoint.glob("optimizer_shards/*00002*"))
    lost.unlink()
    assert incompleteness(checkpoint) == f"optimizer_shards/{lost.name} is missing"


def test_a_run_refuses_what_another_kind_of_run_wrote(folder, tmp_path):
    """Shards of another model, and whole states of FSDP without it."""
    trainer = classification_run.build(tmp_path, model={"num_labels": 7})
    with pytest.raises(CheckpointError, match="has no shards of this model and optimiser: .*Size mismatch"):
        load_model_shards(folder / "shards" / "checkpoint-4", trainer.model)
    with pytest.raises(CheckpointError, match="was written with FSDP and FULL_STATE_DICT"):
        trainer._check_kind(str(folder / "sharded" / "checkpoint-8"))
    trainer._check_kind(str(folder / "shards" / "checkpoint-4"))
    trainer._check_kind(str(folder / "random" / "checkpoint-12"))
    optimizer = torch.optim.SGD(trainer.model.parameters(), momentum=0.9)
    with pytest.raises(CheckpointError, match="optimizer.json is of another optimiser: it differs in "):
        load_optimizer_shards(folder / "shards" / "checkpoint-4", trainer.model, optimizer)


def test_resumed_classifier_is_bit_for_bit_that_of_an_uninterrupted_run(folder):
    """And each process draws its own random numbers."""
    uninterrupted, resumed = read_result(folder / "random"), read_result(folder / "resumed")
    assert resumed["losses"] == uninterrupted["losses"] and len(uninterrupted["losses"]) == 18
    final = weights(folder / "resumed")
    assert all(torch.equal(value, final[key]) for key, value in weights(folder / "random").items())
    assert [read_result(folder / "random", rank)["seed"] for rank in (0, 1)] == [0, 1]
    checksums = [read_result(folder / "resumed", rank)["checksums"] for rank in (0, 1)]
    assert checksums[0] >= 7 and checksums[1] == 0  # of a machine, the first process reads the checkpoint for both


def test_classifier_of_which_one_process_was_asked_to_end_is_that_of_an_uninterrupted_run(folder):
    """Both end at the same step, which is no step of a checkpoint otherwise, and go on from there."""
    uninterrupted, ended = read_result(folder / "random"), read_result(folder / "ended")
    assert (folder / "ended" / "checkpoint-3" / "complete.json").exists()
    assert ended["losses"] == uninterrupted["losses"]
    final = weights(folder / "ended")
    assert all(torch.equal(value, final[key]) for key, value in weights(folder / "random").items())


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_run_of_two_processes_then_one_then_two_is_that_of_two(streaming, tmp_path):
    """Images, augmentation, losses and weights, where nothing else is random. A stream keeps the images per batch."""
    settings = CLASSIFICATION | {"recipe": {"auto_augment": "rand-m9-mstd0.5-inc1"}, "streaming": streaming}
    pair, alone = {"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 8}
    if streaming:
        alone = pair | {"gradient_accumulation_steps": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_in_two_processes(
        [
            ("classification", whole, settings | pair),
            ("classification", parts, settings | pair | {"end_at": 3}),
        ]
    )
    classification_run.main(parts, settings | alone | {"end_at": 11, "resume": True})
    run_in_two_processes([("classification", parts, settings | pair | {"resume": True})])
    assert {path.name for path in parts.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-11"}
    assert read_result(parts)["losses"] == pytest.approx(read_result(whole)["losses"], rel=1e-4)
    assert len(read_result(whole)["losses"]) == 16
    assert_close(weights(parts), weights(whole))
    assert_close(*(torch.load(run / "ema.pt") for run in (parts, whole)))


def test_detections_of_two_processes_are_those_of_one(folder, tmp_path):
    """Both see the numbers that one process sees: of five images, one comes to both and counts once."""
    run, scenes = folder / "detection", folder / "detection_data"
    first, second = (read_result(run, rank) for rank in (0, 1))
    assert first["metrics"]["eval_images"] == 5 and set(first["seen"]) | set(second["seen"]) == set(range(1, 6))
    assert len(first["seen"]) == len(second["seen"]) == 3
    alone = detection_run.build(tmp_path, scenes, recipe="mask_rcnn_1x", per_device_eval_batch_size=1)
    alone.model.load_state_dict(AutoModelForObjectDetection.from_pretrained(run).state_dict())
    expected = alone.evaluate()
    names = {f"eval_{part}{name}" for part in ("", "mask_") for name in COCO_METRICS}
    measured = names & expected.keys()
    assert len(measured) == 20 and measured == names & first["metrics"].keys()  # no digit is large
    for key in measured:
        assert first["metrics"][key] == second["metrics"][key] == pytest.approx(expected[key], abs=1e-6), key
    together, single = (json.loads((path / "predictions.json").read_text()) for path in (run, tmp_path))
    assert len(single) > 0
    for results in (together, single):
        results.sort(key=lambda result: (result["image_id"], -result["score"], result["category_id"]))
    assert [result["image_id"] for result in together] == [result["image_id"] for result in single]
    assert [result["score"] for result in together] == pytest.approx([result["score"] for result in single], abs=1e-5)


@pytest.mark.parametrize("architecture", GLOBAL_NORMALIZERS)
def test_losses_and_gradients_of_two_processes_are_those_of_one(architecture, folder):
    """2 x 2 images are 1 x 4, whichever of them have the objects."""
    two, one = torch.load(folder / architecture / "means.pt"), normalizers_run.compute(architecture, range(4))
    terms = 6 if architecture == "sparse_rcnn" else 3
    assert two.keys() == one.keys() and sum(name.startswith("loss_") for name in one) == terms
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-10)


def test_segmenter_of_two_processes_is_that_of_one(folder, tmp_path):
    """2 x 4 images are 8, and the five validation images are counted once each, in whichever process."""
    run, maps = folder / "segmentation", folder / "segmentation_data" / "scenes"
    one = segmentation_run.build(tmp_path, maps, per_device_train_batch_size=8, **SEGMENTATION)
    one.train()
    expected, two = one.evaluate(), read_result(run)
    assert two["losses"] == pytest.approx(segmentation_run.losses(one), rel=1e-4)
    assert_close(weights(run), one.model.state_dict())
    assert two["metrics"]["eval_images"] == expected["eval_images"] == 5
    for key in ("mIoU", "mAcc", "aAcc", "loss"):
        assert two["metrics"][f"eval_{key}"] == pytest.approx(expected[f"eval_{key}"], rel=1e-4), key
    with (run / "eval_classes.csv").open() as file:
        assert sum(int(row["pixels"]) for row in csv.DictReader(file)) == one.matrix.counts.sum()
