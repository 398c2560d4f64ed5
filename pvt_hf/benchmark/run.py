"""Runs rows of the benchmark."""

import gc
import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..variants import build_config
from .counting import Work, count_work
from .dense import DetectorNetwork, HeadAlone, build_own, make_result_step
from .images import make_image_step, make_training_image_step
from .machine import Rates, measure_rates, name_machine, today
from .networks import RUNTIMES, STAGES, build_network, make_step, write_onnx
from .rows import Entrant, Row
from .table import Result
from .timing import Clock, Step, Times, measure, measure_peak

# What the libraries of entrants take beside what pvt_hf itself does.
PACKAGES = {
    "timm": ("timm",),
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}


@dataclass(frozen=True)
class Contestant:
    """An entrant that is ready.

    Attributes:
        entrant: Who.
        step: To be timed.
        forward: What is counted (default: nothing).
        has_peak: Whether its memory can be measured: other runtimes keep theirs.
    """

    entrant: Entrant
    step: Step
    forward: Callable[[], object] | None = None
    has_peak: bool = True


@dataclass(frozen=True)
class Bench:
    """How rows are measured.

    Attributes:
        clock: With the device.
        rounds: Of every row.
        build_config: From the name of a variant and fields to a configuration; tests have smaller ones.
        rates: The machine's, by precision, where they are known; the others are measured.
    """

    clock: Clock
    rounds: int = 7
    build_config: Callable[..., PreTrainedConfig] = build_config
    rates: Mapping[str, Rates] = field(default_factory=dict)

    def run_alone(self, row: Row, tell: Callable[[str], None] = lambda text: None) -> list[Result]:
        """Measures a row as [`run`] does, and on a CPU in a new process, as users have one: memory that other rows have
        left behind would be taken sooner than fresh memory, by those who need much of it.

        Args:
            row: What.
            tell: Is told what is being done (default: nobody is).

        Returns:
            Of each entrant.
        """
        if self.clock.device.type != "cpu":
            return self.run(row, tell)
        tell(f"{row.name}: {self.rounds} rounds")
        with _use_threads(row.threads) as threads:
            precisions = {entrant.precision for entrant in row.entrants}
            rates = {precision: measure_rates(precision, self.clock, threads) for precision in precisions}
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_run_with_threads, replace(self, rates=rates), row, threads).result()

    def run(self, row: Row, tell: Callable[[str], None] = lambda text: None) -> list[Result]:
        """Measures a row.

        Args:
            row: What.
            tell: Is told what is being done (default: nobody is).

        Returns:
            Of each entrant.
        """
        with _use_threads(row.threads) as threads, tempfile.TemporaryDirectory() as folder:
            contestants = []
            for entrant in row.entrants:
                tell(f"{row.name}: {entrant.describe()}")
                contestants.append(self.prepare(row, entrant, Path(folder)))
            works = [count_work(contestant.forward) if contestant.forward else None for contestant in contestants]
            tell(f"{row.name}: {self.rounds} rounds")
            times = measure([contestant.step for contestant in contestants], self.rounds, self.clock)
            peaks = [self._measure_peak(contestant) for contestant in contestants]
            results = [
                self._make_result(row, contestant, times, index, peaks[index], works[index] or works[0], threads)
                for index, contestant in enumerate(contestants)
            ]
        del contestants
        release(self.clock.device)
        return results

    def _measure_peak(self, contestant: Contestant) -> float:
        return measure_peak(contestant.step, self.clock.device) if contestant.has_peak else math.nan

    def prepare(self, row: Row, entrant: Entrant, folder: Path) -> Contestant:
        """Builds what an entrant of a row runs.

        Args:
            row: What is measured.
            entrant: One of its entrants.
            folder: For files that are gone afterwards.
        """
        device, (batch, size) = self.clock.device, (row.batch, row.size)
        model = entrant.model
        if model == "training images":
            return Contestant(entrant, make_training_image_step(row.variant, size, batch), has_peak=False)
        if model.endswith(("images", "files")):
            return Contestant(entrant, make_image_step(entrant.library, model, size))
        pixels = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
        if entrant.library in RUNTIMES:
            own = build_network("pvt_hf", model, self.build_config(row.variant))
            file = write_onnx(own, folder / "model.onnx")
            return Contestant(entrant, RUNTIMES[entrant.library](file, pixels, torch.get_num_threads()), has_peak=False)
        if model in ("classification", "backbone") or model.endswith((" network", " head")):
            with device:  # where random weights are drawn sooner
                network = self._build(row, entrant)
            has_peak = entrant.compiler != "reduce-overhead"  # the memory of a recording is held from then on
            return Contestant(entrant, *make_step(network, entrant, row, pixels), has_peak=has_peak)
        build_backbone = partial(self.build_config, row.variant)
        step, forward = make_result_step(entrant.library, model, build_backbone, size, self.clock)
        return Contestant(entrant, step, forward)

    def _build(self, row: Row, entrant: Entrant) -> nn.Module:
        architecture, _, part = entrant.model.partition(" ")
        if part:
            detector = build_own(architecture, partial(self.build_config, row.variant))
            return HeadAlone(detector) if part == "head" else DetectorNetwork(detector)
        fields = {"out_features": STAGES} if entrant.model == "backbone" else {}
        return build_network(entrant.library, entrant.model, self.build_config(row.variant, **fields))

    def _make_result(
        self,
        row: Row,
        contestant: Contestant,
        times: Sequence[Times],
        index: int,
        peak: float,
        work: Work | None,
        threads: int,
    ) -> Result:
        first, own = times[0].seconds, times[index].seconds
        speeds = [other / ours for ours, other in zip(first, own, strict=True)]
        median = statistics.median(own)
        parts = {name: statistics.median(values) / median for name, values in times[index].parts.items()}
        precision = contestant.entrant.precision
        rates = self.rates.get(precision) or measure_rates(precision, self.clock, threads)
        return Result(
            row=row.name,
            work=row.describe(),
            entrant=contestant.entrant.describe(None if index == 0 else row.entrants[0]),
            step=row.step,
            batch=row.batch,
            height=row.size[0],
            width=row.size[1],
            precision=precision,
            rounds=self.rounds,
            **_spread("seconds", own),
            **_spread("speed", speeds),
            peak_bytes=peak,
            multiply_adds=work.multiply_adds if work else math.nan,
            moved_bytes=work.bytes if work else math.nan,
            machine_flops=rates.flops,
            machine_bytes=rates.bytes,
            image_processor=parts.get("image processor", math.nan),
            backbone=parts.get("backbone", math.nan),
            neck=parts.get("neck", math.nan),
            head=parts.get("head", math.nan),
            post_processing=parts.get("post-processing", math.nan),
            machine=name_machine(self.clock.device),
            threads=threads,
            clock=self.clock.name,
            torch=torch.__version__,
            date=today(),
        )


def _run_with_threads(bench: Bench, row: Row, threads: int) -> list[Result]:
    torch.set_num_threads(threads)
    return bench.run(row)


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}_min": min(values), name: statistics.median(values), f"{name}_max": max(values)}


@contextmanager
def _use_threads(count: int | None) -> Iterator[int]:
    """While it lasts, torch computes with so many threads; gives their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def release(device: torch.device) -> None:
    """Gives back what models of a row took, compiled code too.

    Args:
        device: Of the models.
    """
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def list_packages(rows: Sequence[Row]) -> list[str]:
    """The packages that rows take beside those of pvt_hf itself.

    Args:
        rows: To be measured.
    """
    entrants = [entrant for row in rows for entrant in row.entrants]
    packages = [name for entrant in entrants for name in PACKAGES.get(entrant.library, ())]
    packages += ["timm"] * any(entrant.model == "training images" for entrant in entrants)
    return sorted(set(packages))
