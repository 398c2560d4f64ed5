"""The folder that a conversion writes: nothing of others is deleted for it."""

from pathlib import Path

from huggingface_hub import ModelCard

from ..writing.files import why_unwritable
from .publish import CODE
from .rename import ConversionError, quote

# What a conversion writes, and therefore all that `--overwrite` deletes.
_WRITTEN = ("config.json", "model.safetensors", "preprocessor_config.json", "README.md")


def _is_former_conversion(folder: Path) -> bool:
    """Whether the files are those that a conversion writes, and the card says that one wrote them."""
    if any(path.name not in (*_WRITTEN, *CODE) for path in folder.iterdir()):
        return False
    try:
        return "conversion" in ModelCard.load(folder / "README.md").data.to_dict()
    except (OSError, ValueError):
        return False


def check_writable(path: Path, argument: str) -> None:
    """Raises a `ConversionError` that names the argument if nothing can be written there."""
    if reason := why_unwritable(path):
        raise ConversionError(f"`{argument}` {path} cannot be written: {reason}.")


def check_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Raises a `ConversionError` if `output_dir` cannot be written, or holds what a conversion must not replace."""
    check_writable(output_dir, "OUTPUT_DIR")
    if not output_dir.exists():
        return
    if not output_dir.is_dir() or output_dir.resolve() == Path.cwd():
        raise ConversionError(
            f"`OUTPUT_DIR` must be a new or an empty directory with a name of its own, got {output_dir}."
        )
    if any(output_dir.iterdir()):
        if not overwrite:
            raise ConversionError(f"`OUTPUT_DIR` {output_dir} is not empty; use --overwrite to replace a conversion.")
        if not _is_former_conversion(output_dir):
            raise ConversionError(
                f"`OUTPUT_DIR` {output_dir} is not what a conversion left, and --overwrite would delete it: "
                f"{quote(path.name for path in output_dir.iterdir())}."
            )
