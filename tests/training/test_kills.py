"""Runs of all tasks, in one process and in two, that get signals at random moments until they are finished."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support import kills
from tests.support.processes import run_module
from tests.support.small_models import assert_close

pytestmark = [pytest.mark.process, pytest.mark.slow]
KILLS = 6  # in each of six places


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_runs_that_are_ended_at_random_moments_are_those_that_are_not(task, processes, tmp_path):
    done = json.loads(run_module("tests.support.kills", task, tmp_path, processes, KILLS, 0).splitlines()[-1])
    assert done["kills"] >= KILLS
    whole = kills.read(tmp_path / "whole")
    weights = load_file(whole["weights"])
    for run in range(1, done["runs"] + 1):
        found = kills.read(tmp_path / f"run-{run}")
        ended = load_file(found["weights"])
        if processes == 1:
            assert found["log"] == whole["log"]
            assert all(torch.equal(value, ended[name]) for name, value in weights.items())
        else:
            losses = ([entry["loss"] for entry in log if "loss" in entry] for log in (found["log"], whole["log"]))
            assert next(losses) == pytest.approx(next(losses), rel=1e-4)
            assert_close(ended, weights)
