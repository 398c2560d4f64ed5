"""Streams of shards: every image once, in an order that processes, workers and resumes do not change."""

import itertools
import json
import time
import tracemalloc
from collections import Counter

import datasets
import numpy as np
import pytest
from accelerate import skip_first_batches
from transformers import TrainingArguments

from pvt_hf.data.images import ImageError
from pvt_hf.data.streams import ShardedStream, deal_shards
from pvt_hf.training.streams import build_loader
from tests.data.test_classification import png

ROWS = 24  # of a shard


class Shards:
    """So many shards of so many rows, of which none is made before it is read."""

    def __init__(self, num_shards: int, rows: int, number: int = 0, first: int = 0):
        self.num_shards, self.rows, self.number, self.first = num_shards, rows, number, first
        self.reads = []

    def shard(self, num_shards: int, number: int) -> "Shards":
        self.reads.append(0)
        shard = Shards(num_shards, self.rows, number)
        shard.reads = self.reads
        return shard

    def skip(self, first: int) -> "Shards":
        shard = Shards(self.num_shards, self.rows, self.number, first)
        shard.reads = self.reads
        return shard

    def iter(self, batch_size: int):
        assert batch_size == 1
        for row in range(self.first, self.rows):
            self.reads[-1] += 1
            yield {"number": [self.number * self.rows + row]}


class Numbers(ShardedStream):
    """Images that are numbers, each with the seed of its augmentation."""

    augmented = 0

    def augment(self, row, seed, position):
        self.augmented += 1
        return row["number"], *seed


def build(data, share: tuple[int, int, int] = (0, 1, 0), **options) -> Numbers:
    """A stream in batches of two; `share` has rank, processes and workers."""
    rank, world_size, workers = share
    options = {"samples_per_epoch": data.num_shards * ROWS, "seed": 3, "buffer_size": 5} | options
    stream = Numbers(data, rank=rank, world_size=world_size, **options)
    stream.batch_size = 2
    stream.split(workers)
    return stream


def run(streams: list[Numbers], start: int, stop: int) -> list[list[tuple]]:
    """The batches of all processes in turn, as a run of them has them, which knows where it is."""
    batches = []
    for number in range(start, stop):
        stream = streams[number % len(streams)]
        rows, bookmark = stream.read_batch(number // len(streams))
        stream.note(*bookmark)
        batches.append(rows)
    return batches


def start_run(world_size: int, workers: int, state: dict | None = None, shards: int = 6, **options) -> list[Numbers]:
    """The streams of all processes, which resume where others were."""
    shares = [(rank, world_size, workers) for rank in range(world_size)]
    streams = [build(Shards(shards, ROWS), share, **options) for share in shares]
    for stream in streams if state else []:
        stream.restore(json.loads(json.dumps(state)), 2, workers)
    return streams


def merge_states(streams: list[Numbers]) -> dict:
    bookmarks = [stream.state()["bookmarks"] for stream in streams]
    return streams[0].state() | {"bookmarks": {lane: entry for part in bookmarks for lane, entry in part.items()}}


@pytest.mark.parametrize("lanes", range(1, 14))
def test_shards_are_dealt_evenly_and_every_row_once(lanes):
    """Also where there are fewer shards than lanes, or no multiple of them."""
    for shards in range(1, 30):
        dealt = [deal_shards(shards, lanes, lane) for lane in range(lanes)]
        counts = np.zeros((shards, 1 + lanes), int)  # of the rows of a shard, how often each is read
        for part in (part for parts in dealt for part in parts):
            counts[part.shard] += np.isin(np.arange(1 + lanes) % part.modulus, range(part.first, part.stop))
        assert (counts == 1).all()
        assert all(len(parts) <= shards // lanes + 2 for parts in dealt)
        shares = [sum((part.stop - part.first) / part.modulus for part in parts) for parts in dealt]
        assert shares == pytest.approx([shards / lanes] * lanes)


@pytest.mark.parametrize(("shards", "world_size", "workers"), [(6, 1, 0), (6, 2, 3), (6, 1, 4), (2, 2, 4), (1, 4, 1)])
def test_an_epoch_has_every_image_once_in_another_order(shards, world_size, workers):
    epochs = []
    for epoch in (0, 1):
        streams = start_run(world_size, workers, shards=shards)
        for stream in streams:
            stream.set_epoch(epoch)
        batches = run(streams, 0, shards * ROWS // 2)
        assert sorted(number for batch in batches for number, *_ in batch) == list(range(shards * ROWS))
        assert [seed for batch in batches for _, *seed in batch] == [[3, epoch, p] for p in range(shards * ROWS)]
        epochs.append([number for batch in batches for number, *_ in batch])
        assert not any(stream._readers for stream in streams)  # all are closed
    assert epochs[0] != epochs[1]


def test_images_are_shuffled_within_a_block():
    """A worker has as many images in memory as a block, while it reads the next one."""
    stream = build(Shards(1, ROWS), buffer_size=8)
    numbers, ahead = [], []
    for number in range(ROWS // 2):
        numbers += [number for number, *_ in stream.read_batch(number)[0]]
        ahead.append(stream.data.reads[0] - len(numbers))
    assert [sorted(numbers[start : start + 8]) for start in (0, 8, 16)] == [list(range(n, n + 8)) for n in (0, 8, 16)]
    assert numbers != sorted(numbers) and max(ahead) == 8


# Of six lanes: processes and workers that read them.
SPLITS = [(1, 0), (1, 2), (1, 6), (2, 1), (2, 3), (3, 2), (6, 1)]


@pytest.mark.parametrize("start", [6, 20, 42])
def test_resumed_stream_is_the_same_with_other_processes_and_workers(start):
    """The same images with the same augmentation in the same order, of any shards, over two resumes."""
    for shards in (6, 4):
        whole = run(start_run(2, 3, shards=shards), 0, shards * ROWS // 2)
        before = start_run(2, 3, shards=shards)
        assert run(before, 0, start) == whole[:start]
        for split in SPLITS:
            first = start_run(*split, merge_states(before), shards=shards)
            middle = min(start + 6, len(whole))
            assert run(first, start, middle) == whole[start:middle]
            second = start_run(3, 1, merge_states(first), shards=shards)
            assert run(second, middle, len(whole)) == whole[middle:]


def test_a_lane_that_begins_again_resumes_too():
    """And an epoch that has ended leaves nothing for the next one."""
    options = {"shards": 3, "samples_per_epoch": 200}
    whole, before = start_run(1, 2, **options), start_run(1, 2, **options)
    expected = run(whole, 0, 100)
    counts = Counter(number for batch in expected for number, *_ in batch)
    assert set(counts.values()) == {2, 3} and sum(counts.values()) == 200 and len(counts) == 3 * ROWS
    run(before, 0, 75)
    resumed = start_run(1, 0, merge_states(before), **options)
    assert run(resumed, 75, 100) == expected[75:]
    for stream in (*whole, *resumed):
        stream.set_epoch(1)
    assert run(whole, 0, 20) == run(resumed, 0, 20)


def test_resume_reads_as_much_whatever_was_seen():
    """For each lane, the beginning of one shard and two blocks, also of `datasets`; and nothing is decoded again."""
    opened, rows = [], []

    def generate(shards):
        for shard in shards:
            opened.append(shard)
            for row in range(ROWS):
                rows.append(row)
                yield {"number": shard * ROWS + row}

    data = datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": list(range(50))})
    costs = []
    for seen in (2, 20, 20 + 20 * ROWS):  # batches of two images, in turn of two lanes
        before, after = (build(data, (0, 1, 2), buffer_size=8) for _ in range(2))
        expected = run([before], 0, seen + 2)[seen:]
        before = build(data, (0, 1, 2), buffer_size=8)
        run([before], 0, seen)
        opened.clear(), rows.clear()
        after.restore(before.state(), 2, 2)
        assert run([after], seen, seen + 2) == expected
        costs.append((len(opened), len(rows), after.augmented))
    assert costs[0] == (2, 2 * (8 + 4), 4)  # the block, and as many of the next one as were given
    assert costs[1] == costs[2] == (4, 2 * (24 + 6), 4)  # the last block of a shard, and of the next shard


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": 7}, "shards is 6, not 7"),
        ({"images of a batch": 4}, "images of a batch is 2, not 4"),
        ({"images of an epoch": 9}, "images of an epoch is 144, not 9"),
        ({"lanes": 3}, r"dealt to 3 workers of all processes together.* not with 2 \(1 x 2\)"),
        ({"lanes": 0}, "must be epoch, images of an epoch, shards, lanes"),
        ({"epoch": True}, "must be epoch"),
        ({"more": 1}, "must be epoch"),
        ({"bookmarks": {"4": [0, 0, 0, 0, 0]}}, "must be epoch"),
        ({"bookmarks": {"0": [0, 0, 0, 0]}}, "must be epoch"),
        ({"bookmarks": {"0": [0, 0, 0, 0, -1]}}, "must be epoch"),
        ({"bookmarks": [1]}, "must be epoch"),
    ],
)
def test_state_of_another_stream_is_refused(change, message):
    (stream,) = start_run(1, 2)
    run([stream], 0, 4)
    with pytest.raises(ValueError, match=message):
        start_run(1, 2, stream.state() | change)


def test_batches_that_cannot_be_shared_are_refused():
    (stream,) = start_run(1, 2, samples_per_epoch=2 * 13)
    run([stream], 0, 2)
    with pytest.raises(
        ValueError, match="An epoch of the stream has 13 batches, which 2 processes cannot share evenly"
    ):
        start_run(2, 1, stream.state(), samples_per_epoch=2 * 13)


def test_a_block_stays_as_large_as_it_was(caplog):
    """And the log says so."""
    (stream,) = start_run(1, 2)
    expected = run([stream], 0, 6)
    (stream,) = start_run(1, 2)
    run([stream], 0, 4)
    (resumed,) = start_run(1, 2, stream.state(), buffer_size=9)
    assert "A worker goes on to shuffle 5 images at a time, not 9." in caplog.text
    assert run([resumed], 4, 6) == expected[4:]
    with pytest.raises(ValueError, match="`buffer_size` must be at least 1, got 0"):
        build(Shards(6, ROWS), buffer_size=0)


def test_a_place_that_is_not_known_is_an_error():
    """Of a lane, only the next batch can be had."""
    (stream,) = start_run(1, 2)
    stream.read_batch(0)
    with pytest.raises(ValueError, match=r"Batch 2 of lane 0 is asked for, but .* where batch 0 begins"):
        stream.read_batch(4)


def test_uneven_split_is_said(caplog):
    start_run(2, 1, shards=5)
    assert (
        caplog.text.count("5 shards cannot be dealt evenly to 2 workers of all processes together: each reads 2") == 1
    )
    caplog.clear()
    start_run(2, 2, shards=8)
    assert not caplog.text


def test_fewer_images_than_workers_are_an_error():
    stream = build(Shards(1, ROWS), (0, 1, ROWS + 1))
    with pytest.raises(
        ImageError, match=f"A worker gets no image of the 1 shards, which are dealt to {ROWS + 1} workers"
    ):
        stream.read_batch(ROWS)


@pytest.mark.parametrize(("shards", "workers"), [(2048, 2), (1536, 1)])
def test_a_thousand_processes_read_every_image_once(shards, workers):
    """None of them twice, each as many, in shards of their own or shared ones."""
    world_size, numbers = 1024, []
    for rank in range(world_size):
        stream = build(Shards(shards, rows=4), (rank, world_size, workers), samples_per_epoch=shards * 4)
        batches = stream.batches // world_size
        assert batches == shards * 4 // 2 // world_size
        numbers += [number for batch in range(batches) for number, *_ in stream.read_batch(batch)[0]]
        assert len(stream.data.reads) <= shards // world_size + 2 * workers
    assert sorted(numbers) == list(range(shards * 4))


def test_a_process_of_a_thousand_starts_without_a_list_of_a_billion_images():
    """It opens one shard for each worker, reads a block of it, and needs as much memory as for a million images."""
    peaks = []
    for rows, rank in itertools.product((10, 10_000), (0, 1023)):
        data = Shards(100_000, rows)
        tracemalloc.start()
        stream = build(data, (rank, 1024, 8), samples_per_epoch=100_000 * rows)
        for batch in range(8):
            stream.read_batch(batch)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(data.reads) == 8 and sum(data.reads) == 8 * (5 + 2)
    assert max(peaks) < 1.05 * min(peaks) and max(peaks) < 3e6
    for lane in (0, 5000, 8191):  # as the guide says
        assert [part.modulus for part in deal_shards(100_000, 8192, lane)][:12] == [1] * 12
        assert len(deal_shards(100_000, 8192, lane)) in (13, 14) and len(deal_shards(98_304, 8192, lane)) == 12


@pytest.mark.slow
def test_resume_takes_the_same_time_after_many_images(tmp_path):
    """After 1,000 images as after 100,000 at the same place of a shard, of files of parquet."""
    for shard in range(170):
        numbers = list(range(600 * shard, 600 * (shard + 1)))
        content = {"image": [png(number % 256) for number in numbers], "number": numbers}
        datasets.Dataset.from_dict(content).to_parquet(tmp_path / f"{shard:03}.parquet")
    files = {"train": str(tmp_path / "*.parquet")}
    data = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)

    args = TrainingArguments(tmp_path, per_device_train_batch_size=10, use_cpu=True)

    def open_loader(state=None):
        stream = Numbers(data, 170 * 600, seed=0, buffer_size=250)
        if state:
            stream.restore(state, 10, 0)
        return stream, build_loader(stream, stream, lambda rows: {"rows": rows}, 10, args)

    (stream, loader), states = open_loader(), {}
    for number, batch in zip(range(10_000), loader, strict=False):
        stream.note(*batch["bookmark"])
        if number + 1 in (100, 10_000):
            states[number + 1] = stream.state()
    times = {seen: [] for seen in states}
    for _ in range(15):
        for seen, state in states.items():
            start = time.process_time()
            next(iter(skip_first_batches(open_loader(state)[1], seen)))  # as Trainer does
            times[seen].append(time.process_time() - start)
    early, late = (np.median(times[seen]) for seen in states)
    print(f"to the next batch after 1,000 images: {early:.4f} s, after 100,000: {late:.4f} s")
    assert late == pytest.approx(early, rel=0.2)
