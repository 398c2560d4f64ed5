"""Converts PVT checkpoints to verified Hugging Face folders, publishes them, and converts them back.

    pvt-hf convert pvt_v2_b2 converted/pvt_v2_b2             # downloads the release
    pvt-hf convert checkpoint.pth converted/mine             # of the released code, timm or transformers
    pvt-hf convert timm/pvt_v2_b2.in1k converted/b2          # a repository of the Hub
    pvt-hf convert semantic_fpn.pth converted/segmenter      # a complete detector or segmenter
    pvt-hf convert retinanet.pth converted/c --backbone-only # or its backbone
    pvt-hf convert --all converted                           # all the released variants
    pvt-hf convert --to official converted/b2 b2.pth         # and back

What the checkpoint is, is read from its tensors. Before anything is written, the converted model is compared in float64
with an independent evaluation of the source's weights.
"""

import argparse
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.utils import validate_repo_id
from transformers.utils.logging import disable_progress_bar

from ..conversion.convert import convert, export
from ..conversion.formats import FROM_OFFICIAL
from ..conversion.model_card import Conversion
from ..conversion.publish import publish
from ..conversion.rename import ConversionError
from ..variants import VARIANTS
from ..writing.text import escape_control
from .ending import describe_error, hide_reports, print_line, run_to_end

_EXPECTED = (ConversionError,)


def main(argv: list[str] | None = None) -> int:
    """Runs the program.

    Returns:
        Its exit code: 0; 1 for an error, which is printed in a line; 130 or 143 if it was interrupted (Ctrl-C) or ended
        (SIGTERM). Whatever it is, nothing half-written is left.
    """
    options = parse(argv)
    disable_progress_bar()  # of transformers: its bars for two small files hide the figures
    with print_log(), hide_reports():
        return run_to_end(lambda: _run(options), str(options.source or options.all), _EXPECTED, options.debug)


def _run(options: argparse.Namespace) -> int:
    chosen = {key: getattr(options, key) for key in ("backbone_only", "overwrite", "with_code")}
    if options.all:
        return 0 if convert_all(options.all, options.push_to_hub, options.private, options.debug, **chosen) else 1
    if options.to:
        print_export(Path(options.source), options.output, options.to, options.overwrite)
        return 0
    done = convert(options.source, options.output, variant=options.variant, card_name=options.push_to_hub, **chosen)
    print_conversion(done, options.output)
    if options.push_to_hub:
        print_line(f"  published: {publish(options.output, options.push_to_hub, options.private)}")
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pvt-hf convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", nargs="?", metavar="CHECKPOINT", help="file, variant or repo id (--to: a saved folder)"
    )
    parser.add_argument("output", nargs="?", metavar="OUTPUT_DIR", type=Path, help="folder to write (--to: a file)")
    parser.add_argument("--all", type=Path, metavar="OUTPUT_ROOT", help="convert every released variant")
    parser.add_argument("--to", choices=FROM_OFFICIAL, help="convert a saved folder back")
    parser.add_argument("--variant", choices=VARIANTS, help="insist on a variant")
    parser.add_argument("--backbone-only", action="store_true", help="write a backbone, leave the heads")
    parser.add_argument("--overwrite", action="store_true", help="replace a former conversion")
    parser.add_argument("--with-code", action="store_true", help="write the code too, for trust_remote_code=True")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload it; with --all, an owner of repositories")
    parser.add_argument("--private", action="store_true", help="into a private repository")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    if options.all and (options.source or options.to or options.variant):
        parser.error("--all takes no CHECKPOINT, --to or --variant")
    if not options.all and options.output is None:
        parser.error("CHECKPOINT and OUTPUT_DIR are required, or --all OUTPUT_ROOT")
    if options.to and (options.push_to_hub or options.with_code or options.variant or options.backbone_only):
        parser.error("--to takes SAVED_DIR, FILE and --overwrite only")
    if options.private and not options.push_to_hub:
        parser.error("--private needs --push-to-hub")
    if options.push_to_hub:
        _check_repo(parser, f"{options.push_to_hub}/name" if options.all else options.push_to_hub)
    return options


def _check_repo(parser: argparse.ArgumentParser, repo: str) -> None:
    try:
        validate_repo_id(repo)
    except ValueError as error:
        parser.error(f"--push-to-hub: {error}")
    if "/" not in repo:  # the card names the repository
        parser.error(f"--push-to-hub must be owner/name, got {repo}")


def convert_all(
    output_root: Path, repo_owner: str | None = None, private: bool = False, debug: bool = False, **options
) -> bool:
    """Converts every released variant to `output_root/<variant>`, prints a table, and tells whether all went well."""
    lines = ["| variant | tensors | parameters (M) | largest difference | result |", "|--|--|--|--|--|"]
    failures = 0
    for name in VARIANTS:
        folder = output_root / name
        try:
            repo = f"{repo_owner}/{name}" if repo_owner else None
            done = convert(name, folder, card_name=repo, **options)
            print_conversion(done, folder)
            result = publish(folder, repo, private) if repo else folder
            lines.append(
                f"| {name} | {done.tensors} | {done.parameters / 1e6:.1f} | {done.difference:.1e} | {result} |"
            )
        except Exception as error:
            failures += 1
            if debug:
                traceback.print_exc()
            lines.append(f"| {name} | | | | {escape_control(describe_error(error, name, _EXPECTED))} |")
    print("\n".join(lines))
    return not failures


def print_conversion(done: Conversion, output_dir: Path) -> None:
    variant = done.variant.name if done.variant else "a variant of your own"
    architecture = f" + {done.architecture.name}" if done.architecture.is_dense else ""
    print_line(f"{done.source}: {variant}{architecture}, {done.source_format.name} format, {done.dtype}")
    for note in done.notes:
        print_line(f"  {note}")
    print_line(f"  {done.tensors} tensors, {done.parameters / 1e6:.1f} M parameters, all of them used")
    print_line(f"  largest difference to the source, in float64: {done.difference:.1e}")
    print_line(f"  written to {output_dir}")


def print_export(saved_dir: Path, file: Path, to: str, overwrite: bool) -> None:
    done = export(saved_dir, file, to, overwrite)
    for note in done.notes:
        print_line(f"Note: {note}")
    print_line(f"{saved_dir}: {done.tensors} tensors written to {file} with the names of {to}.")


@contextmanager
def print_log() -> Iterator[None]:
    """Prints what the library logs while it works: its downloads."""
    logger, handler = logging.getLogger("pvt_hf"), logging.StreamHandler(sys.stdout)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
