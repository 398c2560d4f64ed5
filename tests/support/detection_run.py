"""A small run of the detectors' trainer on scenes, in this process (`build`) or in others (`main`)."""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForObjectDetection, TrainingArguments, set_seed

import pvt_hf
from pvt_hf.data.augmentation import DetectionAugmentation
from pvt_hf.data.detection import EvaluationDetections, TrainingDetections, read_coco
from pvt_hf.recipes import DETECTION_RECIPES
from pvt_hf.training.detection import DetectionTrainer
from tests.support.small_models import STAGES, small_config
from tests.support.training_processes import pause_after, write_result

SIDES = {"shortest_edges": (64, 96), "longest_edge": 128}
HEADS = {
    "retinanet": {"neck_channels": 8, "num_head_convs": 1},
    "atss": {"neck_channels": 8, "num_head_convs": 1, "norm_groups": 4},
    "gfl": {"neck_channels": 8, "num_head_convs": 1, "norm_groups": 4},
    "mask_rcnn": {"neck_channels": 8, "num_mask_convs": 1, "box_head_size": 8, "num_candidates": 50,
                  "num_candidates_train": 50, "num_proposals": 50, "roi_num_samples": 32},
    "cascade_mask_rcnn": {"neck_channels": 8, "num_mask_convs": 1, "num_box_convs": 1, "box_head_size": 8,
                          "num_candidates": 50, "num_candidates_train": 50, "num_proposals": 50,
                          "num_proposals_train": 50, "roi_num_samples": 32},
    "sparse_rcnn": {"neck_channels": 8, "num_proposals": 8, "num_heads": 2, "num_attention_heads": 2,
                    "dynamic_channels": 4, "ffn_dim": 16},
    "detr": {"d_model": 16, "num_queries": 8, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
}  # fmt: skip
FIRST_STAGE = {"retinanet": 1, "atss": 1, "gfl": 1, "mask_rcnn": 0, "cascade_mask_rcnn": 0, "sparse_rcnn": 0, "detr": 3}


def small_detector(architecture: str, num_labels: int = 10, **overrides):
    backbone = small_config("v2", out_features=STAGES[FIRST_STAGE[architecture] :], drop_path_rate=0.1)
    fields = HEADS[architecture] | {"num_labels": num_labels} | overrides
    if architecture == "detr":
        return pvt_hf.build_detr(pvt_hf.build_detr_config(backbone, **fields))
    config_class = type(AutoConfig.for_model(f"pvt_hf_{architecture}"))
    return AutoModelForObjectDetection.from_config(config_class(backbone_config=backbone, **fields))


def build(
    output_dir, scenes, *, recipe="retinanet_1x", changes=None, data=None, empty=False, trainer=None, **arguments
):
    """The trainer of a run over the scenes of a folder; `data` replaces those for training."""
    set_seed(0)
    recipe = dataclasses.replace(DETECTION_RECIPES[recipe], **({"warmup_iterations": 2} | SIDES | (changes or {})))
    train, validation = (
        read_coco(scenes / split / "annotations.json", scenes / split / "images") for split in ("train", "validation")
    )
    train = (data or train).for_training(empty=empty)
    model = small_detector(recipe.architecture, len(train.label_names))
    arguments = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-3,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    } | arguments
    augment = DetectionAugmentation(
        recipe.shortest_edges, recipe.longest_edge, crop_shortest_edges=recipe.crop_shortest_edges
    )
    size = {"shortest_edge": max(recipe.shortest_edges), "longest_edge": recipe.longest_edge}
    return DetectionTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(output_dir), **arguments),
        recipe=recipe,
        train_dataset=TrainingDetections(train, augment, masks=recipe.architecture.endswith("mask_rcnn")),
        eval_dataset=EvaluationDetections(validation),
        processing_class=pvt_hf.PvtDetectionImageProcessor(size=size),
        **(trainer or {}),
    )


def main(output_dir: Path, settings: dict[str, Any]) -> None:
    """A run over the scenes of `settings`; losses, metrics and the evaluated images are in `result-{rank}.json`."""
    settings = dict(settings)
    scenes, pause = Path(settings.pop("scenes")), settings.pop("pause_after", None)
    trainer = build(output_dir, scenes, **settings)
    pause_after(trainer, pause)
    trainer.train()
    evaluate_batch, seen = trainer.evaluate_batch, []

    def counted(outputs, inputs):
        seen.extend(int(label["image_id"]) for label in inputs["labels"])
        evaluate_batch(outputs, inputs)

    trainer.evaluate_batch = counted
    metrics = trainer.evaluate()
    trainer.save_model()
    write_result(trainer, output_dir, metrics=metrics, seen=seen)
