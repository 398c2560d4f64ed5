"""A page in the browser on which models say what is in an image: `pvt-hf demo`, and the `app.py` of a Space."""

from __future__ import annotations

import html
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from ..data.images import ImageError, decode
from ..prediction.drawing import draw, paint, pick_map_color
from ..prediction.loading import load_predictor
from ..prediction.predictions import Classification, Detections, Prediction, Segmentation
from ..prediction.predictor import Predictor, find_task
from ..writing.text import escape_markdown
from .examples import write_examples
from .grad_cam import can_explain, draw_evidence

THRESHOLD = 0.3
# Detectors are run with it, and the slider ends there.
_LEAST_THRESHOLD = 0.05
# In pixels: larger images are shrunk, so that neither masks nor label maps fill the memory of the machine.
_LONGEST_SIDE = 1600
# How many predictions are kept, of whomever: those of two panels, whose threshold moves.
_KEPT = 4
_TITLE = "Pyramid Vision Transformer"
_INTRODUCTION = "# {title}\nDrop an image, or choose an example."
# Models compute one after the other, and a threshold that moves asks for its last place only.
_ONE_AT_A_TIME: dict[str, Any] = {
    "concurrency_id": "models",
    "concurrency_limit": 1,
    "trigger_mode": "always_last",
    "api_visibility": "private",
}
_CSS = """
.fill img { width: 100%; height: 100%; object-fit: contain; }  /* Gradio shows a small image in its size */
.class { display: flex; gap: 0.5em; align-items: center; }
.class i { width: 1em; height: 1em; border-radius: 2px; }
.class :last-child { margin-left: auto; }
"""
# In seconds: how often files are looked at, and how old they become.
_CLEAR_EVERY, _LONGEST_AGE = 600, 3600


class Looker:
    """What the page asks of its models.

    Args:
        predictors: By the names that they have on the page.
    """

    def __init__(self, predictors: Mapping[str, Predictor]):
        self.predictors = dict(predictors)
        self._predict = lru_cache(_KEPT)(self._predict_once)

    def predict(self, name: str, path: str, threshold: float = THRESHOLD) -> tuple[Image.Image, Prediction]:
        """The image as it was looked at, and what a model finds in it.

        Args:
            name: Of the model.
            path: Of the image.
            threshold: Objects have a larger score.

        Raises:
            ImageError: If it is no image that can be read.
        """
        image, prediction = self._predict(name, path)
        if isinstance(prediction, Detections):
            prediction = prediction.above(threshold)
        return image, prediction

    def _predict_once(self, name: str, path: str) -> tuple[Image.Image, Prediction]:
        image = decode({"path": path}, Path(path).name)
        image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        (prediction,) = self.predictors[name]([image], [Path(path).name])
        return image, prediction

    def finds_objects(self, name: str) -> bool:
        """Whether a threshold counts for a model."""
        return find_task(self.predictors[name].model.config).models in ("detector", "universal segmenter")


def take_file(given: Mapping[str, Any] | None) -> tuple[str | None, dict[str, Any]]:
    """The path of what was uploaded if it is an image, and what becomes of the message below it.

    Args:
        given: As Gradio gets it, which has seen to it that the path is that of an upload; `None` if it was taken away.
    """
    path = str(given["path"]) if given and given.get("path") else None
    if path is not None:
        try:
            decode({"path": path}, Path(path).name)
        except ImageError as error:
            reason = str(error).replace(path, Path(path).name)  # where it is here, is nobody's concern
            return None, gr.update(value=f"**This image cannot be used.** {escape_markdown(reason)}", visible=True)
    return path, gr.update(value=None, visible=False)


class Panel(NamedTuple):
    """Where the page shows what one model finds.

    Attributes:
        model: Choice of the model.
        message: What it finds, in a line, or why it cannot.
        classes: The best classes with bars, of a classifier.
        picture: The image with what is found, of all others.
        legend: Of the picture of a segmenter.
        label: Choice of the class that is explained, of a classifier.
        evidence: The picture that explains it.
    """

    model: gr.Dropdown
    message: gr.Markdown
    classes: gr.Label
    picture: gr.Image
    legend: gr.HTML
    label: gr.Dropdown
    evidence: gr.Image


def _add_panel(names: Sequence[str], name: str) -> Panel:
    with gr.Column(min_width=320):
        return Panel(
            model=gr.Dropdown(list(names), value=name, label="Model", interactive=len(names) > 1),
            message=gr.Markdown(visible=False),
            classes=gr.Label(label="Classes", visible=False),
            picture=gr.Image(label="Picture", interactive=False, visible=False, buttons=["download", "fullscreen"]),
            legend=gr.HTML(visible=False),
            label=gr.Dropdown(label="Where is the evidence for a class? (Grad-CAM)", visible=False, interactive=True),
            evidence=gr.Image(
                label="Evidence",
                interactive=False,
                visible=False,
                buttons=["download"],
                height=320,
                elem_classes="fill",
            ),
        )


def show(looker: Looker, name: str, path: str | None, threshold: float) -> list[dict[str, Any]]:
    """What becomes of a panel's parts behind its model, in their order.

    Args:
        looker: With the models.
        name: Of the model.
        path: Of the image; `None` hides all parts.
        threshold: Objects have a larger score.
    """
    parts: dict[str, dict[str, Any]] = {}
    if path is not None:
        try:
            image, prediction = looker.predict(name, path, threshold)
            parts = _SHOW[type(prediction)](looker, name, image, prediction)
        except ImageError as error:
            parts = {"message": {"value": f"**No prediction.** {escape_markdown(str(error))}", "visible": True}}
    return [gr.update(**{"value": None, "visible": False} | parts.get(part, {})) for part in Panel._fields[1:]]


def move_threshold(looker: Looker, name: str, path: str | None, threshold: float) -> list[dict[str, Any]]:
    """As [`show`] for a model for which a threshold counts; the parts of others stay as they are."""
    if path is None or not looker.finds_objects(name):
        return [gr.update() for _ in Panel._fields[1:]]
    return show(looker, name, path, threshold)


def explain(looker: Looker, name: str, path: str | None, label: int | None) -> dict[str, Any]:
    """What becomes of the picture of where the evidence for a class is.

    Args:
        looker: With the models.
        name: Of a classifier of PVT.
        path: Of the image.
        label: Of the class; `None` hides the picture.
    """
    if path is None or label is None:
        return gr.update(value=None, visible=False)
    image, _ = looker.predict(name, path)
    return gr.update(value=draw_evidence(looker.predictors[name], image, label), visible=True)


def _show_classes(looker: Looker, name: str, image: Image.Image, prediction: Classification) -> dict[str, Any]:
    names = distinguish(prediction.label_names)
    best = prediction.list_best()
    parts: dict[str, Any] = {"classes": {"value": {names[label]: score for label, _, score in best}, "visible": True}}
    if can_explain(looker.predictors[name].model):
        order = prediction.scores.argsort(descending=True, stable=True).tolist()
        parts["label"] = {"choices": [(names[label], label) for label in order], "visible": True}
    return parts


def _show_objects(looker: Looker, name: str, image: Image.Image, prediction: Detections) -> dict[str, Any]:
    return {
        "message": {"value": escape_markdown(prediction.describe()), "visible": True},
        "picture": {"value": draw(image, prediction), "visible": True},
    }


def _show_map(looker: Looker, name: str, image: Image.Image, prediction: Segmentation) -> dict[str, Any]:
    return {
        "picture": {"value": paint(image, prediction), "visible": True},
        "legend": {"value": write_legend(prediction), "visible": True},
    }


_SHOW: dict[type, Callable[..., dict[str, Any]]] = {
    Classification: _show_classes,
    Detections: _show_objects,
    Segmentation: _show_map,
}


def write_legend(prediction: Segmentation) -> str:
    """HTML with the colour, the name and the part of the pixels of each class that is there."""
    return "".join(
        f'<div class="class"><i style="background: rgb{pick_map_color(label)}"></i>'
        f"<span>{html.escape(name)}</span><span>{100 * share:.1f} %</span></div>"
        for label, name, share in prediction.list_shares()
    )


def distinguish(names: Sequence[str]) -> list[str]:
    """The names of classes, with their numbers where two have the same, as two of ImageNet's are cranes."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({label})" for label, name in enumerate(names)]


def build_page(predictors: Mapping[str, Predictor], examples: Sequence[Path] = (), title: str = _TITLE) -> gr.Blocks:
    """Builds the page, with a panel for one model, or two side by side.

    Args:
        predictors: By the names that they have on the page.
        examples: Images to begin with (default: none).
        title: Of the page (default: "Pyramid Vision Transformer").
    """
    looker, names = Looker(predictors), list(predictors)
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(_CLEAR_EVERY, _LONGEST_AGE)) as page:
        gr.Markdown(_INTRODUCTION.format(title=escape_markdown(title)))
        with gr.Row():
            with gr.Column(min_width=320):
                image = gr.Image(
                    label="Image", sources=["upload", "clipboard", "webcam"], height=320, elem_classes="fill"
                )
                problem, file = gr.Markdown(visible=False), gr.State()
                threshold = gr.Slider(
                    _LEAST_THRESHOLD,
                    1,
                    THRESHOLD,
                    step=0.01,
                    label="Threshold",
                    visible=any(map(looker.finds_objects, names)),
                )
                if examples:
                    gr.Examples([[str(path)] for path in examples], [image], api_visibility="private")
            panels = [_add_panel(names, name) for name in names[:2]]
        # The reader of all commands reads the file: Gradio's has no message for one that is corrupt.
        image.change(take_file, image, [file, problem], preprocess=False, api_visibility="private")
        for panel in panels:
            inputs, parts = [panel.model, file, threshold], list(panel[1:])
            for_all = {"inputs": inputs, "outputs": parts, **_ONE_AT_A_TIME}
            gr.on([file.change, panel.model.change], partial(show, looker), **for_all)
            threshold.change(partial(move_threshold, looker), **for_all)
            panel.label.input(
                partial(explain, looker), [panel.model, file, panel.label], panel.evidence, **_ONE_AT_A_TIME
            )
    return page


@contextmanager
def serve(
    models: Sequence[str],
    device: str | None = None,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    max_file_size: str = "20mb",
    title: str = _TITLE,
) -> Iterator[gr.Blocks]:
    """While it lasts, the page is served at `page.local_url`, and `page.share_url` if it is shared.
    `page.block_thread()` waits for Ctrl-C.

    What is uploaded is kept in a folder of its own, which is deleted in the end. No other file can be read.

    Args:
        models: Folders, repositories of the Hub, or names of variants.
        device: Where they compute (default: a GPU if there is one, else the CPU).
        host: Address on which the page is served (default: `GRADIO_SERVER_NAME`, or 127.0.0.1: this machine only).
        port: Of the page (default: `GRADIO_SERVER_PORT`, or the first free one from 7860 on).
        share: Whether Gradio makes a public link to this machine (default: `False`).
        max_file_size: Of an upload, with its unit (default: "20mb").
        title: Of the page (default: "Pyramid Vision Transformer").

    Raises:
        ModelError: If there is no such model.
        OSError: If the port is taken.
    """
    predictors = {name: load_predictor(name, device, threshold=_LEAST_THRESHOLD) for name in models}
    with tempfile.TemporaryDirectory(prefix="pvt_hf-demo-", dir=os.environ.get("GRADIO_TEMP_DIR")) as folder:
        settings = {
            "GRADIO_TEMP_DIR": folder,
            "GRADIO_EXAMPLES_CACHE": f"{folder}/examples",
            "GRADIO_RUN_HISTORY": "False",
        }
        former = {name: os.environ.get(name) for name in settings}
        os.environ |= settings
        try:
            page = build_page(predictors, write_examples(predictors.values(), Path(folder)), title)
            page.launch(
                server_name=host,
                server_port=port,
                share=share,
                max_file_size=max_file_size,
                allowed_paths=[],
                enable_monitoring=False,
                footer_links=["gradio", "settings"],
                ssr_mode=False,
                css=_CSS,
                quiet=True,
                prevent_thread_lock=True,
            )
            try:
                yield page
            finally:
                page.close(verbose=False)
        finally:
            for name, value in former.items():
                os.environ.pop(name)
                os.environ.update({} if value is None else {name: value})
