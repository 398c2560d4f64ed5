"""Where images come from, how corrupt ones are told, and an order that does not depend on processes and workers."""

import io
import json
import random
import tarfile
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from PIL import Image
from torch.utils.data import DataLoader
from transformers import TrainingArguments

import pvt_hf
from pvt_hf.data.augmentation import build_training_transform
from pvt_hf.data.classification import (
    EvaluationImages,
    StreamedImages,
    TrainingImages,
    cache_stream,
    check_images_and_labels,
    collate,
    count_images,
    encode_names,
    find_labels,
    load_images,
    summarize_labels,
)
from pvt_hf.data.images import ImageError, decode
from pvt_hf.data.samplers import EpochSampler
from pvt_hf.recipes import ImageNetRecipe
from pvt_hf.training.streams import build_loader


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 24), (value, 2 * value % 256, 255 - value)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Twelve images in two classes, in each of two splits."""
    for split in ("train", "validation"):
        for index in range(12):
            path = tmp_path / "images" / split / ("cat", "dog")[index % 2] / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(index + 1))
    return tmp_path / "images"


def rows(count: int, start: int = 0) -> dict:
    values = range(start, start + count)
    return {"photo": [{"bytes": png(value), "path": f"{value}.png"} for value in values], "kind": list(values)}


@pytest.fixture
def shards(tmp_path):
    """Sixteen images in four parquet files, in columns of any name, and the same in four WebDataset shards."""
    for shard in range(4):
        features = datasets.Features({"photo": datasets.Image(), "kind": datasets.Value("int64")})
        data = datasets.Dataset.from_dict(rows(4, 4 * shard), features=features)
        data.to_parquet(tmp_path / f"{shard}.parquet")
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for value in range(4 * shard, 4 * shard + 4):
                for name, content in ((f"{value}.png", png(value)), (f"{value}.cls", str(value).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return tmp_path


def value_of(image: Image.Image) -> torch.Tensor:
    """A transform that shows which image it was."""
    return torch.tensor([image.getpixel((0, 0))[0], random.random(), np.random.rand(), torch.rand(1).item()])


def test_image_folders_are_loaded_by_split(folder):
    data = load_images(str(folder), "train")
    assert find_labels(data) == ("label", ["cat", "dog"]) and len(data) == 12
    assert decode(data[0]["image"], "x").size == (20, 24)
    assert len(load_images(str(folder), "validation")) == 12
    with pytest.raises(ImageError, match="Split 'test' of .* cannot be loaded"):
        load_images(str(folder), "test")
    with pytest.raises(ImageError, match="cannot be loaded"):
        load_images("no/such/dataset", "train")


def test_without_a_source_the_bundled_digits_are_loaded():
    train, validation = load_images(None, "train"), load_images(None, "validation")
    assert (len(train), len(validation)) == (1437, 360) and find_labels(train)[1] == list("0123456789")
    seen = {row["image"]["bytes"] for row in train} & {row["image"]["bytes"] for row in validation}
    assert len(seen) < 20  # a few digits are the same pixel by pixel


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("streaming", [False, True])
def test_shards_are_loaded_whatever_their_columns_are_called(shards, kind, streaming):
    data = load_images(f"{shards}/*.{kind}", "train", streaming=streaming)
    column = {"parquet": "kind", "tar": "cls"}[kind]
    assert sorted(int(row[column]) for row in data) == list(range(16))
    assert all(decode(row["image"], "x").getpixel((0, 0))[0] == int(row[column]) for row in data)
    if kind == "parquet" and not streaming:
        assert find_labels(data) == ("kind", [str(value) for value in range(16)])
        with pytest.raises(ValueError, match="`label_column` must be one of the columns .* got species"):
            find_labels(data, "species")
    elif streaming:
        with pytest.raises(ValueError, match="num_labels"):
            find_labels(data, column)
        assert count_images(data, "train") is None


def test_parquet_files_in_a_folder_are_a_data_set(shards, folder):
    """Parquet files in a folder are a data set of theirs, and not images."""
    (shards / "set").mkdir()
    for number in range(2):
        (shards / f"{number}.parquet").rename(shards / "set" / f"train-0000{number}.parquet")
    assert find_labels(load_images(str(shards / "set"), "train"))[1] == [str(value) for value in range(8)]


def test_cached_stream_has_the_same_rows(shards):
    """For evaluation: the same rows, with a length, and any of them again."""
    data = cache_stream(load_images(f"{shards}/*.tar", "train", streaming=True))
    assert len(data) == 16 and sorted(data["cls"]) == list(range(16))
    assert decode(data[3]["image"], "x").getpixel((0, 0))[0] == data[3]["cls"]


def test_labels_that_are_not_classes_are_an_error():
    """Words, and another number of classes than the names say, before any image is read."""
    images, words = (
        [{"bytes": png(1)}] * 2,
        datasets.Features({"image": datasets.Image(), "kind": datasets.Value("string")}),
    )
    data = datasets.Dataset.from_dict({"image": images, "kind": ["cat", "dog"]}, features=words)
    with pytest.raises(ValueError, match=r"`label_column` must hold class indices, but 'kind' holds .*string"):
        find_labels(data, "kind")
    with pytest.raises(ValueError, match=r"Found: \[\]"):
        find_labels(data)
    named = encode_names(data, "kind")
    assert find_labels(named) == ("kind", ["cat", "dog"]) and named["kind"][:] == [0, 1]
    assert encode_names(named, "kind") is named and encode_names(data, None) is data
    with pytest.raises(ValueError, match="`num_labels` is 3, but 'kind' names 2 classes"):
        find_labels(named, num_labels=3)


@pytest.mark.parametrize("label", [-1, 2, "dog", None])
def test_wrong_label_is_an_error_that_names_the_image(label):
    """The image is named."""
    data = [{"image": {"bytes": png(1), "path": "a.png"}, "label": label}]
    with pytest.raises(ImageError, match=rf"label of a\.png must be a class in \[0, 2\), got {label!r}"):
        TrainingImages(data, "label", 2, value_of)[0, 0, 0, 0]
    with pytest.raises(ImageError, match=rf"must be a class in \[0, 2\), got {label!r}"):
        EvaluationImages(data, "label", 2, pvt_hf.PvtImageProcessorPil())[0]


def test_two_columns_of_images_are_an_error(tmp_path):
    features = datasets.Features({"a": datasets.Image(), "b": datasets.Image()})
    datasets.Dataset.from_dict({"a": [png(1)], "b": [png(2)]}, features=features).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ImageError, match=r"must have one column of images, got \['a', 'b'\].*`--image_column`"):
        load_images(str(tmp_path / "x.parquet"), "train")
    for streaming in (False, True):
        data = load_images(str(tmp_path / "x.parquet"), "train", streaming=streaming, image_column="b")
        assert decode(next(iter(data))["image"], "x").getpixel((0, 0))[0] == 2
    with pytest.raises(ImageError, match=r"must have one column of images 'c', got \[\]"):
        load_images(str(tmp_path / "x.parquet"), "train", image_column="c")


def test_images_and_labels_are_checked_at_once(folder, caplog):
    """All of them, before any is trained on; truncated ones where they are to be left out."""
    data = load_images(str(folder), "train")
    assert check_images_and_labels(data, "label", 2, "the training set") == (data, [])
    assert summarize_labels(data, "label", ["cat", "dog", "emu"]) == (
        "12 images of 3 classes (0 to 6 of a class); none of ['emu']"
    )
    with pytest.raises(ImageError, match=r"6 of 12 labels of x \(column 'label'\) are not classes in \[0, 1\): {1: 6}"):
        check_images_and_labels(data, "label", 1, "x")
    (folder / "train" / "dog" / "03.png").write_bytes(b"no image")
    cut = folder / "train" / "cat" / "04.png"
    cut.write_bytes(cut.read_bytes()[:60])
    with pytest.raises(ImageError, match=r"(?s)1 of 12 images of the training set.*dog/03\.png cannot be read.*--skip"):
        check_images_and_labels(data, "label", 2, "the training set")
    kept, problems = check_images_and_labels(data, "label", 2, "the training set", skip_corrupt=True)
    assert len(kept) == 10 and len(problems) == 2 and "cat/04.png" in problems[0]
    assert "2 of 12 images of the training set cannot be used" in caplog.text
    (folder / "train" / "cat" / "00.png").unlink()
    with pytest.raises(ImageError, match=r"FileNotFoundError.*cat/00\.png"):
        check_images_and_labels(data, "label", 2, "the training set")


def test_labels_of_other_data_become_those_of_the_model():
    data = [{"image": {"bytes": png(1), "path": "a.png"}, "label": label} for label in (0, 1)]
    rows = EvaluationImages(data, "label", 2, pvt_hf.PvtImageProcessorPil(crop_size=32), places=[7, 3])
    assert [rows[index]["labels"] for index in (0, 1)] == [7, 3]


@pytest.mark.parametrize("content", [b"", b"no image", png(3)[:60]], ids=["empty", "text", "cut"])
def test_corrupt_image_is_skipped_or_an_error(folder, content):
    path = folder / "train" / "dog" / "03.png"
    path.write_bytes(content)
    data = load_images(str(folder), "train")
    sampler = EpochSampler(12, seed=0)
    loader = DataLoader(TrainingImages(data, "label", 16, value_of), 4, sampler=sampler, collate_fn=collate)
    with pytest.raises(ImageError, match=r"dog/03\.png cannot be read"):
        list(loader)
    skipping = TrainingImages(data, "label", 16, value_of, skip_corrupt=True)
    batches = list(DataLoader(skipping, 4, sampler=sampler, collate_fn=collate))
    assert sum(batch["skipped"] for batch in batches) == 1 and sum(len(batch["labels"]) for batch in batches) == 11
    assert not any(name.endswith("03.png") for batch in batches for name in batch["names"])
    with pytest.raises(ImageError, match="All 2 images of a batch are corrupt"):
        collate([None, None])
    processor = pvt_hf.PvtImageProcessorPil(crop_size=32)
    with pytest.raises(ImageError, match=r"dog/03\.png cannot be read"):
        collate(map(EvaluationImages(data, "label", 16, processor).__getitem__, range(12)))


@pytest.mark.parametrize("streaming", [False, True])
def test_augmentation_does_not_depend_on_workers(folder, streaming):
    """The real transform. For a stream, workers change the order, so it is compared with itself."""
    transform = build_training_transform(ImageNetRecipe(), 32)
    runs = []
    for workers in (1, 1) if streaming else (0, 2):
        if streaming:
            data = load_images(str(folder), "train", streaming=True)
            dataset, options = StreamedImages(data, "label", 16, transform, 12, seed=0, buffer_size=4), {}
        else:
            dataset = TrainingImages(load_images(str(folder), "train"), "label", 16, transform)
            options = {"sampler": EpochSampler(12, seed=0)}
        torch.manual_seed(len(runs))
        loader = DataLoader(dataset, 4, collate_fn=collate, num_workers=workers, **options)
        runs.append(torch.cat([batch["pixel_values"] for batch in loader]))
    assert runs[0].shape == (12, 3, 32, 32) and torch.equal(*runs)


@pytest.mark.process
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_stream_is_split_by_process_and_worker(shards, kind):
    def epoch(number: int, workers: int, world_size: int) -> list[list[int]]:
        shares = []
        for rank in range(world_size):
            data = load_images(f"{shards}/*.{kind}", "train", streaming=True)
            share = {"rank": rank, "world_size": world_size, "buffer_size": 8}
            dataset = StreamedImages(data, {"parquet": "kind", "tar": "cls"}[kind], 16, value_of, 16, seed=3, **share)
            dataset.set_epoch(number)
            assert len(dataset) == 16 // world_size
            loader = DataLoader(dataset, 2, collate_fn=lambda rows: rows, num_workers=workers)
            shares.append([int(row["labels"]) for batch in loader for row in batch])
        return shares

    for workers, world_size in ((0, 1), (2, 2)):
        first, again, second = (epoch(number, workers, world_size) for number in (0, 0, 1))
        assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(16))  # each image once
        assert first == again != second


def test_stream_has_as_many_batches_as_it_says(shards):
    """Also where neither workers nor batches divide it."""
    data = load_images(f"{shards}/*.parquet", "train", streaming=True)
    for workers in (0, 2, 3):
        dataset = StreamedImages(data, "kind", 16, value_of, 31, seed=0, buffer_size=4)
        dataset.batch_size = 4
        loader = DataLoader(dataset, 4, collate_fn=list, num_workers=workers, drop_last=True)
        assert [len(batch) for batch in loader] == [4] * len(loader) == [4] * 7


def test_short_stream_begins_again(shards):
    data = load_images(f"{shards}/*.parquet", "train", streaming=True)
    longer = StreamedImages(data, "kind", 16, value_of, 40, seed=0, buffer_size=4)
    counts = np.bincount([row["labels"] for row in longer])
    assert len(longer) == counts.sum() == 40 and counts.min() >= 2 and counts.max() <= 3


@pytest.mark.process
def test_workers_share_a_shard_where_there_are_fewer(shards, folder):
    """Of a file of parquet, and of a folder of images, which `datasets` streams as one shard."""
    alone = load_images(f"{shards}/0.parquet", "train", streaming=True)
    images = load_images(str(folder), "train", streaming=True)
    assert alone.num_shards == images.num_shards == 1
    for data, column, count in ((alone, "kind", 4), (images, "label", 12)):
        dataset = StreamedImages(data, column, 16, value_of, count, seed=0, buffer_size=4)
        rows = [row for batch in DataLoader(dataset, 2, collate_fn=list, num_workers=2) for row in batch]
        assert len({row["names"] for row in rows}) == count


@pytest.mark.process
@pytest.mark.parametrize(("kind", "workers"), [("tar", 2), ("parquet", 0), ("tar", 0)])
def test_resumed_stream_has_the_images_that_are_left(shards, kind, workers):
    """The same tensors, by loaders as `Trainer` has them: it leaves out the numbers of the batches that it has had."""
    column = {"parquet": "kind", "tar": "cls"}[kind]

    def load(state=None):
        data = load_images(f"{shards}/*.{kind}", "train", streaming=True)
        dataset = StreamedImages(data, column, 16, value_of, 16, seed=0, buffer_size=3)
        if state:
            dataset.restore(state, 2, workers)
        args = TrainingArguments(per_device_train_batch_size=2, dataloader_num_workers=workers, use_cpu=True)
        return dataset, build_loader(dataset, dataset, collate, 2, args)

    dataset, loader = load()
    whole, states = list(loader), []
    for batch in whole:
        dataset.note(*batch["bookmark"])
        states.append(json.loads(json.dumps(dataset.state())))
    assert sorted(label for batch in whole for label in batch["labels"]) == list(range(16))
    for seen in (1, 6):
        dataset, loader = load(states[seen - 1])
        dataset.augment = mock.Mock(wraps=dataset.augment)
        rest = list(skip_first_batches(loader, seen))
        assert dataset.augment.call_count == (0 if workers else 2 * (8 - seen))
        for batch, expected in zip(rest, whole[seen:], strict=True):
            assert torch.equal(batch["pixel_values"], expected["pixel_values"])
            assert torch.equal(batch["labels"], expected["labels"]) and batch["names"] == expected["names"]
            assert batch["bookmark"] == expected["bookmark"]


def test_unreadable_shard_is_an_error(shards):
    path = shards / "2.parquet"
    data = load_images(f"{shards}/*.parquet", "train", streaming=True)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ImageError, match="A shard of the stream cannot be read"):
        list(StreamedImages(data, "kind", 16, value_of, 16, seed=0, buffer_size=1))
