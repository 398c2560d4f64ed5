"""The folder that an export writes: nothing in it is replaced, and it has programs of one model only."""

from pathlib import Path

from ..writing.files import why_unwritable
from .card import read_reports, read_weights
from .targets import TARGETS, ExportError


def check_output_dir(output_dir: Path, target: str, dtype: str, weights: str | None = None) -> None:
    """Refuses a folder that cannot be written, or holds anything but an export of the same model.

    Args:
        output_dir: The folder, which need not exist.
        target: Of the new file in it.
        dtype: Of the new file.
        weights: The SHA-256 of the model's weights (default: not known yet).

    Raises:
        ExportError: If it is so.
    """
    if reason := why_unwritable(output_dir):
        raise ExportError(f"`output_dir` {output_dir} cannot be written: {reason}.")
    if not output_dir.exists():
        return
    if not output_dir.is_dir() or output_dir.resolve() == Path.cwd():
        raise ExportError(f"`output_dir` must be a directory with a name of its own, got {output_dir}.")
    if not any(output_dir.iterdir()):
        return
    reports = read_reports(output_dir)
    if not reports:
        raise ExportError(f"`output_dir` {output_dir} is not empty, and no export is in it: choose another one.")
    if weights not in (None, read_weights(output_dir)):
        raise ExportError(f"`output_dir` {output_dir} has an export of other weights: choose another one.")
    if (target == "web") != any(report.target == "web" for report in reports):
        raise ExportError(f"`output_dir` {output_dir} has the settings of {reports[0].target}: choose another one.")
    place = TARGETS[target].place(dtype)
    if (output_dir / place).exists():
        raise ExportError(f"`output_dir` {output_dir} has {place} already: delete it, or choose another one.")
