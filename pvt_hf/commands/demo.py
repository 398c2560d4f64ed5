"""Serves a page in the browser on which models say what is in an image, or writes it as a Space of the Hub.

    pvt-hf demo runs/quickstart                                       # at http://127.0.0.1:7860
    pvt-hf demo OpenGVLab/pvt_v2_b0 pvt_v2_b2 --port 8080             # two models, side by side
    pvt-hf demo runs/detection --space my_space --push_to_hub me/my_space

A model is a folder, a repository of the Hub, or the name of a released variant. The page shows classes, boxes, masks or
label maps; of classifiers also where the evidence for a class is (Grad-CAM). Only this machine can open it unless
`--host` or `--share` is given. What is uploaded is deleted when the page ends, or after an hour.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..prediction.loading import load_predictor
from ..training.arguments import option
from ..writing.hub import UploadError
from ..writing.text import escape_control, escape_lines
from .parser import parse_arguments

POSITIONAL = {
    "models": {
        "nargs": "+",
        "help": "folders, repositories of the Hub, or names of released variants such as pvt_v2_b2",
    }
}


@dataclass
class DemoArguments:
    """Where the page is served or written."""

    title: str = option("Pyramid Vision Transformer", "title of the page (default: Pyramid Vision Transformer)")
    device: str | None = option(None, "where the models compute (default: a GPU if there is one, else cpu)")
    host: str | None = option(None, "address of the page (default: 127.0.0.1, for this machine only)")
    port: int | None = option(None, "port of the page (default: the first free one from 7860 on)")
    share: bool = option(False, "make a public link by Gradio's servers (default: false)")
    max_file_size: str = option("20mb", "largest file that is taken, with its unit (default: 20mb)")
    space: str | None = option(None, "new folder for a Space of the Hub, which is written instead (default: none)")
    push_to_hub: str | None = option(None, "repository to which the Space of --space is uploaded (default: none)")
    private: bool = option(False, "the repository must be private (default: false)")

    def __post_init__(self) -> None:
        if self.push_to_hub and not self.space:
            raise ValueError("--push_to_hub needs --space, the folder that is uploaded")
        if self.private and not self.push_to_hub:
            raise ValueError("--private is for --push_to_hub")


def write_page(models: Sequence[str], options: DemoArguments) -> None:
    """Writes the Space, and uploads it if that is asked for."""
    from ..demo.space import check_output, push_space, write_space

    folder = Path(str(options.space))
    check_output(folder)
    for name in models:  # a Space that cannot start is not written
        load_predictor(name, "cpu")
    write_space(models, folder, options.title)
    print(escape_control(f"the Space is in {folder}"))
    if options.push_to_hub:
        print(f"published: {push_space(folder, options.push_to_hub, options.private)}")


def serve_page(models: Sequence[str], options: DemoArguments) -> None:
    """Serves the page until Ctrl-C."""
    from ..demo.page import serve

    settings = {name: getattr(options, name) for name in ("device", "host", "port", "share", "max_file_size", "title")}
    with serve(models, **settings) as page:
        if options.share and not page.share_url:
            raise SystemExit("--share: Gradio's servers gave no link")
        print(f"the page is at {page.share_url or page.local_url} until Ctrl-C", flush=True)
        page.block_thread()


def main(argv: Sequence[str] | None = None) -> int:
    options, given = parse_arguments((DemoArguments,), argv, "pvt-hf demo", __doc__, {}, POSITIONAL)
    try:
        if twice := {name for name in given.models if given.models.count(name) > 1}:
            raise ValueError(f"MODEL is given twice: {', '.join(sorted(twice))}")
        (write_page if options.space else serve_page)(given.models, options)
    except (UploadError, ValueError) as error:
        raise SystemExit(escape_lines(str(error))) from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
