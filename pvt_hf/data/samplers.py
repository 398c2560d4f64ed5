"""Which images each process is trained on, in which order, with the seed of their augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from timm.data.distributed_sampler import RepeatAugSampler

Key = tuple[int, int, int, int]


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

    Together, the processes' n-th batches are the n-th batch of a single process with a larger one, augmentations
    included: the position is that among all processes. With repeated augmentation the order is that of timm's
    `RepeatAugSampler`, as in the released code: each image comes thrice in a row, for different processes, in an epoch
    of a third of the images.

    At the beginning of an epoch a process needs 4 bytes for each image of all of them, and then for each of its own;
    with repeated augmentation timm needs about ten times as much.

    Args:
        length: Number of images.
        seed: Of the run.
        rank: Number of the process, from 0 (default: 0).
        world_size: Number of processes (default: 1).
        repeats: How often an image is drawn in a row (default: 1, a plain shuffle in which every image comes once).
    """

    def __init__(self, length: int, seed: int, rank: int = 0, world_size: int = 1, repeats: int = 1):
        self.length, self.seed, self.rank, self.world_size, self.repeats = length, seed, rank, world_size, repeats
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._build_repeated()) if self.repeats > 1 else self.length // self.world_size

    def _build_repeated(self) -> RepeatAugSampler:
        from timm.data.distributed_sampler import RepeatAugSampler

        # timm rounds down to a multiple of 256, in older versions also fewer images: to none.
        rounding = 256 if self.length >= 256 else 0
        return RepeatAugSampler(
            range(self.length), self.world_size, self.rank, num_repeats=self.repeats, selected_round=rounding
        )

    def __iter__(self) -> Iterator[Key]:
        if self.repeats > 1:
            sampler = self._build_repeated()
            sampler.set_epoch(self.seed + self.epoch)
            indices = iter(sampler)
        else:
            indices = _iter_share(self.length, self.seed + self.epoch, self.rank, self.world_size)
        for count, index in enumerate(indices):
            yield index, self.seed, self.epoch, count * self.world_size + self.rank


def _iter_share(length: int, seed: int, rank: int, world_size: int) -> Iterator[int]:
    """Every `world_size`-th number of a random order of `length`, as many for each process."""
    # The order is that of int64, in half of the memory; and in the epoch only the share of this process is held.
    dtype = torch.int32 if length <= torch.iinfo(torch.int32).max else torch.int64
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    share = order[rank : length // world_size * world_size : world_size].clone()  # (images of this process,)
    del order
    for some in share.split(2**16):
        yield from some.tolist()


class AspectRatioSampler(Sampler[Key]):
    """Aspect-ratio grouping: one process's share of an epoch, `(index, seed, epoch, position)` as of [`EpochSampler`],
    in which every `batch_size` in turn are images that are all wider than high, or all not.

    That wastes less padding (mmdetection's `DistributedGroupSampler`). The last batch of each group is filled with
    images from the beginning of its order.

    Args:
        sizes: (height, width) of each image in pixels.
        batch_size: Of one process, in images.
        seed: Of the run.
        rank: Number of the process, from 0 (default: 0).
        world_size: Number of processes (default: 1).
    """

    def __init__(
        self, sizes: Sequence[tuple[int, int]], batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ):
        self.wide = torch.tensor([width > height for height, width in sizes])  # bool (images,)
        self.batch_size, self.seed, self.rank, self.world_size, self.epoch = batch_size, seed, rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        batches = sum(-(-int(count) // self.batch_size) for count in (self.wide.sum(), (~self.wide).sum()))
        return -(-batches // self.world_size) * self.batch_size

    def __iter__(self) -> Iterator[Key]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        batches: list[list[int]] = []
        for group in (self.wide.nonzero().flatten(), (~self.wide).nonzero().flatten()):
            order = group[torch.randperm(len(group), generator=generator)]  # (images of the group,)
            missing = -len(order) % self.batch_size
            if len(order):
                order = torch.cat([order, order.repeat(-(-missing // len(order)))[:missing]])
            batches += order.view(-1, self.batch_size).tolist()
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        for number in range(self.rank, len(self) // self.batch_size * self.world_size, self.world_size):
            batch = batches[shuffled[number % len(shuffled)]]
            for place, index in enumerate(batch):
                yield index, self.seed, self.epoch, number * self.batch_size + place
