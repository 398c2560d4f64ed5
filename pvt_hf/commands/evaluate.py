"""Measures checkpoints and prints a table: what the papers state, what is measured, and the difference.

    pvt-hf convert --all converted
    accelerate launch -m pvt_hf.commands.evaluate --variant all --checkpoint_root converted --dataset_name imagenet-1k
    accelerate launch -m pvt_hf.commands.evaluate --model_name_or_path converted/retinanet_pvt_s \\
        --annotations coco/annotations/instances_val2017.json --images coco/val2017
    pvt-hf evaluate --model_name_or_path converted/semantic_fpn_pvt_s --images ade20k/images/validation \\
        --maps ade20k/annotations/validation
    pvt-hf evaluate --smoke --model_name_or_path runs/classification                # on bundled data

What is measured follows from the model: top-1 and top-5 of a classifier, COCO's AP of a detector, mIoU of a segmenter,
each counted as the released code does. The data's classes are those of the model by their names, in any order. The
images are prepared by the checkpoint's own image processor. Several
processes count every image once.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from ..prediction.predictor import find_task
from ..training.arguments import EvaluationArguments
from ..variants import VARIANTS
from ..writing.files import atomic_file
from .measure import Measurement, find_measurement, published_metrics
from .parser import check_options, parse_arguments
from .presets import EVALUATION
from .shared import exit_on_bad_data, read_config


def find_checkpoints(options: EvaluationArguments) -> list[str]:
    """What is measured: checkpoints by name, or the converted ones of the variants."""
    if options.variant is None:
        return options.model_name_or_path or []
    names = VARIANTS if options.variant == "all" else [options.variant]
    checkpoints = [Path(options.checkpoint_root) / name for name in names]
    if missing := [str(checkpoint) for checkpoint in checkpoints if not checkpoint.is_dir()]:
        raise SystemExit(f"Not there: {', '.join(missing)}. `pvt-hf convert --all converted` makes them.")
    return [str(checkpoint) for checkpoint in checkpoints]


def table_rows(checkpoint: str, percentages: dict[str, float], paper: dict[str, float], images: float) -> list[str]:
    """Lines of the table, one per metric."""
    rows = []
    for name, value in percentages.items():
        stated, difference = (paper[name], f"{value - paper[name]:+.2f}") if name in paper else ("", "")
        rows.append(f"| {checkpoint} | {name} | {stated} | {value:.2f} | {difference} | {images} |")
    return rows


def choose_measurement(checkpoint: str, config: PreTrainedConfig, options: EvaluationArguments) -> Measurement:
    """How a checkpoint is measured.

    Raises:
        SystemExit: If it cannot be, or options are given that it has no use for.
    """
    try:
        measurement = find_measurement(config)
    except ValueError as error:
        raise SystemExit(f"{checkpoint} cannot be measured: {error}") from error
    check_options(options, checkpoint, find_task(config).models)
    return measurement


def main(argv: Sequence[str] | None = None) -> int:
    (options,) = parse_arguments((EvaluationArguments,), argv, "pvt-hf evaluate", __doc__, EVALUATION)
    configs = {checkpoint: read_config(checkpoint) for checkpoint in find_checkpoints(options)}
    measurements = {  # before the first is measured
        checkpoint: choose_measurement(checkpoint, config, options) for checkpoint, config in configs.items()
    }
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    rows, results = ["| checkpoint | metric | paper | measured | difference | images |", "|--|--|--|--|--|--|"], {}
    for checkpoint, config in configs.items():
        measurement = measurements[checkpoint]
        with exit_on_bad_data():
            trainer, metrics = measurement.measure(checkpoint, measurement.recipe, options)
        limit = getattr(trainer, "max_detections", 100)
        names = [name.replace("AR100", f"AR{limit}") for name in measurement.metrics]
        percentages = {name: 100 * metrics[f"eval_{name}"] for name in names if f"eval_{name}" in metrics}
        if trainer.is_world_process_zero() and (unmeasured := getattr(trainer, "unmeasured", ())):
            print(f"{checkpoint}: no ground truth for {', '.join(unmeasured)}")
        rows += table_rows(checkpoint, percentages, published_metrics(config, options.recipe), metrics["eval_images"])
        results[checkpoint] = percentages | {"images": metrics["eval_images"]}
        if trainer.is_world_process_zero():  # after each checkpoint: all of them take hours
            with atomic_file(output_dir / "results.json") as file:
                file.write_text(json.dumps(results, indent=2))
    if trainer.is_world_process_zero():
        print("\n".join(rows))
    trainer.accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
