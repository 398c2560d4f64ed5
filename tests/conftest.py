import gc
import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network, and one that tries shall fail

import subprocess

import huggingface_hub
import pytest
import torch
from transformers.utils import hub as transformers_hub

from tests.support.forks import run_fork
from tests.support.hub import TOKEN, LocalHub
from tests.support.small_models import ROOT

# Enough for small models, and as in the processes that results are compared with. Threads that other tests keep from
# running wait for each other most of the time.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before the choice by markers
def pytest_collection_modifyitems(config, items):
    for item in items:
        if "python" in item.fixturenames:
            item.add_marker(pytest.mark.process)
        if "slow" in item.keywords and "timeout" not in item.keywords:
            item.add_marker(pytest.mark.timeout(1800))  # compilers take minutes, and longer where others work too
    for marker in ("slow", "gpu"):
        if marker not in config.option.markexpr:  # whatever else is asked for
            # (Names of folders are keywords too.)
            config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker(marker)])
            items[:] = [item for item in items if not item.get_closest_marker(marker)]
    # What takes longest comes first, so that no worker is left alone with it in the end.
    items.sort(key=lambda item: "timeout" not in item.keywords)


def pytest_collection_finish():
    gc.freeze()  # what the imports made is no garbage, and each `Trainer.train` would look through it


@pytest.fixture(autouse=True)
def seed():
    # `torch.manual_seed` keeps a list of what to do when a GPU is used first: a millisecond and more for each test.
    torch.default_generator.manual_seed(0)


@pytest.fixture
def device(monkeypatch):
    """Where the tests marked `gpu` compute: on a GPU, without its shortened products of matrices. To try the tests out
    without one, set PVT_HF_TEST_DEVICE=cpu."""
    device = torch.device(os.environ.get("PVT_HF_TEST_DEVICE", "cuda"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("there is no GPU")
        torch.cuda.manual_seed_all(0)
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return device


@pytest.fixture
def logged_errors():
    """What transformers logs as an error, such as a class that a pipeline does not know, which it runs nevertheless."""
    records, handler = [], logging.Handler(logging.ERROR)
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    yield records
    logging.getLogger("transformers").removeHandler(handler)


@pytest.fixture
def hub():
    with LocalHub() as hub:
        yield hub


@pytest.fixture
def online(hub, tmp_path, monkeypatch):
    """Makes the local Hub the Hub of this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "home"),
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)  # which remembers the address
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)  # between attempts
    return hub


@pytest.fixture
def python(hub, tmp_path):
    """Runs Python in a process of its own (see `forks`), for which the local Hub is the Hub."""

    def run(*arguments, **variables) -> subprocess.CompletedProcess:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": TOKEN,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",  # as here, see above
        }
        return run_fork([*map(str, arguments)], environment | variables, tmp_path)

    return run
