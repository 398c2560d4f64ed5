"""What the callbacks of a run have counted, which belongs to the run: it stops early where it would have."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import EarlyStoppingCallback
from transformers.trainer_callback import ExportableState


def list_states(callbacks: Sequence[Any]) -> dict[str, Any]:
    """The states of callbacks by the names of their classes, as `TrainerState` has them: of several, a list.

    Args:
        callbacks: Of a `Trainer`; those without a state are passed over.
    """
    states = {name: [callback.state() for callback in alike] for name, alike in _group(callbacks)}
    return {name: found if len(found) > 1 else found[0] for name, found in states.items()}


def restore_counts(callbacks: Sequence[Any], saved: Mapping[str, Any]) -> None:
    """Gives callbacks what others of the same classes had counted, in their order, and leaves their settings.

    Args:
        callbacks: Of a `Trainer`.
        saved: From [`list_states`].
    """
    for name, alike in _group(callbacks):
        states = saved.get(name, [])
        for callback, state in zip(alike, states if isinstance(states, list) else [states], strict=False):
            for attribute in callback.state()["attributes"].keys() & state["attributes"].keys():
                setattr(callback, attribute, state["attributes"][attribute])


def find_early_stop(callbacks: Sequence[Any]) -> str | None:
    """Why a run has ended before its last step, in words; `None` if it has not.

    Args:
        callbacks: Of a `Trainer`, with what they have counted.
    """
    for callback in callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            count, patience = callback.early_stopping_patience_counter, callback.early_stopping_patience
            if count >= patience:
                return (
                    f"{type(callback).__name__} has seen {count} evaluations without an improvement; with a patience "
                    f"of more than {patience}, or without it, the run trains on"
                )
    return None


def _group(callbacks: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    groups: dict[str, list[Any]] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            groups.setdefault(type(callback).__name__, []).append(callback)
    yield from groups.items()
