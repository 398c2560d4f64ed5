"""Classifiers and backbones of ours and of the peers, and a step of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoBackbone, AutoModelForImageClassification, PreTrainedConfig

from ..exporting.programs import plan_shapes, write_program
from ..exporting.targets import TARGETS
from .machine import use_precision
from .rows import Entrant, Row
from .timing import Step

STAGES = ["stage1", "stage2", "stage3", "stage4"]
# Keywords of `torch.compile`, by what `Entrant.compiler` says.
COMPILERS: dict[str, dict[str, Any]] = {"default": {}, "reduce-overhead": {"mode": "reduce-overhead"}}


def build_network(library: str, model: str, config: PreTrainedConfig) -> nn.Module:
    """A model with random weights.

    Args:
        library: `pvt_hf`, `transformers` or `timm`.
        model: `classification` or `backbone`.
        config: Of ours; the others' are made the same.

    Raises:
        ValueError: If the library has no such model.
    """
    return _LIBRARIES[library](model, config)


def _build_own(model: str, config: PreTrainedConfig) -> nn.Module:
    return (AutoBackbone if model == "backbone" else AutoModelForImageClassification).from_config(config)


def _build_of_transformers(model: str, config: PreTrainedConfig) -> nn.Module:
    prefix = "PvtV2" if config.model_type == "pvt_v2" else "Pvt"
    name = f"{prefix}{'Backbone' if model == 'backbone' else 'ForImageClassification'}"
    if not hasattr(transformers, name):
        raise ValueError(f"transformers has no {name}")
    return getattr(transformers, name)(getattr(transformers, f"{prefix}Config")(**config.to_diff_dict()))


def _build_of_timm(model: str, config: PreTrainedConfig) -> nn.Module:
    if config.model_type != "pvt_v2":
        raise ValueError("timm has no PVT v1")
    import timm

    fields = {
        "depths": config.depths,
        "embed_dims": config.hidden_sizes,
        "num_heads": config.num_attention_heads,
        "mlp_ratios": config.mlp_ratios,
        "sr_ratios": config.sr_ratios,
        "linear": config.linear_attention,
    }
    head = {"features_only": True} if model == "backbone" else {"num_classes": config.num_labels}
    return timm.create_model("pvt_v2_b2", **fields, **head)


_LIBRARIES = {"pvt_hf": _build_own, "transformers": _build_of_transformers, "timm": _build_of_timm}


def list_tensors(result: Any) -> list[torch.Tensor]:
    """The tensors that a model of any library returns.

    Args:
        result: A tensor, a list of them, or an output of transformers.
    """
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, Mapping):
        return list(result["feature_maps"]) if "feature_maps" in result else [result["logits"]]
    return list(result)


def make_step(model: nn.Module, entrant: Entrant, row: Row, pixels: torch.Tensor) -> tuple[Step, Callable[[], object]]:
    """A step of a network, and its forward pass without compilation.

    Args:
        model: From pixels to tensors.
        entrant: Whose settings it gets.
        row: What is measured.
        pixels: `(batch, 3, height, width)`, on the device.
    """
    training = row.step == "training"
    model = model.to(pixels.device).train(training).requires_grad_(training)
    if entrant.layout == "channels_last":
        model, pixels = model.to(memory_format=torch.channels_last), pixels.to(memory_format=torch.channels_last)
    if entrant.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    eager = model.forward
    if entrant.compiler != "eager":
        model.compile(**COMPILERS[entrant.compiler])

    def forward() -> object:
        with use_precision(entrant.precision, pixels.device):
            return eager(pixels)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.set_grad_enabled(training):
            with use_precision(entrant.precision, pixels.device):
                outputs = model(pixels)
            if training:
                torch.stack([tensor.float().mean() for tensor in list_tensors(outputs)]).sum().backward()
                model.zero_grad(set_to_none=True)

    return step, forward


def write_onnx(model: nn.Module, file: Path) -> Path:
    """Our own ONNX file of a model, as `pvt-hf export` writes it.

    Args:
        model: In evaluation mode, on the CPU.
        file: To be written, if it is not there.
    """
    if not file.exists():
        target = TARGETS["onnx"]
        write_program(model.eval(), target, plan_shapes(model, target), "fp32", (), file)
    return file


def run_onnxruntime(file: Path, pixels: torch.Tensor, threads: int) -> Step:
    """A step of an ONNX file in onnxruntime.

    Args:
        file: Of ONNX.
        pixels: `(batch, 3, height, width)`.
        threads: Of the CPU.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Else its threads would wait for more work in a loop, while the next of a row is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    inputs = {"pixel_values": pixels.numpy()}

    def step() -> None:
        session.run(None, inputs)

    return step


def run_openvino(file: Path, pixels: torch.Tensor, threads: int) -> Step:
    """A step of an ONNX file in OpenVINO, in fp32.

    Args:
        file: Of ONNX.
        pixels: `(batch, 3, height, width)`.
        threads: Of the CPU.
    """
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(str(file), "CPU", settings).create_infer_request()
    inputs = {"pixel_values": pixels.numpy()}

    def step() -> None:
        request.infer(inputs, share_inputs=True)

    return step


RUNTIMES: dict[str, Callable[[Path, torch.Tensor, int], Step]] = {
    "onnxruntime": run_onnxruntime,
    "openvino": run_openvino,
}
