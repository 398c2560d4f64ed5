"""Uploads a converted folder to the Hub."""

from pathlib import Path

from .. import models
from ..writing.hub import UploadError, commit_folder
from .rename import ConversionError

CODE = frozenset(path.name for path in Path(models.__file__).parent.glob("*.py"))  # what --with-code may write


def publish(folder: Path, repo: str, private: bool) -> str:
    """Uploads the files of `folder` in one commit: the repository has all of them or none.

    Args:
        folder: A converted folder. It is only read.
        repo: `owner/name`, or `name` in one's own namespace. Created unless it exists. The Hub is that of
            `HF_ENDPOINT`.
        private: Whether the repository must be private.

    Returns:
        The address of the commit.

    Raises:
        ConversionError: If the upload fails, or the repository exists and is public although `private` is set.
    """
    try:  # code that a former upload had and this one has not would be run with other weights
        return commit_folder(folder, repo, "Checkpoint converted by pvt_hf", CODE.__contains__, private)
    except UploadError as error:
        raise ConversionError(str(error)) from error
