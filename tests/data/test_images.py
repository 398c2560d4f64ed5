"""Images as they are stored, and the random state in which they are augmented."""

import random

import numpy as np
import torch

from pvt_hf.data.images import seed_random_state


def test_seeding_leaves_no_trace():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    draws = []
    for seed in (1, 1, 2):
        with seed_random_state(seed, 7):
            draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1] and len(set(draws[0]) | set(draws[2])) == 6
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())
