"""A folder that the Hub runs as a Space: the page, its models, and the code of this package."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import gradio
import yaml

from ..prediction.loading import find_checkpoint
from ..writing.files import hidden_folder, why_unwritable
from ..writing.hub import commit_folder

PACKAGE = Path(__file__).parents[1]
# What the page needs beside Python, as pyproject.toml states it: a Space has no package to ask.
REQUIREMENTS = (
    "filelock>=3.16",
    "gradio>=6.31",
    "grad-cam>=1.5.7",
    "huggingface-hub>=1.31",
    "numpy>=2.0",
    "pillow>=11.0",
    "safetensors>=0.8",
    "torch>=2.9",
    "torchvision>=0.24",
    "transformers>=5.23",
)
# Of a model's folder; neither pickles nor states of a training run are published.
_MODEL_FILES = ("config.json", "preprocessor_config.json", "README.md", "*.safetensors", "*.safetensors.index.json")
_APP = '''"""The page of this Space. On your own machine: pip install -r requirements.txt && python app.py"""

from pvt_hf.demo.page import serve

with serve({models}, title={title}) as page:
    page.block_thread()
'''
_CARD = """---
{header}---

Models that are made with `pvt_hf`, whose code is in the folder of that name (Apache-2.0), on a page of `pvt-hf demo`.
"""


class SpaceError(ValueError):
    """A Space that cannot be written. The message names the folder."""


def check_output(folder: Path) -> None:
    """Raises a [`SpaceError`] unless a folder can be written, and is new or empty."""
    if reason := why_unwritable(folder):
        raise SpaceError(f"{folder} cannot be written: {reason}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpaceError(f"{folder} must be new or an empty folder: a Space is written there.")


def write_space(models: Sequence[str], folder: Path, title: str) -> None:
    """Writes a Space: `app.py`, `requirements.txt`, `README.md` with the settings, the package's code, and the models
    that are folders. It appears when it is complete.

    Args:
        models: Folders, repositories of the Hub (which the Space downloads), or names of variants.
        folder: To be written, new or empty.
        title: Of the page and the Space.

    Raises:
        SpaceError: If `folder` has something in it, or two models have the same name.
    """
    check_output(folder)
    checkpoints = {name: Path(find_checkpoint(name)) for name in models}
    places = {name: f"models/{path.resolve().name}" for name, path in checkpoints.items() if path.is_dir()}
    if len(set(places.values())) < len(places):
        raise SpaceError(f"Two folders of models have one name: {', '.join(places)}.")
    named = [places.get(name, name) for name in models]
    with hidden_folder(folder.resolve().parent) as hidden:
        space = hidden / folder.resolve().name
        shutil.copytree(PACKAGE, space / "pvt_hf", ignore=shutil.ignore_patterns("__pycache__"))
        for name, place in places.items():
            _copy_model(checkpoints[name], space / place)
        app = _APP.format(models=json.dumps(named, ensure_ascii=False), title=json.dumps(title, ensure_ascii=False))
        (space / "app.py").write_text(app, encoding="utf-8")
        (space / "requirements.txt").write_text("\n".join((*REQUIREMENTS, "")))
        (space / "README.md").write_text(_write_card(title, set(models) - set(places)), encoding="utf-8")
        space.replace(folder.resolve())


def _copy_model(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for pattern in _MODEL_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)


def _write_card(title: str, repositories: set[str]) -> str:
    header = {
        "title": title,
        "emoji": "🔎",
        "colorFrom": "indigo",
        "colorTo": "blue",
        "sdk": "gradio",
        "sdk_version": gradio.__version__,
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "models": sorted(repositories),
    }
    return _CARD.format(header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True))


def push_space(folder: Path, repo: str, private: bool = False) -> str:
    """Uploads a Space in one commit: the Hub has all of it or nothing.

    Args:
        folder: Of [`write_space`].
        repo: `owner/name`, or `name` in one's own namespace. Created unless it exists.
        private: Whether a new repository is private (default: `False`).

    Returns:
        The address of the commit.

    Raises:
        UploadError: If the upload fails, or the repository is public although `private` is set.
    """
    return commit_folder(
        folder,
        repo,
        "Page of pvt-hf demo",
        lambda name: name.startswith(("pvt_hf/", "models/")),
        private,
        repo_type="space",
        space_sdk="gradio",
    )
