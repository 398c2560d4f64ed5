"""`pvt-hf`: finds the command, and runs its module."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """A command of `pvt-hf`.

    Attributes:
        summary: What it does, in a line.
        extra: The extra of the package that it needs.
        packages: What it needs of that extra in any case.
    """

    summary: str
    extra: str
    packages: tuple[str, ...] = ()


_TRAINING = ("accelerate", "datasets", "matplotlib")
COMMANDS = {
    "quickstart": Command("fine-tune on a few images, and look at the result", "training", _TRAINING),
    "train-classification": Command("train a classifier", "training", (*_TRAINING, "timm")),
    "train-detection": Command(
        "train a detector: RetinaNet, ATSS, GFL, ...", "training", (*_TRAINING, "faster_coco_eval")
    ),
    "train-segmentation": Command("train Semantic FPN or UperNet", "training", (*_TRAINING, "evaluate")),
    "evaluate": Command("measure checkpoints beside the papers' numbers", "training", ("accelerate", "datasets")),
    "predict": Command("predict what is in images and videos, and draw it", "training"),
    "info": Command("say what a model is: size, stages, origin of weights", "training"),
    "export": Command("export to ONNX, OpenVINO, ExecuTorch or the web, verified", "export"),
    "benchmark": Command("measure speed and memory beside transformers, timm and others", "benchmark", ("tqdm",)),
    "demo": Command("show models on a page in the browser", "demo"),
    "convert": Command("convert checkpoints of the released code, timm, mm*", "conversion"),
}
# What a command may need beside that. Other packages come with pvt_hf, and their absence is an error as any other.
_OPTIONAL = {"evaluate", "faster_coco_eval", "gradio", "peft", "pytorch_grad_cam", "scipy", "sklearn", "timm", "xxhash"}
_OPTIONAL |= {"av", "matplotlib", "executorch", "nncf", "onnx", "onnxruntime", "onnxscript", "openvino"}
# The extra of a package, where it is not the command's.
_EXTRAS = {"av": "video", "peft": "lora", "executorch": "executorch"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The name of the command and its arguments; by default those of this process.

    Returns:
        The exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="pvt-hf",
        usage="pvt-hf COMMAND ...",
        description="Pyramid Vision Transformers: train, measure, predict, convert.",
        epilog="\n".join(
            [
                "commands (each has its own --help):",
                *(f"  {name:22}{command.summary}" for name, command in COMMANDS.items()),
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    name = parser.parse_args(argv[:1]).command
    command = COMMANDS[name]
    try:
        for package in command.packages:  # before any work is done
            importlib.import_module(package)
        return importlib.import_module(f"pvt_hf.commands.{name.replace('-', '_')}").main(argv[1:])
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in (*command.packages, *_OPTIONAL):
            raise
        extra = _EXTRAS.get(package, command.extra)
        print(f'pvt-hf {name}: {package} is missing; install it with: pip install "pvt_hf[{extra}]"', file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
