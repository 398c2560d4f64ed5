"""Which images each process gets: together those of one process, each once, in the order of timm and mmdetection."""

import tracemalloc

import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler

from pvt_hf.data.samplers import AspectRatioSampler, EpochSampler


@pytest.mark.parametrize("repeats", [1, 3])
def test_processes_share_a_larger_batch(repeats):
    """The n-th batches of two processes are the n-th of one with twice the size: images, augmentation seeds and all."""
    one = EpochSampler(300, seed=5, repeats=repeats)
    two = [EpochSampler(300, seed=5, rank=rank, world_size=2, repeats=repeats) for rank in (0, 1)]
    for epoch in (0, 1):
        for sampler in (one, *two):
            sampler.set_epoch(epoch)
        whole, parts = list(one), [list(sampler) for sampler in two]
        assert len(one) == len(whole) and len(two[0]) == len(parts[0]) == len(parts[1]) == len(whole) // 2
        for start in range(0, len(parts[0]) - 4, 4):
            assert {*parts[0][start : start + 4], *parts[1][start : start + 4]} == {*whole[2 * start : 2 * start + 8]}
        if repeats == 1:
            assert sorted(index for index, *_ in whole) == list(range(300))
    orders = [index for index, *_ in one], [index for index, *_ in EpochSampler(300, seed=5, repeats=repeats)]
    assert orders[0] != orders[1]  # epoch 1 and epoch 0


SPLITS = [
    (processes, batch, 16 // (processes * batch))
    for processes in (1, 2, 4, 8)
    for batch in (1, 2, 4, 8, 16)
    if processes * batch <= 16
]


@pytest.mark.parametrize("length", [16, 67, 300])
@pytest.mark.parametrize("kind", ["plain", "repeated", "grouped"])
def test_the_images_of_a_step_do_not_depend_on_how_they_are_split(kind, length):
    """Processes, images of a batch and accumulated batches: in every step of 16 images the same ones, augmented
    alike, and as many steps in an epoch."""

    def list_steps(processes, batch, accumulated):
        steps = {}
        for rank in range(processes):
            if kind == "grouped":
                sizes = [(3, 4) if index % 3 else (4, 3) for index in range(length)]
                sampler = AspectRatioSampler(sizes, batch, 5, rank, processes, 16, group_size=4)
            else:
                sampler = EpochSampler(length, 5, rank, processes, 3 if kind == "repeated" else 1, 16)
            sampler.set_epoch(2)
            keys, share = list(sampler), batch * accumulated
            assert len(keys) == len(sampler) and len(keys) % share == 0
            for first in range(0, len(keys), share):
                steps.setdefault(first // share, []).extend(keys[first : first + share])
        return [sorted(keys) for keys in steps.values()]

    expected = list_steps(1, 16, 1)
    assert [len(keys) for keys in expected] == [16] * len(expected) and len({*sum(expected, [])}) == 16 * len(expected)
    high = -(-length // 3)
    groups = -(-(length - high) // 4) + -(-high // 4)  # of 4 images
    steps = {"plain": length // 16, "repeated": min(length, 256) // 16, "grouped": -(-groups // 4)}
    assert len(expected) == steps[kind]
    assert all(list_steps(*split) == expected for split in SPLITS)


def test_order_is_that_of_a_plain_shuffle():
    order = torch.randperm(70_001, generator=torch.Generator().manual_seed(5 + 2)).tolist()
    for rank in (0, 2):
        sampler = EpochSampler(70_001, seed=5, rank=rank, world_size=3)
        sampler.set_epoch(2)
        assert [index for index, *_ in sampler] == order[rank : 70_001 // 3 * 3 : 3]


def test_a_thousand_processes_share_an_epoch():
    """Each image once, but for those that are no image for each process."""
    length, world_size = 1024 * 9 + 5, 1024
    shares = [list(EpochSampler(length, seed=1, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert {len(share) for share in shares} == {9}
    together = [index for share in shares for index, *_ in share]
    assert len(set(together)) == len(together) == 9 * world_size and max(together) < length
    assert sorted(position for share in shares for *_, position in share) == list(range(9 * world_size))


def test_a_sampler_has_no_list_of_all_images():
    """Python's objects of a sampler are the same for two million images as for two hundred thousand."""
    peaks = []
    for length in (2 * 10**5, 2 * 10**6):
        tracemalloc.start()
        next(iter(EpochSampler(length, seed=0)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_repeated_augmentation_is_timms():
    ours, timms = EpochSampler(1000, seed=0, rank=1, world_size=2, repeats=3), RepeatAugSampler(range(1000), 2, 1)
    ours.set_epoch(4)
    timms.set_epoch(4)
    keys = list(ours)
    assert [index for index, *_ in keys] == list(timms)
    assert len(set(keys)) == len(keys) == len(timms)  # every repetition has an augmentation of its own


def test_batches_are_grouped_by_aspect_ratio():
    sizes = [(3, 4)] * 23 + [(4, 3)] * 9 + [(3, 3)] * 5

    def batches_of(sampler: AspectRatioSampler) -> list[list[tuple]]:
        keys = list(sampler)
        assert len(keys) == len(sampler)
        return [keys[first : first + 4] for first in range(0, len(keys), 4)]

    sampler = AspectRatioSampler(sizes, 4, seed=2)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        batches = batches_of(sampler)
        assert len(batches) == 6 + 4
        wide = [{sizes[index][1] > sizes[index][0] for index, *_ in batch} for batch in batches]
        assert all(len(kinds) == 1 for kinds in wide) and wide != sorted(wide, key=str)
        assert {index for batch in batches for index, *_ in batch} == set(range(37))
        assert [position for batch in batches for *_, position in batch] == list(range(40))
        epochs.append(batches)
    assert epochs[0] != epochs[1]
    shares = [batches_of(AspectRatioSampler(sizes, 4, seed=2, rank=rank, world_size=3)) for rank in range(3)]
    assert [len(share) for share in shares] == [4] * 3
    assert [shares[number % 3][number // 3] for number in range(10)] == epochs[0]  # dealt in turn
    assert len(batches_of(AspectRatioSampler([(1, 2)], 4, seed=0, rank=3, world_size=4))) == 1


@pytest.mark.parametrize(("length", "world_size"), [(5, 2), (4, 2), (1, 3), (2, 7), (7, 4), (3, 1)])
def test_evaluation_sees_every_image_once(length, world_size):
    """What the evaluations rely on: shares of one length, dealt in turn; what comes again is behind the end."""
    shares = [list(DistributedSampler(range(length), world_size, rank, shuffle=False)) for rank in range(world_size)]
    assert {len(share) for share in shares} == {-(-length // world_size)}
    together = [index for step in zip(*shares, strict=True) for index in step]
    assert together == [position % length for position in range(len(together))]
