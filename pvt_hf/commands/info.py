"""Says what a model is: its size, its stages, how it sees images, and where its weights are from.

    pvt-hf info pvt_v2_b2
    pvt-hf info runs/detection --size 800 1216
    pvt-hf info OpenGVLab/pvt_v2_b2 --json

MODEL is a folder, a repository of the Hub, or the name of a released variant. Of files of safetensors the headers are
read, and multiply-adds are counted without computing anything; weights are loaded only where the names or shapes in
these headers are not the model's. Tensors that the files do not have, which would be at random, are listed.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..prediction.loading import ModelError
from ..prediction.model_info import inspect_model
from ..training.arguments import option
from ..writing.text import escape_lines
from .parser import parse_arguments

POSITIONAL = {"model": {"help": "a folder, a repository of the Hub, or the name of a released variant"}}


@dataclass
class InfoArguments:
    """What is said of a model."""

    size: list[int] | None = option(
        None,
        "height and width in pixels at which multiply-adds and maps are counted, or one number for both (default: of "
        "classifiers the size that they are used at, of detectors 800 1216, of segmenters 512)",
    )
    json: bool = option(False, "print json (default: false, a table)")


def main(argv: Sequence[str] | None = None) -> int:
    options, given = parse_arguments((InfoArguments,), argv, "pvt-hf info", __doc__, {}, POSITIONAL)
    try:
        info = inspect_model(given.model, options.size)
    except (ModelError, ValueError) as error:
        raise SystemExit(escape_lines(str(error))) from error
    print(json.dumps(info.to_dict(), indent=1) if options.json else info.describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
