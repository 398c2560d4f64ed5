import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network, and one that tries shall fail

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
