"""Streams of shards: which images are whose, and where a resumed run goes on without reading what it has seen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers.utils import logging

from .images import ImageError

if TYPE_CHECKING:
    import datasets

    Row = dict[str, Any]
    Rows = list[dict[str, Any] | None]
    Reader = Generator[tuple["Bookmark", Row], None, None]

logger = logging.get_logger(__name__)


# What a state says beside the bookmarks, with the least of each.
_COUNTS = {
    "epoch": 0,
    "images of an epoch": 1,
    "shards": 1,
    "lanes": 1,
    "images of a batch": 1,
    "images of a block": 1,
    "batches of an epoch": 1,
}


class Part(NamedTuple):
    """A part of a shard: its rows `i` with `first <= i % modulus < stop`."""

    shard: int
    first: int
    stop: int
    modulus: int


class Bookmark(NamedTuple):
    """Where a lane is in an epoch."""

    lap: int = 0  # how often it has begun its parts again
    part: int = 0  # of the lap, from 0, in which the block begins whose images it gives
    row: int = 0  # of that shard, from 0, likewise
    taken: int = 0  # images of the block that it has given
    images: int = 0  # of the epoch that it has given


def deal_shards(shards: int, lanes: int, lane: int) -> list[Part]:
    """What a lane reads of numbered shards, of which all lanes together read every row once.

    Each gets as many whole shards as there are for all, and a part of the rest: of one shard or two.

    Args:
        shards: Their number.
        lanes: Their number.
        lane: Which one, from 0.
    """
    whole, rest = divmod(shards, lanes)
    parts = [Part(shard, 0, 1, 1) for shard in range(lane, whole * lanes, lanes)]
    divisor = math.gcd(rest, lanes)
    share, modulus = rest // divisor, lanes // divisor  # a lane gets `share` of `rest * modulus` units
    start, stop = lane * share, (lane + 1) * share
    for shard in range(start // modulus, -(-stop // modulus)):
        first, last = max(start - shard * modulus, 0), min(stop - shard * modulus, modulus)
        parts.append(Part(whole * lanes + shard, first, last, modulus))
    return parts


class ShardedStream(IterableDataset):
    """Rows of a stream in epochs of a fixed length, dealt to processes and workers, shuffled and augmented by seed.

    The stream runs in lanes, one for each worker of each process that a run begins with. A lane has shards of its own,
    in an order of seed and epoch, and shuffles their images in blocks: while it gives those of one, it reads the next.
    The lanes give a batch each in turn, whichever worker reads them. So a few numbers say where a lane is: whatever a
    run has seen, it resumes by reading, for each lane, the beginning of one shard and at most two blocks, and decodes
    none of that. It may have other processes and workers then, if all of them get as many lanes, and has the same
    images in the same steps.

    A lane with fewer images than its share of an epoch begins again; of one with more, the rest is left for other
    epochs, which deal the shards anew.

    Args:
        data: A streamed data set of the library `datasets`.
        samples_per_epoch: Images of an epoch, over all processes.
        seed: Of the run.
        rank: Number of the process, from 0 (default: 0).
        world_size: Number of processes (default: 1).
        buffer_size: How many images of a lane are shuffled at a time, encoded as they are stored (default: 10,000).

    Raises:
        ValueError: If `buffer_size` is not positive.
        ImageError: While iterating, if a shard cannot be read, or there are fewer images than lanes.
    """

    def __init__(
        self,
        data: datasets.IterableDataset,
        samples_per_epoch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        buffer_size: int = 10_000,
    ):
        if buffer_size < 1:
            raise ValueError(f"`buffer_size` must be at least 1, got {buffer_size}.")
        self.data, self.seed, self.buffer_size = data, seed, buffer_size
        self.rank, self.world_size = rank, world_size
        self.samples_per_epoch, self.samples = samples_per_epoch, samples_per_epoch // world_size
        self.epoch = 0
        self.batch_size = 1  # of the loader, which the trainer sets: an epoch has whole batches only
        self.lanes, self._restored_lanes = world_size, 0
        self.bookmarks: dict[int, Bookmark] = {}  # of the lanes, in the epoch `bookmarked_epoch`
        self.bookmarked_epoch = 0
        self._readers: dict[int, tuple[int, int, Reader]] = {}  # of the lanes, with their epoch and next batch

    def augment(self, row: Mapping[str, Any], seed: tuple[int, ...], position: int) -> dict[str, Any] | None:
        """What becomes of a row, or `None` where it is skipped.

        Args:
            row: Of the data set.
            seed: Of what is random in it.
            position: Of the image in the epoch, over all processes.
        """
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        worker = get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        self.split(workers)
        for batch in range(index, self.samples // self.batch_size, workers):
            yield from self.read_batch(batch)[0]

    @property
    def batches(self) -> int:
        """Of an epoch, over all processes."""
        return self.samples // self.batch_size * self.world_size

    def split(self, workers: int) -> None:
        """Deals the lanes to workers.

        Args:
            workers: Of each process; 0 is one.

        Raises:
            ValueError: If the run that is resumed has a number of lanes that cannot be dealt evenly.
        """
        readers, shards = self.world_size * max(1, workers), self.data.num_shards
        self.lanes = self._restored_lanes or readers
        if self.lanes % readers:
            raise ValueError(
                f"The stream was dealt to {self.lanes} workers of all processes together. It can be resumed with as "
                f"many, or with a number that divides it, and not with {readers} ({self.world_size} x "
                f"{max(1, workers)})."
            )
        worker = get_worker_info()
        if self.rank == 0 and shards % self.lanes and (worker is None or worker.id == 0):
            logger.warning(
                f"{shards} shards cannot be dealt evenly to {self.lanes} workers of all processes together: each reads "
                f"{shards // self.lanes} of its own, and one or two that it shares, of which it keeps a part. A "
                "multiple of the workers would be faster."
            )

    def read_batch(self, number: int) -> tuple[Rows, tuple[int, Bookmark]]:
        """The next batch of one of the lanes of this process, and the bookmark of the lane behind it.

        Args:
            number: Of the batch, among those of this process in the epoch, from 0. A lane gives its batches in turn.
        """
        batch = number * self.world_size + self.rank  # among those of all processes
        turn, lane = divmod(batch, self.lanes)
        rows, bookmark = self._continue_lane(lane, turn), Bookmark()
        images: Rows = []
        for position in range(batch * self.batch_size, (batch + 1) * self.batch_size):
            bookmark, row = next(rows)
            images.append(self.augment(row, (self.seed, self.epoch, position), position))
        if batch + self.lanes >= self.batches:
            # At once: a reader of parquet that is left open holds its process back for seconds at the end.
            self._readers.pop(lane)[-1].close()
        return images, (lane, bookmark)

    def _continue_lane(self, lane: int, turn: int) -> Reader:
        *expected, rows = self._readers.get(lane, (None, None, None))
        if rows is None or expected != [self.epoch, turn]:
            bookmark = Bookmark()
            if turn and self.bookmarked_epoch == self.epoch:
                bookmark = self.bookmarks.get(lane, bookmark)
            if bookmark.images != turn * self.batch_size:
                raise ValueError(
                    f"Batch {turn} of lane {lane} is asked for, but the stream is known where batch "
                    f"{bookmark.images // self.batch_size} begins: a lane gives its batches in turn."
                )
            rows = self._read_lane(lane, bookmark)
        self._readers[lane] = self.epoch, turn + 1, rows
        return rows

    def _read_lane(self, lane: int, bookmark: Bookmark) -> Reader:
        images = bookmark.images
        while True:
            row, is_whole = None, not (bookmark.part or bookmark.row or bookmark.taken)
            for place, row in self._read_in_blocks(lane, bookmark):
                images += 1
                yield place._replace(images=images), row
            if row is None and is_whole:
                raise ImageError(
                    f"A worker gets no image of the {self.data.num_shards} shards, which are dealt to {self.lanes} "
                    "workers of all processes together. Use fewer of them."
                )
            bookmark = Bookmark(bookmark.lap + 1)

    def _read_in_blocks(self, lane: int, bookmark: Bookmark) -> Iterator[tuple[Bookmark, Row]]:
        """The rows of a lap, shuffled. As many are in memory as a block has."""
        rows = self._read_lap(lane, bookmark)
        start, taken = (bookmark.part, bookmark.row), bookmark.taken
        block: list[Any] = list(itertools.islice(rows, self.buffer_size))
        while block:
            order = np.random.default_rng((self.seed, self.epoch, lane, bookmark.lap, *start)).permutation(len(block))
            end: tuple[int, int] = block[-1][0]
            following: list[Any] = []
            for count, index in enumerate(order, 1):
                following += itertools.islice(rows, 1)
                (_, row), block[index] = block[index], None
                if count > taken:
                    yield Bookmark(bookmark.lap, *start, count), row
            block, start, taken = following, end, 0

    def _read_lap(self, lane: int, bookmark: Bookmark) -> Iterator[tuple[tuple[int, int], Row]]:
        """The rows of the parts of a lane from a bookmark on, each with the part and the row that follow it."""
        shards = self.data.num_shards
        order = np.random.default_rng((self.seed, self.epoch, bookmark.lap)).permutation(shards)
        parts, first = deal_shards(shards, self.lanes, lane), bookmark.row
        own = order[[part.shard for part in parts]].tolist()
        del order  # which has the shards of all
        for number in range(bookmark.part, len(parts)):
            part = parts[number]
            for index, row in enumerate(self._read_shard(own[number], first), first):
                if part.first <= index % part.modulus < part.stop:
                    yield (number, index + 1), row
            first = 0

    def _read_shard(self, number: int, first: int) -> Iterator[Row]:
        import fsspec.asyn

        if get_worker_info() is not None:
            fsspec.asyn.reset_lock()  # else remote files hang in a forked process
        shard = self.data.shard(self.data.num_shards, number)
        try:
            # By batches, since `datasets` gives single rows of one shard to one of the workers only.
            for batch in (shard.skip(first) if first else shard).iter(1):
                yield {name: values[0] for name, values in batch.items()}
        except Exception as error:  # from the libraries that read parquet, tar, HTTP
            raise ImageError(
                f"A shard of the stream cannot be read (number {number} of {self.data.num_shards}, from 0): "
                f"{type(error).__name__}: {error}"
            ) from error

    def note(self, lane: int, bookmark: Bookmark) -> None:
        """That a batch of this epoch has been used.

        Args:
            lane: As [`read_batch`] says.
            bookmark: As [`read_batch`] says.
        """
        if self.bookmarked_epoch != self.epoch:
            self.bookmarks, self.bookmarked_epoch = {}, self.epoch
        self.bookmarks[lane] = bookmark

    def state(self) -> dict[str, Any]:
        """What [`restore`] takes, as JSON has it, with the bookmarks of this process."""
        return {
            "epoch": self.bookmarked_epoch,
            "images of an epoch": self.samples_per_epoch,
            "shards": self.data.num_shards,
            "lanes": self.lanes,
            "images of a batch": self.batch_size,
            "images of a block": self.buffer_size,
            "batches of an epoch": self.batches,
            "bookmarks": {
                str(lane): list(bookmark)
                for lane, bookmark in self.bookmarks.items()
                if lane % self.world_size == self.rank  # others are restored, and have gone on since
            },
        }

    def restore(self, state: Mapping[str, Any], batch_size: int, workers: int) -> None:
        """Reads on where a run was.

        Args:
            state: From [`state`], with the bookmarks of all its processes.
            batch_size: Of one process, in images.
            workers: Of each process.

        Raises:
            ValueError: If the state is of another stream, or these processes and workers cannot have the same images.
        """
        _check_state(state)
        now = {
            "shards": self.data.num_shards,
            "images of an epoch": self.samples_per_epoch,
            "images of a batch": batch_size,
        }
        if wrong := [f"{name} is {value}, not {state[name]}" for name, value in now.items() if value != state[name]]:
            raise ValueError(f"The stream is another one: {'; '.join(wrong)}.")
        batches, self.batch_size = state["batches of an epoch"], batch_size
        if batches % self.world_size:
            raise ValueError(
                f"An epoch of the stream has {batches} batches, which {self.world_size} processes cannot share evenly."
            )
        if self.batches != batches:  # which are rounded for the number of processes
            self.samples = batches // self.world_size * batch_size
        if self.buffer_size != (size := state["images of a block"]):
            logger.warning(f"A worker goes on to shuffle {size} images at a time, not {self.buffer_size}.")
        self._restored_lanes, self.buffer_size, self._readers = state["lanes"], size, {}
        self.bookmarked_epoch = state["epoch"]
        self.bookmarks = {int(lane): Bookmark(*bookmark) for lane, bookmark in state["bookmarks"].items()}
        self.split(workers)


def _check_state(state: Mapping[str, Any]) -> None:
    counts = {name: value for name, value in state.items() if name != "bookmarks"}
    bookmarks = state.get("bookmarks")
    if (
        counts.keys() != set(_COUNTS)
        or not all(_is_count(value, least=_COUNTS[name]) for name, value in counts.items())
        or not isinstance(bookmarks, dict)
        or not all(lane.isdecimal() and int(lane) < counts["lanes"] for lane in bookmarks)
        or not all(isinstance(entry, list) and len(entry) == len(Bookmark()) for entry in bookmarks.values())
        or not all(_is_count(count) for entry in bookmarks.values() for count in entry)
    ):
        raise ValueError(f"The place in the stream must be {', '.join(_COUNTS)} and bookmarks, got {state!r:.200}.")


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least


class NumberedStream(Dataset):
    """The batches of a process in an epoch of a stream, asked for by their numbers, in turn: what leaves out the first
    ones of a resumed epoch leaves out numbers, and reads nothing.

    Args:
        stream: Whose epoch, batch size and lanes are set.
    """

    def __init__(self, stream: ShardedStream):
        self.stream = stream

    def __len__(self) -> int:
        """The images, which `Trainer` counts."""
        return len(self.stream)

    def __getitems__(self, numbers: list[int]) -> tuple[Rows, tuple[int, Bookmark]]:
        (number,) = numbers
        return self.stream.read_batch(number)


def collate_numbered(collate: Callable) -> Callable:
    """Makes batches of what a [`NumberedStream`] gives, which also have `bookmark`, for [`ShardedStream.note`].

    Args:
        collate: Makes a batch, a dictionary, of rows.
    """
    return partial(_collate, collate)


def _collate(collate: Callable, batch: tuple[Rows, tuple[int, Bookmark]]) -> dict[str, Any]:
    rows, bookmark = batch
    return collate(rows) | {"bookmark": bookmark}
