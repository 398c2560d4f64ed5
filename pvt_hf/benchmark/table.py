"""The results of the benchmark: as CSV, and as tables for a terminal and for the site."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ..writing.files import atomic_file


@dataclass(frozen=True)
class Result:
    """What one entrant of a row did. Numbers that were not measured are NaN.

    Attributes:
        row: Its name.
        work: Of the row, in words.
        entrant: Who did it and how, in words.
        step: `inference`, `training` or `image processing`.
        batch: Number of images of a step.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        precision: `fp32`, `tf32`, `bf16` or `fp16`.
        rounds: How many were timed.
        seconds_min: Of a step, in the fastest round.
        seconds: Of a step, the median.
        seconds_max: Of a step, in the slowest round.
        speed_min: The first entrant's speed over this one's in the same round, by image: the least.
        speed: The median of these ratios.
        speed_max: The largest of these ratios.
        peak_bytes: That a step takes at its peak.
        multiply_adds: Of the forward pass of a step.
        moved_bytes: That matrix products and convolutions read and write in the forward pass at least.
        machine_flops: Twice the multiply-adds that matrix products of this precision reach, in a second.
        machine_bytes: Read and written by copies within the memory, in a second.
        image_processor: Its share of a step.
        backbone: Its share of a step.
        neck: Its share of a step.
        head: Its share of a step.
        post_processing: Its share of a step.
        machine: The processor that computes.
        threads: Of the CPU.
        clock: `wall time`, `CPU time` or `CUDA events`.
        torch: Its version.
        date: Of the measurement.
    """

    row: str
    work: str
    entrant: str
    step: str
    batch: int
    height: int
    width: int
    precision: str
    rounds: int
    seconds_min: float
    seconds: float
    seconds_max: float
    speed_min: float
    speed: float
    speed_max: float
    peak_bytes: float
    multiply_adds: float
    moved_bytes: float
    machine_flops: float
    machine_bytes: float
    image_processor: float
    backbone: float
    neck: float
    head: float
    post_processing: float
    machine: str
    threads: int
    clock: str
    torch: str
    date: str

    @property
    def images(self) -> float:
        """In a second."""
        return self.batch / self.seconds

    @property
    def flops(self) -> float:
        """Floating-point operations of the model in a second: two for each multiply-add, and thrice as many in
        training, as is usual."""
        return 2 * self.multiply_adds * self._passes / self.seconds

    @property
    def utilization(self) -> float:
        """Share of what large matrix products reach on the same machine."""
        return self.flops / self.machine_flops

    @property
    def floor(self) -> float:
        """Share of the time that the memory takes at least to move what products and convolutions read and write."""
        return self.moved_bytes * self._passes / self.machine_bytes / self.seconds

    @property
    def _passes(self) -> int:
        return 3 if self.step == "training" else 1


def merge_results(former: Sequence[Result], found: Sequence[Result]) -> list[Result]:
    """Results with those of rows that were measured anew in the place of the former ones.

    Args:
        former: Of some rows.
        found: Of some rows.
    """
    rows: dict[str, list[Result]] = {}
    for results in (former, found):
        rows |= {result.row: [] for result in results}
        for result in results:
            rows[result.row].append(result)
    return [result for results in rows.values() for result in results]


def write_results(results: Iterable[Result], file: Path) -> None:
    """Writes a CSV, which appears complete.

    Args:
        results: Of any rows.
        file: To be written.
    """
    names = [field.name for field in fields(Result)]
    with atomic_file(file) as path, path.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(names)
        for result in results:
            writer.writerow([_write_value(getattr(result, name)) for name in names])


def _write_value(value: str | float) -> str | int:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


_LATER = ("backbone", "neck", "head")  # which files that were written before do not have


def read_results(file: Path) -> list[Result]:
    """Reads what [`write_results`] wrote.

    Args:
        file: A CSV.

    Raises:
        ValueError: If it is not one of these; the message names it.
    """
    kinds = {field.name: field.type for field in fields(Result)}
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            reader = csv.DictReader(opened, strict=True)
            if reader.fieldnames not in (list(kinds), [name for name in kinds if name not in _LATER]):
                raise ValueError(f"its first line must be {','.join(kinds)}")
            rows = [dict.fromkeys(_LATER, "") | row for row in reader]
            return [Result(**{name: _read_value(row[name], kinds[name]) for name in kinds}) for row in rows]  # type: ignore[arg-type]
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{file} is no CSV of `pvt-hf benchmark`: {error}") from error


def _read_value(text: str, kind: object) -> str | float:
    if kind is str:
        return text
    return int(text) if kind is int else float(text or "nan")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of Markdown.

    Args:
        header: Of its columns.
        rows: Cells.
    """
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "--|" * len(header), *lines[1:], ""])


HEADER = ("work", "beside", "speed", "for each multiply-add", "peak memory", "the first does")
PARTS_HEADER = ("from image to result", "image processor", "backbone", "neck", "head", "post-processing")
RATES_HEADER = ("work", "who", "images/s", "TFLOP/s", "of products", "memory floor", "peak")


def list_ratios(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The cells of `HEADER` for the entrants of rows, each beside the first of its row: how many times as fast that
    one is (median, least and most of the rounds), the same by multiply-adds where they do not do as many, how many
    times its memory it takes, and what it does.

    Args:
        results: Row by row, the first entrant first.
    """
    firsts: dict[str, Result] = {}
    cells: list[tuple[str, ...]] = []
    for result in results:
        first = firsts.setdefault(result.row, result)
        if result is not first:
            speed = f"**{result.speed:.2f}** ({result.speed_min:.2f} to {result.speed_max:.2f})"
            memory = _write_number(first.peak_bytes / result.peak_bytes, "{:.2f}")
            more = first.multiply_adds / result.multiply_adds  # in the time of a step
            each = f"{result.speed * more:.2f}" if abs(more - 1) > 0.02 else ""
            cells.append((first.work, result.entrant, speed, each, memory, describe_first(first)))
        elif sum(other.row == first.row for other in results) == 1:
            cells.append((first.work, "", "", "", "", describe_first(first)))
    return cells


def describe_first(result: Result) -> str:
    """What an entrant does, in a cell.

    Args:
        result: Of it.
    """
    rate = f"{result.images:.3g} images/s"
    work = _write_number(result.flops / 1e9, "{:.0f} GFLOP/s")
    peak = _write_number(result.peak_bytes / 2**20, "{:.0f} MiB")
    return ", ".join(filter(None, (rate, work, peak)))


def list_rates(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The cells of `RATES_HEADER`: what every entrant does, as shares of what the machine can do at most.

    Args:
        results: Of any rows.
    """
    return [
        (
            result.work,
            result.entrant,
            f"{result.images:.4g}",
            _write_number(result.flops / 1e12, "{:.3g}"),
            _write_number(100 * result.utilization, "{:.0f} %"),
            _write_number(100 * result.floor, "{:.0f} %"),
            _write_number(result.peak_bytes / 2**20, "{:.0f} MiB"),
        )
        for result in results
    ]


def list_parts(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Where the time goes in rows from image to result: the cells of `PARTS_HEADER`.

    Args:
        results: Of any rows.
    """
    shares = [field.replace("-", "_").replace(" ", "_") for field in PARTS_HEADER[1:]]
    return [
        (result.work, *(_write_number(100 * getattr(result, share), "{:.1f} %") for share in shares))
        for result in results
        if not math.isnan(result.post_processing)
    ]


def _write_number(value: float, form: str) -> str:
    return "" if math.isnan(value) else form.format(value)


def describe_machine(result: Result) -> str:
    """On what a row was measured, in a line.

    Args:
        result: Of any entrant.
    """
    threads = f"{result.threads} thread{'s' * (result.threads > 1)}"
    return (
        f"{result.machine}, {threads}, torch {result.torch}, {result.clock}; its products of {result.precision} reach "
        f"{result.machine_flops / 1e9:.0f} GFLOP/s, copies {result.machine_bytes / 1e9:.0f} GB/s ({result.date})"
    )
