"""Serves a page in the browser on which models say what is in an image, or writes it as a Space of the Hub.

    pvt-hf demo runs/quickstart                                       # at http://127.0.0.1:7860
    pvt-hf demo OpenGVLab/pvt_v2_b0 pvt_v2_b2 --port 8080             # two models, side by side
    pvt-hf demo runs/detection --space my_space --push_to_hub me/my_space

A model is a folder, a repository of the Hub, or the name of a released variant. The page shows classes, boxes, masks or
label maps; of classifiers also where the evidence for a class is (Grad-CAM). Only this machine can open it unless
`--host` or `--share` is given. What is uploaded is deleted when the page ends, or after an hour.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..prediction.loading import load_predictor
from ..writing.hub import UploadError
from ..writing.text import escape_lines


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pvt-hf demo",
        usage="pvt-hf demo MODEL [MODEL ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder, repository of the Hub, or variant's name")
    parser.add_argument(
        "--title", default="Pyramid Vision Transformer", help="title of the page (default: Pyramid Vision Transformer)"
    )
    parser.add_argument("--device", help="where the models compute (default: a GPU if there is one, else the CPU)")
    parser.add_argument(
        "--host", help="address of the page (default: GRADIO_SERVER_NAME or 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, help="port of the page (default: the first free one from 7860 on)")
    parser.add_argument(
        "--share", action="store_true", help="make a public link through Gradio's servers (default: no)"
    )
    parser.add_argument("--max_file_size", default="20mb", help="of an upload, with its unit (default: 20mb)")
    parser.add_argument("--space", type=Path, metavar="FOLDER", help="write a Space there instead of serving the page")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload the Space of --space to this repository")
    parser.add_argument("--private", action="store_true", help="the repository must be private (default: no)")
    options = parser.parse_args(argv)
    if twice := {name for name in options.models if options.models.count(name) > 1}:
        parser.error(f"MODEL {', '.join(sorted(twice))} is given twice")
    if options.push_to_hub and not options.space:
        parser.error("--push_to_hub needs --space, the folder that is uploaded")
    if options.private and not options.push_to_hub:
        parser.error("--private is for --push_to_hub")
    return options


def run(options: argparse.Namespace) -> None:
    # Here, so that --help does without the extra.
    from ..demo.page import serve
    from ..demo.space import check_output, push_space, write_space

    if options.space:
        check_output(options.space)
        for name in options.models:  # a Space that cannot start is not written
            load_predictor(name, "cpu")
        write_space(options.models, options.space, options.title)
        print(f"the Space is in {options.space}")
        if options.push_to_hub:
            print(f"published: {push_space(options.space, options.push_to_hub, options.private)}")
        return
    with serve(
        options.models,
        options.device,
        options.host,
        options.port,
        options.share,
        options.max_file_size,
        options.title,
    ) as page:
        if options.share and not page.share_url:
            raise SystemExit("--share: Gradio's servers gave no link, see https://status.gradio.app")
        print(f"the page is at {page.share_url or page.local_url} until Ctrl-C", flush=True)
        page.block_thread()


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(parse(argv))
    except (UploadError, ValueError) as error:
        raise SystemExit(escape_lines(str(error))) from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
