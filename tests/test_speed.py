"""The speed and memory that the README states, measured beside the peers. `pytest -m slow tests/test_speed.py`."""

import os
import subprocess
import sys

import pytest

from tests.support.small_models import ROOT


def read_rows(variant: str, *arguments: str) -> list[list[str]]:
    """The cells of the table that the benchmark prints."""
    command = [sys.executable, "examples/benchmark.py", "--variants", variant, "--device", "cpu", "--repeats", "5"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if variant in line]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_against_transformers_and_timm():
    rows = read_rows("pvt_v2_b2")
    assert len(rows) == 8
    for _, task, step, peer, speed, memory, _ in rows:
        wanted = 1.0
        if "backbone" in task:
            wanted = {"transformers": 2.5, "timm": 1.5}[peer] if step == "inference" else 1.2
            assert float(memory) <= 0.7, (task, step, peer)
        assert float(speed) >= wanted * 0.95, (task, step, peer)  # a noisy machine's 5 %


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_heads_of_one_stage_take_as_long_for_a_multiply_add():
    """As RetinaNet's, but for their group norms, which multiply nothing that is counted."""
    rows = read_rows("pvt_v2_b0", "--detectors", "retinanet", "atss", "gfl", "--cpu_time")
    heads = {(name.split()[0], step): float(rate) for _, name, step, *_, rate in rows if "head" in name}
    assert len(heads) == 6
    for (name, step), rate in heads.items():
        assert rate <= 1.1, (name, step)
