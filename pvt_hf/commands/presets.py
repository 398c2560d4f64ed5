"""Named values of arguments: of each command its own defaults, and what `--smoke` and `--demo` choose."""

from typing import Any

Preset = dict[str, Any]

# Of all training commands, where `TrainingArguments` has others.
_TRAINING: Preset = {
    "seed": 0,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 50,
}
# Of the bundled scenes: digits have no mirror images, and scenes are small.
_SCENES: Preset = {
    "learning_rate": 5e-4,
    "max_grad_norm": 1.0,
    "drop_path_rate": 0.0,
    "flip": 0.0,
    "dataloader_num_workers": 0,
}
_DETECTION_SCENES: Preset = _SCENES | {
    "shortest_edges": [128],
    "longest_edge": 192,
    "per_device_train_batch_size": 4,
}

CLASSIFICATION: dict[str, Preset] = {
    "default": _TRAINING
    | {
        "output_dir": "runs/classification",
        "per_device_train_batch_size": 128,
        "per_device_eval_batch_size": 192,
        "dataloader_num_workers": 10,
    },
    "smoke": {
        "image_size": 32,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 32,
        "learning_rate": 2e-4,
        "warmup_epochs": 0,
        "repeats": 1,
        "mixup": 0.0,
        "cutmix": 0.0,
        "drop_path_rate": 0.0,
        "fp16": False,
        "dataloader_num_workers": 0,
        "logging_steps": 5,
    },
}
DETECTION: dict[str, Preset] = {
    "default": _TRAINING
    | {
        "output_dir": "runs/detection",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 1,
        "dataloader_num_workers": 4,
    },
    "smoke": _DETECTION_SCENES | {"num_train_epochs": 2, "warmup_iterations": 2, "logging_steps": 1, "num_scenes": 16},
    "demo": _DETECTION_SCENES
    | {
        "num_train_epochs": 12,
        "warmup_iterations": 100,
        "logging_steps": 20,
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 480,
    },
}
SEGMENTATION: dict[str, Preset] = {
    "default": _TRAINING
    | {
        "output_dir": "runs/segmentation",
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "dataloader_num_workers": 4,
    },
    "smoke": {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "num_scenes": 48,
        "flip": 0.0,
        "shortest_edge": 64,
        "longest_edge": 256,
        "crop_size": 64,
        "neck_channels": 64,
        "head_channels": 32,
        "eval_steps": 6,
        "save_steps": 6,
        "logging_steps": 2,
        "dataloader_num_workers": 0,
    },
    "demo": _SCENES
    | {
        "shortest_edge": 128,
        "longest_edge": 192,
        "crop_size": 160,
        "scales": [1.0, 1.0],
        "distortion": False,
        "neck_channels": 64,
        "head_channels": 64,
        "max_steps": 2000,
        "bf16": True,
        "channels_last": True,
        "eval_steps": 500,
        "save_strategy": "no",
    },
}
EVALUATION: dict[str, Preset] = {"smoke": {"max_eval_samples": 16, "dataloader_num_workers": 0}}

# What `--smoke` and `--demo` take for `--config_overrides`, by architecture.
SMALL_DETECTORS: dict[str, Preset] = {
    "retinanet": {"neck_channels": 64},
    "atss": {"neck_channels": 64},
    "gfl": {"neck_channels": 64},
    "mask_rcnn": {
        "neck_channels": 64,
        "box_head_size": 256,
        "roi_num_samples": 64,
        "num_candidates": 200,
        "num_candidates_train": 200,
        "num_proposals": 200,
    },
    "cascade_mask_rcnn": {
        "neck_channels": 64,
        "box_head_size": 256,
        "num_box_convs": 2,
        "roi_num_samples": 64,
        "num_candidates": 200,
        "num_candidates_train": 200,
        "num_proposals": 200,
        "num_proposals_train": 200,
    },
    "sparse_rcnn": {
        "neck_channels": 64,
        "num_proposals": 20,
        "num_heads": 3,
        "dynamic_channels": 16,
        "ffn_dim": 256,
    },
    "detr": {
        "d_model": 128,
        "num_queries": 20,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_ffn_dim": 512,
        "decoder_ffn_dim": 512,
        # Early on, dropout alone would make the queries differ, and validation boxes be one and the same.
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    },
}
