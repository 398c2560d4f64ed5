import contextlib
import io

import pytest
import torch

from pvt_hf.conversion import verify
from pvt_hf.models.backbone import get_backbone_config
from tests.support.checkpoints import TINY, official_weights, run, save


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """With a checkpoint, `a.pth`, and what it was converted to, `saved`; what that printed is in `printed`."""
    folder, printed = tmp_path_factory.mktemp("converted"), io.StringIO()
    weights = {"state_dict": official_weights(TINY["v2"]), "epoch\x1b[2J\x07": torch.ones(1)}
    with contextlib.redirect_stdout(printed):
        assert run(save(weights, folder / "a.pth"), folder / "saved\x1b[31m") == 0
    (folder / "saved\x1b[31m").rename(folder / "saved")
    (folder / "printed").write_text(printed.getvalue())
    return folder


@pytest.fixture
def small_probes(monkeypatch):
    """What is converted is compared on smaller images than the released models were trained for, which take seconds
    (but where there are position embeddings, which are of that size).
    """
    probe_images = verify.probe_images

    def crop_images(config):
        side = 64 if get_backbone_config(config).model_type == "pvt_v2" else None
        first, oblong = probe_images(config)
        return [first[..., :side, :side], oblong]

    monkeypatch.setattr(verify, "probe_images", crop_images)


@pytest.fixture
def converted(shared_folder):
    """The same folder, which a test leaves as it was."""
    before = {path: path.is_dir() or path.read_bytes() for path in shared_folder.rglob("*")}
    yield shared_folder
    assert {path: path.is_dir() or path.read_bytes() for path in shared_folder.rglob("*")} == before
