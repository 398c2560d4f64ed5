"""For the Hub: code that is saved with a model, and what refusals mean, in words for the one who uploads."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub import get_token
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
