"""Measures speed and memory beside transformers, timm, torchvision, onnxruntime and OpenVINO, in turns.

    pvt-hf benchmark                                        # what docs/guides/performance.md shows
    pvt-hf benchmark --rows v2 v2_training --rounds 15
    pvt-hf benchmark --preset gpu --minutes 3               # bf16, batches, channels_last, compiled, ...
    pvt-hf benchmark --rows v2 --profile                    # the operators that take most of the time
    pvt-hf benchmark --plot benchmark/benchmark.csv         # the picture alone, from a CSV

Those who do a row's work take turns in every round, after a warm-up, in one process, on a CPU a new one for each row. A
speed above 1 says how many times as fast the first of them, pvt_hf, is as another: the median of the rounds and their
range. A peak memory below 1 says that it needs less over what is held before the step, on a CPU resident memory of the
process, on a GPU allocated memory. Training is forward, backward and gradients. In OUTPUT_DIR are benchmark.csv, which
grows row by row, and benchmark.png, for which matplotlib is needed.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from tqdm import tqdm

from ..benchmark.plots import draw_plots
from ..benchmark.profile import profile_step
from ..benchmark.rows import OTHERS, PRESETS, Row, choose_rows
from ..benchmark.run import Bench, list_packages, release
from ..benchmark.table import (
    HEADER,
    PARTS_HEADER,
    RATES_HEADER,
    Result,
    describe_machine,
    list_parts,
    list_rates,
    list_ratios,
    markdown_table,
    merge_results,
    read_results,
    write_results,
)
from ..benchmark.timing import Clock
from ..training.arguments import option
from ..writing.files import why_unwritable
from ..writing.text import escape_control
from .parser import parse_arguments

_ROWS = "; ".join(
    f"{name}: {', '.join(row.name for row in rows)}" for name, rows in {**PRESETS, "others": OTHERS}.items()
)


@dataclass
class BenchmarkArguments:
    """What is measured, and how."""

    preset: str = option("cpu", "the rows and the device (default: cpu)", choices=tuple(PRESETS))
    rows: list[str] | None = option(None, f"rows to measure, in their order (default: those of the preset). {_ROWS}")
    rounds: int = option(7, "rounds of every row (default: 7)")
    minutes: float | None = option(
        None, "begin no row that is likely to end later, and name those left out (default: no limit)"
    )
    device: str | None = option(None, "where models run: cpu, cuda, cuda:1 (default: cpu, of the preset gpu cuda)")
    threads: int | None = option(None, "threads of the CPU (default: torch's)")
    cpu_time: bool = option(False, "take the CPU's time for this process, where it has other work (default: false)")
    profile: bool = option(False, "show the operators that take most of the first one's time instead (default: false)")
    plot: str | None = option(None, "draw the picture of this CSV, and measure nothing (default: none)")
    output_dir: str = option("benchmark", "folder for benchmark.csv and benchmark.png (default: benchmark)")


def _read_device(options: BenchmarkArguments) -> torch.device:
    name = options.device or ("cuda" if options.preset == "gpu" else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SystemExit(f"--device must be cpu or cuda, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise SystemExit(f"--device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {name}: torch sees no GPU here; --device cpu runs the same rows on the CPU")
    return device


def _check(options: BenchmarkArguments) -> list[Row]:
    """The rows, if all options are such as can be; before any work is done."""
    for name in ("rounds", "minutes", "threads"):
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise SystemExit(f"--{name} must be a number above 0, got {value}")
    if reason := why_unwritable(Path(options.output_dir) / "benchmark.csv"):
        raise SystemExit(f"--output_dir {options.output_dir}: {reason}")
    try:
        rows = choose_rows(options.preset, options.rows)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    for package in list_packages(rows):
        import_module(package)  # `pvt-hf` says which extra has one that is missing
    return rows


def _measure(rows: Sequence[Row], bench: Bench, minutes: float | None, file: Path) -> bool:
    """Measures row by row, and shows and writes what there is so far. Returns whether no row failed."""
    results = _read(file) if file.exists() else []
    start, longest, shown = time.monotonic(), 0.0, False
    late: list[str] = []
    failed: list[str] = []
    with tqdm(rows, desc="benchmark", unit="row", dynamic_ncols=True) as progress:
        for row in progress:
            begin = time.monotonic()
            if minutes is not None and begin - start + longest > 60 * minutes:
                late.append(row.name)
                continue
            try:
                found = bench.run_alone(row, progress.set_postfix_str)
            except Exception as error:  # of a peer's, or of the memory: the others can be measured
                failed.append(f"{row.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                release(bench.clock.device)
                continue
            longest = max(longest, time.monotonic() - begin)
            results = merge_results(results, found)
            write_results(results, file)
            _show(found, progress.write, bench, first=not shown)
            shown = True
    if late:
        print(f"not measured, since it would take more than --minutes {minutes:g}: --rows {' '.join(late)}")
    for line in failed:
        print(f"failed: {escape_control(line)}", file=sys.stderr)
    return not failed


def _read(file: Path) -> list[Result]:
    try:
        return read_results(file)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


def _show(found: Sequence[Result], write: Callable[[str], None], bench: Bench, first: bool) -> None:
    """The lines of a row, below a header for the first one."""
    on_gpu = bench.clock.device.type == "cuda"
    header, cells = (RATES_HEADER, list_rates(found)) if on_gpu else (HEADER, list_ratios(found))
    lines = markdown_table(header, cells).splitlines()
    if first:
        write(f"{describe_machine(found[0])}\n")
    write("\n".join(lines if first else lines[2:]))
    for work, *shares in list_parts(found):
        parts = (f"{name} {share}" for name, share in zip(PARTS_HEADER[1:], shares, strict=True))
        write(f"  {work}: {', '.join(parts)} of the time")


def _draw(results: Sequence[Result], file: Path) -> None:
    """Draws the picture, if there is matplotlib, and anything to draw."""
    try:
        drawn = draw_plots(results, file)
    except ModuleNotFoundError:
        csv = file.with_suffix(".csv")
        print(f"{file} is not drawn, since matplotlib is missing here; where it is: pvt-hf benchmark --plot {csv}")
        return
    print(f"{file}: speed and memory by size and batch" if drawn else "no picture: there are no rows size_ or batch_")


def _profile(rows: Sequence[Row], bench: Bench, folder: Path) -> None:
    for row in rows:
        contestant = bench.prepare(row, row.entrants[0], folder)
        print(f"{row.describe()}\n{profile_step(contestant.step, bench.clock.device)}")
        del contestant
        release(bench.clock.device)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Returns:
        Its exit code: 0; 1 if a row failed.
    """
    (options,) = parse_arguments((BenchmarkArguments,), argv, "pvt-hf benchmark", __doc__, {})
    if options.plot is not None:
        file = Path(options.plot)
        if not draw_plots(_read(file), file.with_suffix(".png")):
            raise SystemExit(f"--plot {file}: there is nothing to draw, none of its rows begins with size_ or batch_")
        return 0
    rows, device = _check(options), _read_device(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(Clock(device, options.cpu_time), options.rounds)
    folder = Path(options.output_dir)
    if options.profile:
        _profile(rows, bench, folder)
        return 0
    file = folder / "benchmark.csv"
    complete = _measure(rows, bench, options.minutes, file)
    if file.exists():
        results = _read(file)
        print(f"{file}: {len(results)} results")
        _draw(results, file.with_suffix(".png"))
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
