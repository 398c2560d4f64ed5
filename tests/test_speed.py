"""The speed and memory that the README states, measured beside the peers. `pytest -m slow tests/test_speed.py`."""

import pytest
import torch

from pvt_hf.benchmark.rows import OTHERS, PRESETS
from pvt_hf.benchmark.run import Bench
from pvt_hf.benchmark.timing import Clock

ROWS = {row.name: row for row in (*PRESETS["cpu"], *OTHERS)}
# How many times as fast as the peer, and how much of its memory at most.
WANTED = {
    ("v2", "transformers"): (1.0, 1.0),
    ("v2", "timm"): (1.0, 1.0),
    ("v2_training", "transformers"): (1.0, 1.1),
    ("v2_training", "timm"): (1.0, 1.1),
    ("v2_backbone", "transformers"): (2.5, 0.7),
    ("v2_backbone", "timm"): (1.5, 0.7),
    ("v2_backbone_training", "transformers"): (1.2, 0.7),
    ("v2_backbone_training", "timm"): (1.2, 0.7),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in WANTED))
def test_against_transformers_and_timm(name):
    first, *others = Bench(Clock(torch.device("cpu")), rounds=5).run(ROWS[name])
    assert len(others) >= 2
    for result in others:
        if (name, result.entrant) in WANTED:
            speed, memory = WANTED[name, result.entrant]
            assert result.speed >= speed * 0.95, result.entrant  # a noisy machine's 5 %
            assert first.peak_bytes / result.peak_bytes <= memory, result.entrant


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("step", ["inference", "training"])
def test_heads_of_one_stage_take_as_long_for_a_multiply_add(step):
    """As RetinaNet's, but for their group norms, which multiply nothing that is counted."""
    first, *others = Bench(Clock(torch.device("cpu"), cpu_time=True), rounds=5).run(ROWS[f"heads_{step}"])
    assert len(others) == 2
    for result in others:
        own, firsts = (entrant.seconds / entrant.multiply_adds for entrant in (result, first))
        assert own / firsts <= 1.1, result.entrant
