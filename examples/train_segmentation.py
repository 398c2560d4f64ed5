"""Trains a segmenter with the papers' recipe for ADE20K, on one process or many. Every argument of TrainingArguments
works too.

    accelerate launch examples/train_segmentation.py --variant pvt_small --backbone_checkpoint converted/pvt_small \\
        --dataset_name zhoubolei/scene_parse_150 --reduce_labels --class_names ade20k.json
    python examples/train_segmentation.py --smoke --output_dir runs/smoke          # all of it in a minute, offline
    python examples/train_segmentation.py --demo --backbone_checkpoint runs/detection    # learns digits in minutes
    python examples/train_segmentation.py --model_name_or_path my_segmenter --max_steps 2000 --class_names names.json \\
        --train_images data/images --train_maps data/maps --eval_images validation/images --eval_maps validation/maps
    python examples/train_segmentation.py --output_dir runs/x --resume_from_checkpoint true ...    # goes on exactly

`--dataset_name` is a data set of the Hub with two columns of images, such as `image` and `annotation`. Without one and
without folders, the data are handwritten digits on textured scenes, which are drawn for it. Maps are PNG files of one
channel, or of a palette whose indices are the labels; 255 is ignored.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import datasets
from transformers import AutoConfig, AutoModelForSemanticSegmentation, TrainingArguments, set_seed
from transformers.hf_argparser import string_to_bool

import pvt_hf
from pvt_hf.data.augmentation import SegmentationAugmentation
from pvt_hf.data.digits import CLASSES, write_scenes
from pvt_hf.data.segmentation import (
    EvaluationMaps,
    SegmentationData,
    TrainingMaps,
    read_segmentation_dataset,
    read_segmentation_folders,
)
from pvt_hf.recipes import SEGMENTATION_RECIPES
from pvt_hf.training.arguments import parse, training_arguments, training_parser
from pvt_hf.training.optimization import freeze_stages
from pvt_hf.training.segmentation import SegmentationTrainer
from pvt_hf.variants import backbone_config, find_variant

# Of the bundled data: digits have no mirror images, and scenes are small.
DEMO = {"shortest_edge": 128, "longest_edge": 192, "crop_size": 160, "scales": (1.0, 1.0), "flip": 0.0}
DEMO |= {"distortion": False, "drop_path_rate": 0.0, "neck_channels": 64, "head_channels": 64, "max_steps": 2000}
DEMO |= {"learning_rate": 5e-4, "max_grad_norm": 1.0, "bf16": True, "channels_last": True, "eval_steps": 500}
DEMO |= {"save_strategy": "no", "dataloader_num_workers": 0}
SMOKE = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "scenes": 48, "flip": 0.0}
SMOKE |= {"shortest_edge": 64, "longest_edge": 256, "crop_size": 64, "neck_channels": 64, "head_channels": 32}
SMOKE |= {"eval_steps": 6, "save_steps": 6, "logging_steps": 2, "dataloader_num_workers": 0}
FOLDERS = ("train_images", "train_maps", "eval_images", "eval_maps")
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def parse_arguments() -> tuple[argparse.Namespace, TrainingArguments]:
    parser = training_parser(
        __doc__, output_dir="runs/segmentation", per_device_train_batch_size=4, eval_strategy="steps", eval_steps=4000,
        save_strategy="steps", save_steps=4000, num_train_epochs=None, max_steps=None, dataloader_num_workers=4,
    )  # fmt: skip
    parser.add_argument("--recipe", default="semantic_fpn_40k", choices=list(SEGMENTATION_RECIPES))
    parser.add_argument("--variant", choices=list(pvt_hf.VARIANTS), help="the backbone; pvt_v2_b0 if missing")
    parser.add_argument("--backbone_checkpoint", help="a classifier or a detector to start the backbone from")
    parser.add_argument("--neck_channels", type=int, default=256)
    parser.add_argument("--head_channels", type=int, default=128)
    for name in FOLDERS:
        parser.add_argument(f"--{name}", help="a folder; all four or none")
    parser.add_argument("--map_column", help="of --dataset_name, if it has more than two columns of images")
    parser.add_argument("--reduce_labels", action="store_true", help="label 0 is no class, the others count from 0")
    parser.add_argument("--class_names", help="a json file: a list, or a dictionary from labels to names")
    parser.add_argument("--scenes", type=int, default=1000, help="how many are drawn for training, without data")
    parser.add_argument("--window", type=int, help="evaluate in windows of this many pixels of the network's input")
    parser.add_argument("--stride", type=int, help="from one window to the next")
    for name in ("shortest_edge", "longest_edge", "crop_size"):
        parser.add_argument(f"--{name}", type=int, help="in pixels; official if missing")
    parser.add_argument("--scales", type=float, nargs=2, help="lowest and highest; official if missing")
    for name in ("flip", "max_share", "drop_path_rate"):
        parser.add_argument(f"--{name}", type=float, help="official if missing")
    parser.add_argument("--distortion", type=string_to_bool, help="of colours; official (true) if missing")
    parser.add_argument("--demo", action="store_true", help="digits on scenes, at their size, for some minutes")
    if parser.parse_known_args()[0].demo:
        parser.set_defaults(**DEMO)
    options = parse(parser, SMOKE)
    if len({bool(getattr(options, name)) for name in FOLDERS}) > 1:
        raise SystemExit("--train_images, --train_maps, --eval_images and --eval_maps go together")
    recipe = SEGMENTATION_RECIPES[options.recipe]
    given = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(recipe)}
    given = {name: value for name, value in given.items() if value is not None and name != "learning_rate"}
    options.recipe = recipe = dataclasses.replace(recipe, **given)
    length = {"max_steps": recipe.steps} if options.num_train_epochs is None else {}
    return options, training_arguments(options, recipe, **length)


def load_data(options: argparse.Namespace, args: TrainingArguments, names: list[str]) -> list[SegmentationData]:
    """The images to train on, and those to evaluate on."""
    settings = {"num_labels": len(names), "reduce_labels": options.reduce_labels}
    if options.dataset_name:
        splits = options.train_split, options.eval_split
        found = (datasets.load_dataset(options.dataset_name, options.dataset_config_name, split=it) for it in splits)
        return [read_segmentation_dataset(split, options.map_column, **settings) for split in found]
    folders = [getattr(options, name) for name in FOLDERS]
    if not any(folders):
        with args.main_process_first(desc="drawing scenes"):
            root = Path(args.output_dir).parent / f"scenes-{options.scenes}"
            write_scenes(root, options.scenes, validation=max(8, options.scenes // 5))
        folders = [root / split / kind for split in ("train", "validation") for kind in ("images", "maps")]
    return [read_segmentation_folders(*pair, **settings) for pair in (folders[:2], folders[2:])]


def class_names(options: argparse.Namespace) -> list[str]:
    if options.class_names:
        names = json.loads(Path(options.class_names).read_text())
        return names if isinstance(names, list) else [names[str(label)] for label in range(len(names))]
    if options.model_name_or_path:
        return list(AutoConfig.from_pretrained(options.model_name_or_path).id2label.values())
    if options.dataset_name or options.train_images:
        raise SystemExit("--class_names is missing: a json file with the names of the classes")
    return ["background", *CLASSES]


def load_model(options: argparse.Namespace, names: list[str]):
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    if options.model_name_or_path:
        config = AutoConfig.from_pretrained(options.model_name_or_path, **labels)
        config.backbone_config.drop_path_rate = options.recipe.drop_path_rate
        if hasattr(config, "loss_normalization"):  # Semantic FPN
            config.loss_normalization = options.recipe.loss_normalization
        return AutoModelForSemanticSegmentation.from_pretrained(
            options.model_name_or_path, config=config, ignore_mismatched_sizes=True
        )
    if options.backbone_checkpoint:
        backbone = backbone_config(AutoConfig.from_pretrained(options.backbone_checkpoint))
        found = find_variant(backbone)
        if options.variant and (found is None or found.name != options.variant):
            raise SystemExit(f"--backbone_checkpoint {options.backbone_checkpoint} is not a {options.variant}")
    else:
        backbone = pvt_hf.build_config(options.variant or "pvt_v2_b0")
    backbone.out_features, backbone.drop_path_rate = STAGES, options.recipe.drop_path_rate
    config = pvt_hf.SemanticFPNConfig(
        backbone_config=backbone, loss_normalization=options.recipe.loss_normalization,
        neck_channels=options.neck_channels, head_channels=options.head_channels, **labels,
    )  # fmt: skip
    model = AutoModelForSemanticSegmentation.from_config(config)
    if options.backbone_checkpoint:
        tensors = pvt_hf.load_pretrained_backbone(model, options.backbone_checkpoint)
        print(f"all {tensors} tensors of the backbone are from {options.backbone_checkpoint}")
    return model


def main() -> None:
    options, args = parse_arguments()
    set_seed(args.seed)
    names, recipe = class_names(options), options.recipe
    train, validation = load_data(options, args, names)
    model = load_model(options, names)
    freeze_stages(model, options.freeze_stages)
    size = {"shortest_edge": recipe.shortest_edge, "longest_edge": recipe.longest_edge}
    image_processor = pvt_hf.PvtSegmentationImageProcessor(size=size, do_reduce_labels=options.reduce_labels)
    fields = ("shortest_edge", "longest_edge", "scales", "max_share", "flip", "distortion")
    crop = {"crop": (recipe.crop_size, recipe.crop_size)}
    augment = SegmentationAugmentation(**{name: getattr(recipe, name) for name in fields}, **crop)
    trainer = SegmentationTrainer(
        model=model,
        args=args,
        recipe=recipe,
        official_schedule=options.lr_scheduler_type is None,
        window=options.window,
        stride=options.stride,
        ema_decay=options.ema_decay,
        channels_last=options.channels_last,
        train_dataset=TrainingMaps(train, augment, options.skip_corrupt),
        eval_dataset=EvaluationMaps(validation, image_processor),
        processing_class=image_processor,
        dataset_name=options.dataset_name or options.train_images,
        initial_weights=options.model_name_or_path or options.backbone_checkpoint,
        settings={key: getattr(options, key) for key in ("variant", "backbone_checkpoint", "freeze_stages")},
    )
    trainer.train(args.resume_from_checkpoint)
    summary = trainer.finish()
    if trainer.is_world_process_zero():
        print(summary)


if __name__ == "__main__":
    main()
