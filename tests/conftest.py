import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network, and one that tries shall fail

import pytest
import torch

# The workers of pytest-xdist share the cores.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
