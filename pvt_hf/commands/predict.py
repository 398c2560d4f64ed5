"""Predicts what is in images and videos, with a model of any task, and draws it.

    pvt-hf predict pvt_v2_b2 photos                                   # ImageNet's classes, by the released weights
    pvt-hf predict runs/detection street.jpg 'more/*.png' --threshold 0.5 --output_dir found
    pvt-hf predict converted/semantic_fpn_pvt_s photos --window 512 --stride 341
    pvt-hf predict runs/polyps new_images --binary_masks --tta_flip --output_dir new_masks
    pvt-hf predict runs/detection clip.mp4 --frame_interval 5         # needs the extra `video`

MODEL is a folder, a repository of the Hub, or the name of a released variant, whose checkpoint is downloaded and
converted once. IMAGES are files, folders and patterns. The output folder gets `predictions.json`, a picture of each
image in `pictures`, of a segmenter a PNG of each in `label_maps` (the labels of the maps that it was trained on; with
`--binary_masks` 0 and 255 in `masks`), and of a detector `coco_results.json`, COCO's format for results with the names
of files and classes. Images are seen turned as their EXIF says, and results belong to them as they are seen. A video
`clip.mp4` has to be named, and is predicted frame by frame: its frames are images `clip/000000`, `clip/000001`, ...,
and `pictures/clip.mp4` is the video with what was found.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..data.checks import describe_problems
from ..data.images import ImageError
from ..prediction.loading import DTYPES, ModelError, read_task
from ..prediction.run import predict_to_folder
from ..training.arguments import STRIDE, TTA_FLIP, TTA_SCALES, WINDOW, check_together, option
from ..writing.text import escape_control, escape_lines
from .parser import check_options, parse_arguments

POSITIONAL = {
    "model": {"help": "a folder, a repository of the Hub, or the name of a released variant, such as pvt_v2_b2"},
    "images": {"nargs": "+", "help": "images, videos, folders of images, and patterns such as 'photos/*.jpg'"},
}


@dataclass
class PredictionArguments:
    """How it is predicted, and what is written."""

    output_dir: str = option("runs/predictions", "where predictions are written (default: runs/predictions)")
    batch_size: int = option(1, "how many images are computed at a time (default: 1; a GPU is faster with more)")
    frame_interval: int = option(1, "of videos: every how many frames one is predicted (default: 1, all of them)")
    device: str | None = option(None, "where the model computes (default: a GPU if there is one, else cpu)")
    dtype: str = option("float32", "in which the model computes (default: float32)", choices=list(DTYPES))
    threshold: float = option(0.3, "of detectors: objects have a larger score (default: 0.3)")
    top_k: int = option(5, "of classifiers: how many classes are shown of each image (default: 5)")
    binary_masks: bool = option(False, "of segmenters of two classes: write 0 and 255, not 0 and 1 (default: false)")
    window: int | None = option(None, f"of segmenters: {WINDOW}")
    stride: int | None = option(None, f"of segmenters: {STRIDE}")
    tta_scales: list[float] | None = option(None, f"of segmenters and classifiers: {TTA_SCALES}")
    tta_flip: bool = option(False, f"of segmenters and classifiers: {TTA_FLIP}")
    subtask: str = option(
        "instance",
        "of MaskFormer and Mask2Former: what they are read as (default: instance)",
        choices=["instance", "semantic"],
    )
    pictures: bool = option(True, "write pictures and videos too (default: true)")
    skip_corrupt: bool = option(False, "skip corrupt images, videos, frames, and list them (default: false, an error)")

    def __post_init__(self) -> None:
        check_together(self, "window", "stride")


def main(argv: Sequence[str] | None = None) -> int:
    options, given = parse_arguments((PredictionArguments,), argv, "pvt-hf predict", __doc__, {}, POSITIONAL)
    settings = asdict(options) | {"tta_scales": options.tta_scales or ()}
    try:
        check_options(options, given.model, read_task(given.model)[1].models)
        rows, problems = predict_to_folder(given.model, given.images, report=_print_line, **settings)
    except (ImageError, ModelError, ValueError) as error:
        raise SystemExit(escape_lines(str(error))) from error
    if problems:
        print(describe_problems(problems, len(rows) + len(problems), "images", shown=len(problems)))
    _print_line(f"predictions for {len(rows)} images are in {options.output_dir}")
    return 0


def _print_line(text: str) -> None:
    print(escape_control(text))


if __name__ == "__main__":
    sys.exit(main())
