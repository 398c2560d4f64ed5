"""Which images each process is trained on, in which order, with the seed of their augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

Key = tuple[int, int, int, int]
_AT_ONCE = 2**16  # images of which there are numbers that are larger than those of an order


def split_by_chance(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers from 0 in two parts, each in its order.

    Args:
        count: Of the numbers.
        share: Of the second part, at least one number, in (0, 1).
        seed: Decides which.

    Raises:
        ValueError: If nothing would be left for the first part.
    """
    second = max(1, round(share * count))
    if not 0 < share < 1 or second >= count:
        raise ValueError(f"A share of {share} of {count} images leaves none of them.")
    order = np.random.default_rng(seed).permutation(count)
    return sorted(order[second:].tolist()), sorted(order[:second].tolist())


class EpochSampler(Sampler[Key]):
    """One process's share of an epoch, each image with the seed of its augmentation: `(index, seed, epoch, position)`.

    The position is that among all processes, which take the images in turn. So the images of a step of the optimiser,
    and their augmentations, are the same for every number of processes, size of a batch and number of accumulated
    batches with as many images per step. With repeated augmentation the order is that of timm's `RepeatAugSampler`, as
    in the released code: each image comes thrice in a row, for different processes, in an epoch of a third of the
    images, rounded down to a multiple of 256 where there are as many.

    In an epoch a process holds the order of its own images, 4 bytes for each, and at the beginning also that of all.

    Args:
        length: Number of images.
        seed: Of the run.
        rank: Number of the process, from 0 (default: 0).
        world_size: Number of processes (default: 1).
        repeats: How often an image is drawn in a row (default: 1, a plain shuffle in which every image comes once).
        images_per_step: Of all processes, a multiple of their number: an epoch has whole steps, and leaves out the rest
            (default: one image for each process).
    """

    def __init__(
        self,
        length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
        images_per_step: int | None = None,
    ):
        self.length, self.seed, self.rank, self.world_size, self.repeats = length, seed, rank, world_size, repeats
        self.images_per_step = images_per_step or world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        drawn = self.length // 256 * 256 if self.repeats > 1 and self.length >= 256 else self.length
        return drawn // self.images_per_step * self.images_per_step // self.world_size

    def __iter__(self) -> Iterator[Key]:
        for number, index in enumerate(_iter_share(self)):
            yield index, self.seed, self.epoch, number * self.world_size + self.rank


def _iter_share(sampler: EpochSampler) -> Iterator[int]:
    """The images of a process, of a random order of all."""
    # The order is that of int64, in half of the memory; and in the epoch only the share of this process is held.
    dtype = torch.int32 if sampler.length <= torch.iinfo(torch.int32).max else torch.int64
    generator = torch.Generator().manual_seed(sampler.seed + sampler.epoch)
    order = torch.randperm(sampler.length, generator=generator, dtype=dtype)
    share = torch.empty(len(sampler), dtype=dtype)  # (images of this process,)
    for first in range(0, len(share), _AT_ONCE):
        numbers = torch.arange(first, min(first + _AT_ONCE, len(share)))
        positions = numbers * sampler.world_size + sampler.rank
        share[first : first + _AT_ONCE] = order[positions // sampler.repeats]
    del order
    for some in share.split(_AT_ONCE):
        yield from some.tolist()


class AspectRatioSampler(Sampler[Key]):
    """Aspect-ratio grouping: one process's share of an epoch, `(index, seed, epoch, position)` as of [`EpochSampler`],
    in which every `group_size` in turn are images that are all wider than high, or all not.

    That wastes less padding (mmdetection's `DistributedGroupSampler`). The last group of each kind is filled with
    images from the beginning of its order, and the last step of an epoch with the first groups. The processes take a
    batch in turn, and so the images of a step are the same however many they are, as those of [`EpochSampler`].

    Args:
        sizes: (height, width) of each image in pixels.
        batch_size: Of one process, in images.
        seed: Of the run.
        rank: Number of the process, from 0 (default: 0).
        world_size: Number of processes (default: 1).
        images_per_step: Of all processes, a multiple of their batches: an epoch has whole steps (default: a batch for
            each process).
        group_size: Images in turn of one kind (default: those of a batch).
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        images_per_step: int | None = None,
        group_size: int | None = None,
    ):
        self.wide = torch.tensor([width > height for height, width in sizes])  # bool (images,)
        self.batch_size, self.seed, self.rank, self.world_size, self.epoch = batch_size, seed, rank, world_size, 0
        self.images_per_step, self.group_size = images_per_step or batch_size * world_size, group_size or batch_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        groups = sum(-(-int(count) // self.group_size) for count in (self.wide.sum(), (~self.wide).sum()))
        steps = -(-groups * self.group_size // self.images_per_step)
        return steps * self.images_per_step // self.world_size

    def __iter__(self) -> Iterator[Key]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        groups: list[torch.Tensor] = []
        for kind in (self.wide.nonzero().flatten(), (~self.wide).nonzero().flatten()):
            order = kind[torch.randperm(len(kind), generator=generator)]  # (images of the kind,)
            missing = -len(order) % self.group_size
            if len(order):
                order = torch.cat([order, order.repeat(-(-missing // len(order)))[:missing]])
            groups.append(order.view(len(order) // self.group_size, self.group_size))
        shuffled = torch.cat(groups)
        shuffled = shuffled[torch.randperm(len(shuffled), generator=generator)].flatten().tolist()
        step = self.batch_size * self.world_size
        for start in range(self.rank * self.batch_size, len(self) * self.world_size, step):
            for position in range(start, start + self.batch_size):
                yield shuffled[position % len(shuffled)], self.seed, self.epoch, position
