"""Uploads a converted folder to the Hub."""

from pathlib import Path
from shlex import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from .. import models
from ..writing.hub import explain_upload_error
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
    api = HfApi()
    try:
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if private and not api.repo_info(repo).private:
            raise ConversionError(f"{repo} exists and is public, and `--private` is set: nothing was uploaded.")
        files = {path.name: path for path in sorted(folder.iterdir())}
        # By hand, as `upload_folder` makes several commits where hf_xet is installed: a failure would leave a part.
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        # Code that a former upload had and this one has not would be run with other weights.
        operations += [CommitOperationDelete(name) for name in api.list_repo_files(repo) if name in CODE - files.keys()]
        return api.create_commit(repo, operations, commit_message="Checkpoint converted by pvt_hf").commit_url
    except ConversionError:
        raise
    except Exception as error:  # HTTP errors, cut connections, offline mode: whatever it is, the folder is complete
        reason, may_have_arrived = explain_upload_error(error)
        outcome = "Whether the commit arrived is not known" if may_have_arrived else "Nothing was committed there"
        raise ConversionError(
            f"The upload to {repo} at {api.endpoint} failed: {reason}. {outcome}; everything is in {folder}. To try "
            f"again: hf upload {repo} {quote(str(folder))}"
        ) from error
