import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Enough for small models: two threads that other tests keep from running wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
