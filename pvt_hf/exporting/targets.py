"""What models are exported to: where the files are, which packages it takes, how a program is written."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# The dtypes of exported weights, and what the Hub appends to the name of a file with them.
DTYPES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}
# How far outputs may be from the model's, as a share of the largest value of the same output.
TOLERANCES = {"fp32": 1e-4, "fp16": 0.02, "int8": 0.5}
Batch = dict[str, torch.Tensor]


class ExportError(RuntimeError):
    """What cannot be exported, or became another model. The message says what and why."""


def _configure_onnx(dtype: str, samples: Sequence[Batch]) -> dict[str, Any]:
    """Weights and activations of matrices and convolutions; the range of activations is that of the samples, or without
    them of each input."""
    if dtype != "int8":
        return {}
    from onnxruntime.quantization import QuantType
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer, OnnxRuntimeStaticConfig

    operators = ["Conv", "MatMul", "Gemm"]
    if samples:
        settings = OnnxRuntimeStaticConfig(per_channel=True, op_types_to_quantize=operators)
    else:  # onnxruntime has convolutions of unsigned integers only
        settings = OnnxRuntimeDynamicConfig(weight_type=QuantType.QUInt8, op_types_to_quantize=operators)
    return {"quantizer": OnnxRuntimeQuantizer(settings, samples)}


def _save_onnx(exporter: Any, program: Any, file: Path, dtype: str) -> None:
    """In one file. Inputs and outputs are of float32 whatever the weights are."""
    import onnx
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxruntime.transformers.float16 import convert_float_to_float16

    ClearMetadataAndDocStringPass()(program)  # where each operator is from in the sources
    proto = onnx_ir.to_proto(program)
    if dtype == "fp16":
        proto = convert_float_to_float16(proto, keep_io_types=True)
    onnx.save(proto, file)


def _configure_openvino(dtype: str, samples: Sequence[Batch]) -> dict[str, Any]:
    """Without samples, int8 is of the weights only."""
    if dtype != "int8":
        return {"compress_to_fp16": dtype == "fp16"}
    from transformers.exporters import NNCFOpenVINOQuantizer, NNCFQuantizationConfig, NNCFWeightCompressionConfig

    settings = NNCFQuantizationConfig(subset_size=len(samples)) if samples else NNCFWeightCompressionConfig()
    return {"quantizer": NNCFOpenVINOQuantizer(settings, samples)}


def _save(exporter: Any, program: Any, file: Path, dtype: str) -> None:
    exporter.save_program(program, file)


@dataclass(frozen=True)
class Target:
    """A runtime, and how its files are made.

    Attributes:
        title: As people write it.
        format: As transformers' exporters call it.
        file: Where a file is in the folder of an export, `{}` for the dtype.
        packages: What it takes, by dtype where only one needs it.
        configure: Settings of transformers' exporter for a dtype, and samples to calibrate with.
        save: Writes a program of an exporter to a file, in a dtype.
        dtypes: That it can have.
        takes_any_size: Whether its programs take images of other sizes than the traced one.
        inputs: What its programs take at most.
        run: Settings of the runtime with which a file gives the model's numbers.
    """

    title: str
    format: str
    file: str
    packages: Mapping[str, tuple[str, ...]]
    configure: Callable[[str, Sequence[Batch]], dict[str, Any]]
    save: Callable[[Any, Any, Path, str], None] = _save
    dtypes: tuple[str, ...] = tuple(DTYPES)
    takes_any_size: bool = True
    inputs: tuple[str, ...] = ("pixel_values", "pixel_mask")
    run: dict[str, Any] = field(default_factory=dict)

    def place(self, dtype: str) -> str:
        """The path of a file of this dtype in the folder of an export."""
        return self.file.format(DTYPES[dtype])

    def import_packages(self, dtype: str) -> None:
        """Imports what is needed, before any work is done.

        Raises:
            ModuleNotFoundError: If a package is missing.
        """
        for package in (*self.packages["any"], *self.packages.get(dtype, ())):
            importlib.import_module(package)


_ONNX_PACKAGES = {"any": ("onnx", "onnxscript", "onnxruntime")}
TARGETS = {
    "onnx": Target("ONNX", "onnx", "onnx/model{}.onnx", _ONNX_PACKAGES, _configure_onnx, _save_onnx),
    "openvino": Target(
        "OpenVINO",
        "openvino",
        "openvino/openvino_model{}.xml",
        {"any": ("openvino",), "int8": ("nncf",)},
        _configure_openvino,
        run={"config": {"INFERENCE_PRECISION_HINT": "f32"}},  # it is bf16 where the CPU can
    ),
    "executorch": Target(
        "ExecuTorch",
        "executorch",
        "executorch/model{}.pte",
        {"any": ("executorch",)},
        lambda dtype, samples: {},
        dtypes=("fp32",),
        takes_any_size=False,
    ),
    "web": Target(
        "transformers.js",
        "onnx",
        "onnx/model{}.onnx",
        _ONNX_PACKAGES,
        _configure_onnx,
        _save_onnx,
        inputs=("pixel_values",),
    ),
}
