"""Which images each process gets, in which order, with the seed of their augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler):
    """One process's share of an epoch, each image with the seed of its augmentation: `(index, seed, epoch, position)`.

    Together, the processes' n-th batches are the n-th batch of a single process with a larger one, augmentations
    included: the position is that among all processes. With repeated augmentation the order is timm's
    `RepeatAugSampler` (official: each image comes thrice in a row, for different processes, in an epoch of a third of
    the images).

    Args:
        length: Number of images.
        seed, rank, world_size: Of the run and of the process.
        repeats: How often an image is drawn in a row. 1 for a plain shuffle, in which every image comes once.
    """

    def __init__(self, length: int, seed: int, rank: int = 0, world_size: int = 1, repeats: int = 1):
        self.length, self.seed, self.rank, self.world_size, self.repeats = length, seed, rank, world_size, repeats
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._repeated()) if self.repeats > 1 else self.length // self.world_size

    def _repeated(self):
        from timm.data.distributed_sampler import RepeatAugSampler

        return RepeatAugSampler(range(self.length), self.world_size, self.rank, num_repeats=self.repeats)

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        if self.repeats > 1:
            sampler = self._repeated()
            sampler.set_epoch(self.seed + self.epoch)
            indices = iter(sampler)
        else:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch))
            usable = self.length // self.world_size * self.world_size
            indices = iter(order[self.rank : usable : self.world_size].tolist())
        for count, index in enumerate(indices):
            yield index, self.seed, self.epoch, count * self.world_size + self.rank


class AspectRatioSampler(Sampler):
    """One process's share of an epoch, `(index, seed, epoch, position)` as of [`EpochSampler`], in which every
    `batch_size` in turn are images of one orientation (wider than high, or not). That wastes less padding
    (mmdetection's `DistributedGroupSampler`). Each orientation's last batch is filled with images from the beginning of
    its order.

    Args:
        sizes: (height, width) of each image.
        batch_size: Of one process.
        seed, rank, world_size: Of the run and of the process.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, int]], batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ):
        self.wide = torch.tensor([width > height for height, width in sizes])
        self.batch_size, self.seed, self.rank, self.world_size, self.epoch = batch_size, seed, rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        batches = sum(-(-int(count) // self.batch_size) for count in (self.wide.sum(), (~self.wide).sum()))
        return -(-batches // self.world_size) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        batches = []
        for group in (self.wide.nonzero().flatten(), (~self.wide).nonzero().flatten()):
            order = group[torch.randperm(len(group), generator=generator)]
            missing = -len(order) % self.batch_size
            if len(order):
                order = torch.cat([order, order.repeat(-(-missing // len(order)))[:missing]])
            batches += order.view(-1, self.batch_size).tolist()
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        for number in range(self.rank, len(self) // self.batch_size * self.world_size, self.world_size):
            batch = batches[shuffled[number % len(shuffled)]]
            for place, index in enumerate(batch):
                yield index, self.seed, self.epoch, number * self.batch_size + place


class EvaluationShare(Sampler):
    """Every `world_size`-th image, from the `rank`-th on. All processes have equally many: where the images do not
    suffice for that, the first ones come again, and the trainer does not count them."""

    def __init__(self, length: int, rank: int, world_size: int):
        self.length, self.rank, self.world_size = length, rank, world_size

    def __len__(self) -> int:
        return -(-self.length // self.world_size)

    def __iter__(self) -> Iterator[int]:
        positions = range(self.rank, len(self) * self.world_size, self.world_size)
        return (position % self.length for position in positions)
