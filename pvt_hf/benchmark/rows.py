"""What is measured: the rows of the benchmark, each a piece of work that several entrants do in turn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Entrant(NamedTuple):
    """Who does the work of a row, and how.

    Attributes:
        library: `pvt_hf` or a peer.
        model: What it runs: `classification`, `backbone`, `retinanet`, ...
        precision: `fp32`, `tf32` (fp32 whose products a GPU rounds), or autocast to `bf16` or `fp16`.
        layout: Of weights and images in memory: `contiguous` or `channels_last`.
        compiler: `eager`, or a mode of `torch.compile`: `default` or `reduce-overhead`.
        checkpointing: Whether activations are computed again in the backward pass.
    """

    library: str
    model: str = "classification"
    precision: str = "fp32"
    layout: str = "contiguous"
    compiler: str = "eager"
    checkpointing: bool = False

    def describe(self, other: "Entrant | None" = None) -> str:
        """In words.

        Args:
            other: What is the same in it is not said (default: nothing is).
        """
        usual = other or Entrant("", self.model)
        model = [self.model] if self.model != usual.model else []
        settings = ((self.precision, usual.precision), (self.layout, usual.layout), (self.compiler, usual.compiler))
        words = [now for now, before in settings if now != before]
        words = ["compiled" if word == "default" else word for word in words]
        words += ["checkpointing"] * (self.checkpointing and not usual.checkpointing)
        return " ".join([self.library, *model, *words])


@dataclass(frozen=True)
class Row:
    """A piece of work.

    Attributes:
        name: By which it is chosen.
        step: `inference`, `training` (forward, backward, gradients) or `image processing`.
        entrants: Who does it. The first one's speed is stated over that of each of the others.
        variant: Of the PVT.
        batch: Number of images of a step.
        size: Height and width in pixels.
        threads: Of the CPU (default: those that there are).
    """

    name: str
    step: str
    entrants: tuple[Entrant, ...]
    variant: str = "pvt_v2_b2"
    batch: int = 8
    size: tuple[int, int] = (224, 224)
    threads: int | None = None

    def describe(self) -> str:
        """In words."""
        images = "one image" if self.batch == 1 else f"{self.batch} images"
        first = self.entrants[0]
        settings = first.describe(Entrant("", first.model)).strip()
        words = [f"`{self.variant}` {first.model}{settings.removeprefix('pvt_hf')}" if "image" not in self.step else
                 first.model, f"{images} of {self.size[0]} x {self.size[1]}", self.step]  # fmt: skip
        return ", ".join(words)


def _with(libraries: str, **settings: Any) -> tuple[Entrant, ...]:
    return tuple(Entrant(library, **settings) for library in libraries.split())


_PEERS = "pvt_hf transformers timm"
_DENSE = (800, 1216)  # of COCO's images, resized
_SIZES = (224, 448, 672, 896, 1120, 1344)


def _list_cpu_rows() -> Iterator[Row]:
    yield Row("v1", "inference", _with("pvt_hf transformers onnxruntime openvino"), "pvt_small")
    yield Row("v2", "inference", _with(f"{_PEERS} onnxruntime"))
    yield Row("v2_batch_1", "inference", _with(_PEERS), batch=1)
    yield Row("v2_training", "training", _with(_PEERS))
    backbones = _with(_PEERS, model="backbone")
    yield Row("v2_backbone", "inference", backbones, batch=1, size=(704, 1056))
    yield Row("v2_backbone_training", "training", backbones, batch=1, size=(704, 1056))
    v1_backbone = _with("pvt_hf", model="backbone")
    yield Row("v1_backbone", "inference", v1_backbone, "pvt_small", 1, _DENSE)
    yield Row("v1_backbone_training", "training", v1_backbone, "pvt_small", 1, _DENSE)
    for model, peer in (("retinanet",) * 2, ("mask_rcnn",) * 2, ("semantic_fpn", "fcn")):
        two = Entrant("pvt_hf", model), Entrant("torchvision", peer)
        yield Row(model, "inference", two, "pvt_small", 1, _DENSE)
    images = "pvt_hf torchvision transformers"
    for model, size in (("classification", (375, 500)), ("detection", (480, 640)), ("segmentation", (512, 683))):
        entrants = _with(images, model=f"{model} images")
        yield Row(f"{model}_images", "image processing", entrants, "", 1, size, threads=1)
    files = _with(images, model="evaluation files")
    yield Row("evaluation_files", "image processing", files, "", 1, (375, 500), threads=1)
    eager = Entrant("pvt_hf")
    yield Row("v2_compiled", "inference", (*_with(_PEERS, compiler="default"), eager))
    yield Row("v1_compiled", "inference", (*_with("pvt_hf transformers", compiler="default"), eager), "pvt_small")
    for side in _SIZES:
        yield Row(f"size_{side}", "inference", _with(_PEERS, model="backbone"), batch=1, size=(side, side))


def _list_gpu_rows() -> Iterator[Row]:
    bf16 = _with(_PEERS, precision="bf16")
    ours = bf16[0]
    backbones = _with(_PEERS, precision="bf16", model="backbone")
    yield Row("gpu", "inference", bf16, batch=128)
    yield Row("gpu_training", "training", bf16, batch=128)
    # Ours in bf16 beside ours in other settings: above 1 where bf16 is faster.
    others = [ours._replace(precision=name) for name in ("fp16", "tf32", "fp32")]
    others.append(ours._replace(layout="channels_last"))
    yield Row("gpu_settings", "inference", (ours, *others), batch=128)
    checkpointing = ours._replace(checkpointing=True)
    yield Row("gpu_settings_training", "training", (ours, *others, checkpointing), batch=128)
    for batch in (1, 8, 32, 256, 512):
        yield Row(f"batch_{batch}", "inference", bf16, batch=batch)
    yield Row("gpu_v1", "inference", bf16[:2], "pvt_small", 128)
    yield Row("gpu_v1_training", "training", bf16[:2], "pvt_small", 128)
    yield Row("gpu_linear", "inference", bf16, "pvt_v2_b2_li", 128)
    yield Row("gpu_backbone", "inference", backbones, batch=2, size=_DENSE)
    yield Row("gpu_backbone_training", "training", backbones, batch=2, size=_DENSE)
    for side in _SIZES:
        yield Row(f"size_{side}", "inference", backbones, batch=4, size=(side, side))
    retinanets = Entrant("pvt_hf", "retinanet"), Entrant("torchvision", "retinanet")
    yield Row("gpu_retinanet", "inference", retinanets, "pvt_small", 1, _DENSE)
    compiled = tuple(entrant._replace(compiler="default") for entrant in bf16)
    reduced = tuple(entrant._replace(compiler="reduce-overhead") for entrant in bf16)
    yield Row("gpu_compiled", "inference", (*compiled, ours), batch=128)
    yield Row("gpu_reduce_overhead", "inference", (*reduced, ours), batch=1)
    yield Row("gpu_compiled_training", "training", (*compiled, ours), batch=128)


def _list_other_rows() -> Iterator[Row]:
    """Those that are measured only when they are named."""
    plain = Entrant("pvt_hf")
    settings = (
        plain,
        plain._replace(compiler="default"),
        plain._replace(checkpointing=True),
        plain._replace(layout="channels_last"),
        plain._replace(precision="bf16"),
    )
    yield Row("settings_training", "training", settings, "pvt_v2_b0")
    loading = plain, Entrant("pvt_hf", "training images")
    yield Row("input_pipeline", "training", loading, "pvt_v2_b2")
    one_stage = ("retinanet", "atss", "gfl")
    detectors = *one_stage, "sparse_rcnn", "mask_rcnn", "cascade_mask_rcnn"
    for step in ("inference", "training"):
        entrants = tuple(Entrant("pvt_hf", f"{name} network") for name in detectors)
        yield Row(f"detectors_{step}", step, entrants, "pvt_v2_b2_li", 1, _DENSE)
        entrants = tuple(Entrant("pvt_hf", f"{name} head") for name in one_stage)
        yield Row(f"heads_{step}", step, entrants, "pvt_v2_b2_li", 1, _DENSE)


PRESETS = {"cpu": tuple(_list_cpu_rows()), "gpu": tuple(_list_gpu_rows())}
OTHERS = tuple(_list_other_rows())


def choose_rows(preset: str, names: Sequence[str] | None = None) -> list[Row]:
    """The rows of a preset, or some of them.

    Args:
        preset: `"cpu"` or `"gpu"`.
        names: Which, in their order; also rows that are in no preset (default: all of the preset).

    Raises:
        ValueError: If there is no row of a name.
    """
    rows = {row.name: row for row in (*PRESETS[preset], *OTHERS)}
    if unknown := [name for name in names or () if name not in rows]:
        raise ValueError(f"--rows must be some of {', '.join(rows)}; got {', '.join(unknown)}")
    return [rows[name] for name in names] if names else list(PRESETS[preset])
