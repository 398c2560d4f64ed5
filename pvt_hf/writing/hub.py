"""For the Hub: code that is saved with a model, and what refusals mean, in words for the one who uploads."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

_LOG_IN = "run `hf auth login`, or set HF_TOKEN"
_REASONS = {
    401: "it does not accept your token",
    403: "your token may not write there",
    404: "there is no such repository or owner, or your token may not see it",
    408: "it waited too long for the upload",
    409: "the repository is in conflict with this upload: somebody changes it at this moment, or the name is taken",
    413: "a file is larger than it takes",
    429: "too much was asked of it in a short time",
}
# How the Hub's own transport of large files words an answer.
_XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")


def list_code(auto_class: str, model: Any, image_processor: Any = None) -> dict[str, type[Any]]:
    """The classes whose code loads a model where pvt_hf is not installed, by their Auto classes.

    Args:
        auto_class: The name of the model's.
        model: One of pvt_hf.
        image_processor: That goes with it, if there is one.
    """
    classes = {auto_class: type(model), "AutoConfig": type(model.config)}
    return classes if image_processor is None else classes | {"AutoImageProcessor": type(image_processor)}


@contextmanager
def register_code(classes: Mapping[str, type[Any]]) -> Iterator[None]:
    """While it lasts, `save_pretrained` of these classes saves their code too, for `trust_remote_code=True`.

    Args:
        classes: As of [`list_code`]; none of them changes nothing.
    """
    try:
        for auto_class, registered in classes.items():
            registered.register_for_auto_class(auto_class)
        yield
    finally:
        for registered in classes.values():
            registered._auto_class = None


class UploadError(RuntimeError):
    """An upload that failed. The message says why, and where everything still is."""


def commit_folder(
    folder: Path, repo: str, message: str, is_former: Callable[[str], bool], private: bool, **settings: Any
) -> str:
    """Uploads the files of a folder in one commit: the repository has all of them or none.

    Args:
        folder: It is only read.
        repo: `owner/name`, or `name` in one's own namespace. Created unless it exists. The Hub is that of
            `HF_ENDPOINT`.
        message: Of the commit.
        is_former: Whether a file of the repository, by its name, is deleted unless the folder has it: what a former
            upload left would be mixed with these.
        private: Whether the repository must be private.
        **settings: Of `HfApi.create_repo`, such as `repo_type`.

    Returns:
        The address of the commit.

    Raises:
        UploadError: If the upload fails, or the repository exists and is public although `private` is set.
    """
    api, repo_type = HfApi(), settings.get("repo_type")
    try:
        repo = api.create_repo(repo, private=private or None, exist_ok=True, **settings).repo_id
        if private and not api.repo_info(repo, repo_type=repo_type).private:
            raise UploadError(f"{repo} exists and is public, and `--private` is set: nothing was uploaded.")
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        # By hand, as `upload_folder` makes several commits where hf_xet is installed: a failure would leave a part.
        operations: list[Any] = [CommitOperationAdd(name, path) for name, path in files.items()]
        known = api.list_repo_files(repo, repo_type=repo_type)
        operations += [CommitOperationDelete(name) for name in known if is_former(name) and name not in files]
        return api.create_commit(repo, operations, commit_message=message, repo_type=repo_type).commit_url
    except UploadError:
        raise
    except Exception as error:  # HTTP errors, cut connections, offline mode: whatever it is, the folder is complete
        reason, may_have_arrived = explain_upload_error(error)
        outcome = "Whether the commit arrived is not known" if may_have_arrived else "Nothing was committed there"
        again = f"hf upload {repo} {quote(str(folder))}" + (f" --repo-type {repo_type}" if repo_type else "")
        raise UploadError(
            f"The upload to {repo} at {api.endpoint} failed: {reason}. {outcome}; everything is in {folder}. To try "
            f"again: {again}"
        ) from error


def explain_upload_error(error: Exception) -> tuple[str, bool]:
    """Why an upload failed.

    Args:
        error: Whatever `huggingface_hub` raised: the Hub's answer may be the cause of it, or the cause of its cause.

    Returns:
        The reason in a line, in which no token is, and whether the files may have arrived all the same.
    """
    chain = list(_causes(error))
    if answered := next((cause for cause in chain if getattr(cause, "response", None) is not None), None):
        response, said = answered.response, getattr(answered, "server_message", None) or ""
        reason = _explain_answer(response.status_code, response.headers, said)
        return reason, _is_commit(response) and response.status_code >= 500
    if any(isinstance(cause, LocalTokenNotFoundError) for cause in chain):
        return f"there is no token: {_LOG_IN}", False
    if status := next(filter(None, (_XET_STATUS.search(str(cause)) for cause in chain)), None):
        return _explain_answer(int(status[1]), {}, ""), False  # files are sent before the commit
    kind = f"{type(error).__name__}: {error}"
    if cut := next((cause for cause in chain if isinstance(cause, HTTPError | ConnectionError | TimeoutError)), None):
        return hide_secrets(f"the connection failed ({kind})"), _is_commit(cut)
    return hide_secrets(kind), True


def _causes(error: Any) -> Iterator[Any]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_commit(asked: Any) -> bool:
    """Whether the request of an answer or error is the one that makes the files a part of the repository: the last."""
    try:
        return "/commit/" in str(asked.request.url)
    except (AttributeError, RuntimeError):  # it has none
        return False


def _explain_answer(status: int, headers: Mapping[str, str], said: str) -> str:
    """What an answer other than "fine" means, with what the Hub says itself."""
    reason = _REASONS.get(status, "it has an error of its own; try again later" if status >= 500 else "it refuses this")
    if status == 401:
        reason = f"{reason if get_token() else 'there is no token'}: {_LOG_IN}"
    if status == 429:
        window = re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
        wait = headers.get("Retry-After") or (window[1] if window else "")
        reason += f"; try again {f'in {wait} s' if wait.isdigit() else wait or 'later'}"
    said = " ".join(said.split())[:200]
    return hide_secrets(f"the Hub answers {status}: {reason}" + (f" (it says: {said})" if said else ""))


def hide_secrets(text: str) -> str:
    """The text without tokens, and without what follows the `?` of an address, where storages have their signatures.

    Args:
        text: For a terminal or a log.
    """
    if token := get_token():
        text = text.replace(token, "...")
    text = re.sub(r"\bhf_\w{16,}|(?i:bearer) \S+", "...", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]+", r"\1?...", text)
