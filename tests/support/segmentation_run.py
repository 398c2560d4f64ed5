"""A small run of the segmenters' trainer on scenes, in this process (`build`) or in others (`main`)."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn
from transformers import AutoModelForSemanticSegmentation, TrainingArguments, set_seed

import pvt_hf
from pvt_hf.data.augmentation import SegmentationAugmentation
from pvt_hf.data.digits import write_scenes
from pvt_hf.data.segmentation import EvaluationMaps, TrainingMaps, read_segmentation_folders
from pvt_hf.recipes import SegmentationRecipe
from pvt_hf.training.segmentation import SegmentationTrainer
from tests.support.small_models import STAGES, small_config
from tests.support.training_processes import pause_after, write_result

RECIPE = SegmentationRecipe(shortest_edge=48, longest_edge=192, crop_size=48)


def write_data(folder: Path) -> Path:
    """24 scenes to train on and 5 to validate: of several sizes, and with some pixels ignored."""
    root = write_scenes(folder / "scenes", images=24, validation=5)
    for index, path in enumerate(sorted(root.glob("*/maps/*.png"))):
        labels = np.array(Image.open(path))
        labels[: 7 * (index % 5)] = 255
        Image.fromarray(labels).save(path)
    return root


def read(data: str | Path, split: str, **settings):
    return read_segmentation_folders(
        Path(data) / split / "images", Path(data) / split / "maps", **{"num_labels": 11} | settings
    )


def build(
    output_dir, data, *, model=None, fields=None, trainer=None, fixed_norms=False, drop_path_rate=0.1, **arguments
):
    """The trainer of a run on the scenes of a folder."""
    set_seed(0)
    if model is None:
        names = {label: str(label) for label in range(11)}
        fields = {"neck_channels": 8, "head_channels": 8, "loss_normalization": "all"} | (fields or {})
        backbone = small_config("v2", out_features=STAGES, drop_path_rate=drop_path_rate)
        config = pvt_hf.SemanticFPNConfig(backbone_config=backbone, id2label=names, **fields)
        model = AutoModelForSemanticSegmentation.from_config(config)
    if fixed_norms:  # statistics of a part are not those of the batch
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.Dropout2d):
                module.train = lambda mode=True, module=module: nn.Module.train(module, False)
    names = ("shortest_edge", "longest_edge", "scales", "max_share", "flip", "distortion")
    augment = {name: getattr(RECIPE, name) for name in names} | {"crop": (RECIPE.crop_size, RECIPE.crop_size)}
    size = {"shortest_edge": RECIPE.shortest_edge, "longest_edge": RECIPE.longest_edge}
    image_processor = pvt_hf.PvtSegmentationImageProcessor(size=size)
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    } | arguments
    return SegmentationTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(output_dir), **arguments),
        recipe=RECIPE,
        train_dataset=TrainingMaps(read(data, "train"), SegmentationAugmentation(**augment)),
        eval_dataset=EvaluationMaps(read(data, "validation"), image_processor),
        processing_class=image_processor,
        **(trainer or {}),
    )


def losses(trainer: SegmentationTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(output_dir: Path, settings: dict[str, Any]) -> None:
    """A run over the scenes of `settings`; losses and metrics are in `result-{rank}.json`."""
    settings = dict(settings)
    scenes, pause = settings.pop("scenes"), settings.pop("pause_after", None)
    trainer = build(output_dir, scenes, **settings)
    pause_after(trainer, pause)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    write_result(trainer, output_dir, metrics=metrics)
