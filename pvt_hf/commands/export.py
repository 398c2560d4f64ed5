"""Exports a model to another runtime, and compares what runs there with the model.

    pvt-hf export pvt_v2_b2 exported                                  # exported/onnx/model.onnx
    pvt-hf export runs/classification exported --dtype int8 --calibration_images photos
    pvt-hf export runs/detection exported --target openvino --dtype fp16
    pvt-hf export runs/classification site/model --target web         # for transformers.js

MODEL is a folder, a repository of the Hub, or the name of a released variant, whose checkpoint is downloaded and
converted once. The file is run in its runtime beside the model, on three inputs, of three sizes where it takes them;
with --calibration_images, the classes, pixels or detections that are the same on them are counted, too. If the largest
difference is above the tolerance, or anything else goes wrong, nothing is left. OUT is a new folder, or an export of
the same weights, to which a file is added: onnx/model.onnx, onnx/model_fp16.onnx, onnx/model_quantized.onnx.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from ..data.images import ImageError
from ..exporting.export import ExportReport, export_model
from ..exporting.loading import load_model
from ..exporting.output_folder import check_output_dir
from ..exporting.targets import DTYPES, TARGETS, TOLERANCES, ExportError
from ..prediction.loading import ModelError
from .ending import hide_reports, print_line, run_to_end


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pvt-hf export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a repository of the Hub, or a released variant")
    parser.add_argument("output_dir", metavar="OUT", type=Path, help="the folder that is written")
    parser.add_argument("--target", choices=TARGETS, default="onnx", help="the runtime (default: onnx)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32)")
    parser.add_argument(
        "--calibration_images",
        metavar="FOLDER",
        help="images to calibrate int8 with, and to compare results on; all of them are used (default: none)",
    )
    tolerances = ", ".join(f"{value:g} for {dtype}" for dtype, value in TOLERANCES.items())
    parser.add_argument(
        "--tolerance",
        type=float,
        help=f"largest difference, as a share of the largest value of an output (default: {tolerances})",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (default: false)")
    return parser.parse_args(argv)


def print_report(report: ExportReport, output_dir: Path) -> None:
    print_line(f"{output_dir / report.file}: {report.dtype}, {report.megabytes:.1f} MB, for {report.shapes}")
    print_line(f"  {', '.join(report.inputs)} -> {', '.join(report.outputs)}")
    print_line(
        f"  largest difference to the model on three inputs: {report.difference:.1e} of the largest value of "
        f"{report.output} (tolerance {report.tolerance:g})"
    )
    if report.agreement is not None:
        print_line(f"  the same: {report.describe_agreement()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Returns:
        Its exit code: 0; 1 for an error, which is printed in a line; 130 or 143 if it was interrupted (Ctrl-C) or ended
        (SIGTERM). Whatever it is, nothing half-written is left.
    """
    options = parse(argv)
    TARGETS[options.target].import_packages(options.dtype)  # `pvt-hf` says which extra has one that is missing
    disable_progress_bar()  # of transformers

    def run() -> int:
        check_output_dir(options.output_dir, options.target, options.dtype)  # before a model is downloaded
        model, image_processor = load_model(options.model)
        report = export_model(
            model,
            options.output_dir,
            options.target,
            options.dtype,
            image_processor,
            options.calibration_images or (),
            options.tolerance,
            None if Path(options.model).exists() else options.model,
        )
        print_report(report, options.output_dir)
        return 0

    with hide_reports():
        return run_to_end(run, options.model, (ExportError, ImageError, ModelError), options.debug)


if __name__ == "__main__":
    sys.exit(main())
