"""Runs that resume with other processes, batches or accumulation than they had."""

import math
from typing import Any

import numpy as np

STEPS_PER_EPOCH, GROUP_SIZE = "steps of an epoch", "images of one orientation in turn"
# How the images of a step are split. Of a data set with a length, their order does not depend on it.
_SPLIT = ("images per batch", "accumulated batches", "processes")
# What a resumed run is told by its checkpoint, and may have otherwise.
_TOLD = (STEPS_PER_EPOCH, GROUP_SIZE)


def count_images(layout: dict[str, Any]) -> int:
    """The images of a step.

    Args:
        layout: As a checkpoint has it.
    """
    return math.prod(int(layout[name]) for name in _SPLIT)


def compare_layouts(
    saved: dict[str, Any], now: dict[str, Any], is_stream: bool, allow_batch_change: bool | None = False
) -> list[str]:
    """What keeps a run from being resumed, in words.

    Args:
        saved: The layout of the run that wrote the checkpoint.
        now: That of this one.
        is_stream: Whether the order of the images depends on how they are split.
        allow_batch_change: Whether a step may have another number of images (default: `False`); `None`, if it cannot.
    """
    counts = [*_SPLIT, STEPS_PER_EPOCH, *({GROUP_SIZE} & now.keys())]
    if wrong := [name for name in counts if type(saved.get(name)) is not int or saved[name] < 1]:
        return [f"{name} must be at least 1, not {saved.get(name)!r:.200}" for name in wrong]
    free = {*_TOLD} if is_stream else {*_TOLD, *_SPLIT}
    names = [name for name in now if name not in free and saved.get(name) != now[name]]
    changed = [f"{name} is {now[name]}, not {saved.get(name)}" for name in names]
    if not is_stream and not allow_batch_change and count_images(saved) != count_images(now):
        advice = "" if allow_batch_change is None else " (--allow_batch_change resumes nevertheless)"
        changed.append(f"images per step are {count_images(now)}, not {count_images(saved)}{advice}")
    return changed


def find_position(step: int, saved: dict[str, Any], images: int, steps_per_epoch: int) -> int:
    """The step at which a run with other steps has seen as many images of as many epochs, or a part of a step less.

    Args:
        step: Of the run that wrote the checkpoint, from its beginning.
        saved: Its layout.
        images: Of a step now.
        steps_per_epoch: Now.
    """
    epoch, step = divmod(step, saved[STEPS_PER_EPOCH])
    return epoch * steps_per_epoch + min(step * count_images(saved) // images, steps_per_epoch)


def seed_of_process(seed: int, step: int, rank: int) -> int:
    """The seed of a process that has no random state of its own in the checkpoint.

    Args:
        seed: Of the run.
        step: At which it resumes.
        rank: Of the process, from 0.
    """
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
