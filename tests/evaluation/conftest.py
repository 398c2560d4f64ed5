import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Enough for small models, and as in the processes that results are compared with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
