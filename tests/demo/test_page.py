"""What is behind the page: what each panel shows, what is refused, and which files nobody can read."""

import json
import os
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

gradio = pytest.importorskip("gradio", reason="the extra demo is not installed")

from gradio.route_utils import delete_files_created_by_app  # noqa: E402

from pvt_hf.demo import page as demo_page  # noqa: E402 (where there is no gradio, there is no page)
from pvt_hf.demo.examples import write_examples  # noqa: E402
from pvt_hf.demo.grad_cam import explain as explain_class  # noqa: E402
from pvt_hf.demo.page import Looker, Panel, distinguish, move_threshold, serve, show, take_file  # noqa: E402
from pvt_hf.prediction.loading import load_predictor  # noqa: E402
from pvt_hf.prediction.predictions import Detections  # noqa: E402


@pytest.fixture(scope="module")
def looker(models):
    """With the threshold that the page runs detectors with."""
    return Looker({folder.name: load_predictor(str(folder), "cpu", threshold=0.05) for folder in models.iterdir()})


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def parts(updates) -> dict[str, dict]:
    return dict(zip(Panel._fields[1:], updates, strict=True))


def visible(updates) -> set[str]:
    return {part for part, update in parts(updates).items() if update.get("visible")}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v1", {"classes", "label"}),
        ("v2", {"classes", "label"}),
        ("retinanet", {"message", "picture"}),
        ("mask_rcnn", {"message", "picture"}),
        ("semantic_fpn", {"picture", "legend"}),
    ],
)
def test_a_panel_shows_what_the_model_finds_and_nothing_else(looker, photo, name, expected):
    assert visible(show(looker, name, photo, 0.3)) == expected
    assert visible(show(looker, name, None, 0.3)) == set()


def test_classes_are_those_of_the_predictor(looker, photo):
    shown = parts(show(looker, "v2", photo, 0.3))
    (prediction,) = looker.predictors["v2"]([Image.open(photo)])
    expected = dict(zip(("cat (0)", "cat (1)", "<i>"), prediction.scores.tolist(), strict=True))
    assert shown["classes"]["value"] == pytest.approx(expected)
    best = max(expected, key=expected.get)
    assert shown["label"]["choices"][0] == (best, list(expected).index(best))  # the best class comes first


def test_classes_of_one_name_are_told_apart():
    assert distinguish(["crane", "dog", "crane"]) == ["crane (0)", "dog", "crane (2)"]


def test_the_threshold_moves_without_another_prediction(looker, photo, monkeypatch):
    asked = []
    monkeypatch.setattr(type(looker.predictors["retinanet"]), "__call__", lambda *args: asked.append(args))
    names = ("cat", "dog", "bird")
    found = Detections(names, torch.tensor([0.9, 0.2]), torch.tensor([0, 1]), torch.tensor([[1.0, 1, 9, 9]] * 2), 0.05)
    looker = Looker(looker.predictors)
    looker._predict = lambda name, path: (Image.open(photo).convert("RGB"), found)
    messages = [
        parts(move_threshold(looker, "retinanet", photo, threshold))["message"]["value"]
        for threshold in (0.1, 0.5, 0.95)
    ]
    assert messages == ["1 cat, 1 dog", "1 cat", "nothing above 0.95 (best: cat 0.90)"] and not asked


@pytest.mark.parametrize("name", ["v2", "semantic_fpn"])
def test_the_threshold_leaves_other_panels_as_they_are(looker, photo, name):
    assert all(set(update) == {"__type__"} for update in move_threshold(looker, name, photo, 0.5))


def test_an_image_is_predicted_once(looker, photo):
    looker = Looker(looker.predictors)
    assert looker.predict("semantic_fpn", photo)[1] is looker.predict("semantic_fpn", photo)[1]


def test_large_images_are_shrunk(looker, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_page, "_LONGEST_SIDE", 60)
    Image.new("RGB", (90, 120)).save(tmp_path / "large.png")
    image, prediction = Looker(looker.predictors).predict("semantic_fpn", str(tmp_path / "large.png"))
    assert image.size == (45, 60) and prediction.labels.shape == (60, 45)


def test_names_of_classes_are_text(looker, photo):
    (prediction,) = looker.predictors["semantic_fpn"]([Image.open(photo)])
    legend = demo_page.write_legend(prediction)
    assert "<i>" not in legend.replace("<i style", "") and legend.count('<div class="class">') == len(
        prediction.list_shares()
    )


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_evidence_is_for_the_class_that_is_chosen(looker, photo, name):
    predictor = looker.predictors[name]
    pixels = torch.randn(1, 3, 96, 64)
    first, second = (explain_class(predictor.model, pixels, label) for label in (0, 1))
    assert first.shape == (96, 64) and first.min() >= 0 and first.max() <= 1
    assert not np.allclose(first, second)
    shown = demo_page.explain(looker, name, photo, 1)
    assert shown["visible"] and shown["value"].size == (64, 64)
    assert not demo_page.explain(looker, name, photo, None)["visible"]


@pytest.mark.parametrize(("version", "side"), [("v1", 65), ("v2", 65), ("v2", 90)])
def test_evidence_for_sizes_that_are_no_multiples_of_32(looker, version, side):
    assert explain_class(looker.predictors[version].model, torch.randn(1, 3, side, 96), 0).shape == (side, 96)


def test_a_bad_file_is_a_message_without_paths(tmp_path):
    bad = tmp_path / "bad_*.png"
    bad.write_bytes(b"no image")
    path, message = take_file({"path": str(bad)})
    assert path is None and message["visible"] and str(tmp_path) not in message["value"]
    assert r"bad_\*.png cannot be read" in message["value"].replace(r"bad\_", "bad_")
    assert take_file(None) == (None, gradio.update(value=None, visible=False))


def test_a_truncated_image_is_a_message(photo, tmp_path):
    (tmp_path / "cut.png").write_bytes(Path(photo).read_bytes()[:2000])
    path, message = take_file({"path": str(tmp_path / "cut.png")})
    assert path is None and "cut.png cannot be read" in message["value"]


def test_examples_are_digits_for_models_of_digits(looker, tmp_path):
    predictor = looker.predictors["v2"]
    names = {path.name for path in write_examples([predictor], tmp_path)}
    assert {"lion.jpg", "china.jpg"} <= names and not any("digit" in name for name in names)
    former, predictor.model.config.id2label = predictor.model.config.id2label, {n: str(n) for n in range(10)}
    try:
        files = write_examples([predictor], tmp_path)
    finally:
        predictor.model.config.id2label = former
    assert [path.name for path in files] == [f"digit-{digit}.png" for digit in range(6)]
    assert Image.open(files[0]).size == (8, 8)


def request(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def upload(page, name: str, content: bytes) -> tuple[int, bytes]:
    body = (
        (
            f'--limit\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
            "Content-Type: image/png\r\n\r\n"
        ).encode()
        + content
        + b"\r\n--limit--\r\n"
    )
    kind = {"Content-Type": "multipart/form-data; boundary=limit"}
    return request(f"{page.local_url}gradio_api/upload", body, **kind)


@pytest.fixture(scope="module")
def served(models):
    with serve([str(models / "v2")], "cpu", max_file_size="10kb") as page:
        yield page


def join(page, function: int, data: list) -> str:
    """Calls a function of the page as the browser does, and gives the events that answer."""
    body = {"data": data, "fn_index": function, "session_hash": "test", "event_data": None}
    status, _ = request(
        f"{page.local_url}gradio_api/queue/join", json.dumps(body).encode(), **{"Content-Type": "application/json"}
    )
    assert status == 200
    return request(f"{page.local_url}gradio_api/queue/data?session_hash=test")[1].decode()


def test_only_this_machine_is_served_and_nobody_is_told(served):
    assert served.local_url.startswith("http://127.0.0.1:") and not served.share_url
    assert not served.analytics_enabled and not served.allowed_paths
    assert request(served.local_url)[0] == 200


@pytest.mark.parametrize("path", ["/etc/passwd", "pyproject.toml", "../../../../etc/passwd", "//etc/passwd"])
def test_no_file_of_the_machine_is_served(served, path, models):
    for escaped in (path, path.replace("/", "%2F"), str(models / "v2" / "config.json")):
        status, body = request(f"{served.local_url}gradio_api/file={escaped}")
        assert status in (403, 404) and b"root:" not in body and b"model_type" not in body


def test_no_file_of_the_machine_is_predicted(served, photo):
    """Its path, sent in place of that of an upload, is refused by Gradio before it is opened."""
    (function,) = [n for n, f in served.fns.items() if getattr(f.fn, "__name__", "") == "take_file"]
    answer = join(served, function, [{"path": photo, "meta": {"_type": "gradio.FileData"}}])
    assert '"success":false' in answer


def test_uploads_are_served_back_and_have_a_limit(served, photo):
    content = Path(photo).read_bytes()[:5000]
    status, body = upload(served, "photo.png", content)
    (path,) = json.loads(body)
    assert status == 200 and path.startswith(os.environ["GRADIO_TEMP_DIR"])
    assert request(f"{served.local_url}gradio_api/file={path}") == (200, content)
    status, _ = upload(served, "large.png", bytes(20_000))
    assert status == 413


def test_what_was_uploaded_is_gone_with_the_page(models):
    with serve([str(models / "v2")], "cpu") as page:
        _, body = upload(page, "photo.png", b"content")
        (path,) = json.loads(body)
        assert Path(path).is_file() and tempfile.gettempdir() in path
        former = os.environ["GRADIO_TEMP_DIR"]
    assert not Path(former).exists() and os.environ.get("GRADIO_TEMP_DIR") != former


def test_examples_do_not_grow_too_old(models):
    """What deletes uploads after an hour, at once."""
    with serve([str(models / "v2")], "cpu") as page:
        _, body = upload(page, "photo.png", b"content")
        (uploaded,) = json.loads(body)
        examples = list(Path(os.environ["GRADIO_TEMP_DIR"]).glob("*.jpg"))
        image = next(block for block in page.blocks.values() if getattr(block, "label", None) == "Image")
        for example in examples:  # as if they were chosen
            image.move_resource_to_block_cache(example)
        delete_files_created_by_app(page, None)
        assert len(examples) == 5 and all(path.is_file() for path in examples) and not Path(uploaded).exists()


def test_a_port_that_is_taken_is_an_error(served, models):
    with pytest.raises(OSError, match="port"), serve([str(models / "v2")], "cpu", port=served.server_port):
        pass
