"""Speed and peak memory of pvt_hf beside its peers, all in this process, interleaved, so that the ratios are fair.

    python examples/benchmark.py --peers transformers timm
    python examples/benchmark.py --peers bf16 compile checkpointing channels_last --modes training   # our own settings
    python examples/benchmark.py --tasks detection --variants pvt_small --peers torchvision   # image to boxes
    python examples/benchmark.py --detectors retinanet atss gfl --variants pvt_v2_b2_li    # and multiply-adds of heads
    python examples/benchmark.py --input_pipeline          # how many workers it takes to feed the model

A ratio above 1 in "speed" means that pvt_hf is faster; below 1 in "memory" that it needs less, over what the process
holds before the step (on Linux the resident set, on a GPU the allocated memory). Training is forward, backward and
gradients. Detection is RetinaNet: inference with decoding and suppression of 1000 candidates per level, training with
losses of ten objects, beside torchvision's `retinanet_resnet50_fpn_v2`, another model of about the same size.

`--detectors` measures ours beside each other, as a whole and, where all levels share a head, that head alone on maps of
the same size. The last column is the time of the step for each multiply-add of its forward pass, over that of the first
detector: below 1 it does more of them in a second. (Masks are computed, but not pasted into the image.)
"""

import argparse
import ctypes
import gc
import io
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import retinanet_resnet50_fpn_v2
from torchvision.ops import box_convert
from tqdm import tqdm
from transformers import AutoBackbone, AutoConfig, AutoModelForImageClassification, AutoModelForObjectDetection

import pvt_hf
from pvt_hf.data.augmentation import build_training_transform
from pvt_hf.data.classification import TrainingImages, collate
from pvt_hf.data.samplers import EpochSampler
from pvt_hf.recipes import imagenet_recipe

STAGES = ["stage1", "stage2", "stage3", "stage4"]
# batch, height, width
WORKLOADS = {"classification": (8, 224, 224), "backbone": (1, 800, 1216), "detection": (1, 800, 1216)}
SETTINGS = ("bf16", "fp16", "compile", "checkpointing", "channels_last")
ONE_STAGE = ("retinanet", "atss", "gfl")
DETECTORS = (*ONE_STAGE, "sparse_rcnn", "mask_rcnn", "cascade_mask_rcnn")


def build(library: str, task: str, name: str) -> Callable | None:
    """The model of one library, or None where it has none."""
    if task == "detection":
        return (
            apply_setting(build_detector(library, name), library) if library not in ("transformers", "timm") else None
        )
    config = pvt_hf.build_config(name, out_features=STAGES)
    if library in ("pvt_hf", *SETTINGS):
        model = (AutoBackbone if task == "backbone" else AutoModelForImageClassification).from_config(config)
        return apply_setting(model, library)
    if library == "transformers":
        prefix = "PvtV2" if config.model_type == "pvt_v2" else "Pvt"
        suffix = "Backbone" if task == "backbone" else "ForImageClassification"
        model_class = getattr(transformers, f"{prefix}{suffix}", None)
        return model_class and model_class(getattr(transformers, f"{prefix}Config")(**config.to_diff_dict()))
    if library == "torchvision":
        return None
    import timm

    if name not in timm.list_models("pvt_v2_*"):
        return None
    return timm.create_model(name, features_only=True) if task == "backbone" else timm.create_model(name)


def build_detector(library: str, name: str, architecture: str = "retinanet") -> torch.nn.Module:
    """A detector from images to detections, or in training to losses."""
    if library == "torchvision":
        model = retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None)
    else:
        config_class = type(AutoConfig.for_model(f"pvt_hf_{architecture}"))
        backbone = pvt_hf.build_config(name, out_features=list(config_class.backbone_out_features))
        config = config_class(backbone_config=backbone, num_labels=80)
        model = AutoModelForObjectDetection.from_config(config)
    # One class everywhere, so that there are as many candidates as there can be for the suppression, and masks.
    anchors_per_cell = 9 if architecture == "retinanet" else 1
    with torch.no_grad():
        for key, layer in model.named_modules():
            if key.endswith(("class_predictor", "cls_logits")):
                layer.bias.view(anchors_per_cell, -1)[:, 0] = 4
    forward, image_processor = model.forward, pvt_hf.PvtDetectionImageProcessor()
    corners = torch.rand(10, 2) * 0.7
    boxes, classes = torch.cat([corners, corners + 0.05 + 0.2 * torch.rand(10, 2)], dim=1), torch.arange(10)

    def detect(pixels: torch.Tensor) -> list[torch.Tensor]:
        height, width = pixels.shape[2:]
        if library == "torchvision":
            absolute = (boxes * torch.tensor([width, height, width, height])).to(pixels.device)
            targets = [{"boxes": absolute, "labels": classes.to(pixels.device)}] * len(pixels)
            found = forward(list(pixels), targets if model.training else None)
            return list(found.values()) if model.training else [image["boxes"] for image in found]
        if not model.training:
            found = image_processor.post_process_object_detection(
                forward(pixels), 0.05, [(height, width)] * len(pixels)
            )
            return [image["boxes"] for image in found]
        centered = box_convert(boxes, "xyxy", "cxcywh").to(pixels.device)
        labels = {"boxes": centered, "class_labels": classes.to(pixels.device)}
        labels["masks"] = pixels.new_ones((), dtype=torch.bool).expand(len(classes), height, width)
        return [forward(pixels, labels=[labels] * len(pixels)).loss]

    model.forward = detect
    return model


class HeadAlone(torch.nn.Module):
    """The head of a detector of one stage, on maps of the sizes that images have in the pyramid."""

    def __init__(self, detector: torch.nn.Module):
        super().__init__()
        self.head, self.config = detector.head, detector.config

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        sizes = [[-(-side // stride) for side in pixels.shape[2:]] for stride in self.config.strides]
        levels = [pixels.new_ones(len(pixels), self.config.neck_channels, *size) for size in sizes]
        return list(self.head([level.normal_().requires_grad_(torch.is_grad_enabled()) for level in levels]))


def apply_setting(model: torch.nn.Module, setting: str) -> torch.nn.Module:
    """The model as `Trainer`'s flag of that name would run it."""
    if setting in ("bf16", "fp16"):
        dtype, forward = {"bf16": torch.bfloat16, "fp16": torch.float16}[setting], model.forward

        def autocast_forward(pixels: torch.Tensor):
            with torch.autocast(pixels.device.type, dtype):
                return forward(pixels)

        model.forward = autocast_forward
    elif setting == "compile":
        model.compile()
    elif setting == "checkpointing":
        model.gradient_checkpointing_enable()
    elif setting == "channels_last":
        model.to(memory_format=torch.channels_last)
        model.register_forward_pre_hook(lambda _, args: args[0].contiguous(memory_format=torch.channels_last))
    return model


def outputs(result) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor | list):
        return [result] if isinstance(result, torch.Tensor) else result
    return list(result.feature_maps) if "feature_maps" in result else [result.logits]


def step(model: Callable, pixels: torch.Tensor, training: bool) -> None:
    with torch.set_grad_enabled(training):
        result = outputs(model(pixels))
        if training:
            sum(tensor.mean() for tensor in result).backward()
            model.zero_grad(set_to_none=True)
    if pixels.is_cuda:
        torch.cuda.synchronize()


def seconds(model: Callable, pixels: torch.Tensor, training: bool, cpu_time: bool = False) -> float:
    clock = time.process_time if cpu_time else time.perf_counter
    start = clock()
    step(model, pixels, training)
    return clock() - start


def resident(field: str) -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024


def peak_bytes(model: Callable, pixels: torch.Tensor, training: bool) -> float:
    """Peak of one step over what is held before it; NaN where the system does not tell."""
    gc.collect()
    if pixels.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, pixels, training)
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
    before = resident("VmRSS")
    step(model, pixels, training)
    return resident("VmHWM") - before


def measure(
    models: dict[str, torch.nn.Module], pixels: torch.Tensor, training: bool, args: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    """The median seconds and the peak bytes of a step of each model, one model after the other in each round."""
    for model in models.values():
        step(model, pixels, training)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.repeats):
        for name, model in models.items():
            times[name].append(seconds(model, pixels, training, args.cpu_time))
    peaks = {name: peak_bytes(model, pixels, training) for name, model in models.items()}
    return {name: statistics.median(values) for name, values in times.items()}, peaks


def compare(task: str, name: str, training: bool, args: argparse.Namespace) -> list[str]:
    """One line of the table per peer that has this model."""
    models = {library: build(library, task, name) for library in ("pvt_hf", *args.peers)}
    models = {library: model.to(args.device).train(training) for library, model in models.items() if model}
    batch, height, width = WORKLOADS[task]
    pixels = torch.randn(args.batch_size or batch, 3, height, width, device=args.device)
    times, peaks = measure(models, pixels, training, args)
    return [
        f"| {name} | {task} {tuple(pixels.shape)} | {'training' if training else 'inference'} | {peer} "
        f"| {times[peer] / times['pvt_hf']:.2f} "
        f"| {peaks['pvt_hf'] / peaks[peer]:.2f} | {peaks['pvt_hf'] / 2**20:.0f} MiB |"
        for peer in models
        if peer != "pvt_hf"
    ]


def compare_detectors(name: str, training: bool, alone: bool, args: argparse.Namespace) -> list[str]:
    """One line per detector, or per head."""
    chosen = [architecture for architecture in args.detectors if not alone or architecture in ONE_STAGE]
    models = {architecture: build_detector("pvt_hf", name, architecture) for architecture in chosen}
    models = {key: (HeadAlone(model) if alone else model) for key, model in models.items()}
    # (The counter wants gradients of all parameters, or of none.)
    models = {key: model.to(args.device).train(training).requires_grad_(training) for key, model in models.items()}
    batch, height, width = WORKLOADS["detection"]
    pixels = torch.randn(args.batch_size or batch, 3, height, width, device=args.device)
    multiply_adds = {}
    for key, model in models.items():
        # (Of the forward pass: in the backward one the counter takes convolutions with groups for dense ones.)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            model(pixels)
        multiply_adds[key] = counter.get_total_flops() / 2
    times, peaks = measure(models, pixels, training, args)
    rates = {key: times[key] / multiply_adds[key] for key in models}
    return [
        f"| {name} | {key}{' head' if alone else ''} {tuple(pixels.shape)} | {'training' if training else 'inference'} "
        f"| {times[key]:.2f} s | {times[key] / times[chosen[0]]:.2f} | {peaks[key] / 2**20:.0f} MiB "
        f"| {multiply_adds[key] / 1e9:.0f} G | {rates[key] / rates[chosen[0]]:.2f} |"
        for key in models
    ]


def input_pipeline(name: str, args: argparse.Namespace) -> str:
    """Images per second of one worker of the recipe's input pipeline, beside those of the model's training step."""
    y, x = np.mgrid[:375, :500]  # the mean size of ImageNet's files, which take about 110 kB
    texture = np.random.default_rng(0).normal(0, 12, (375, 500, 3))
    pixels = np.stack((x / 2, y / 2, (x + y) / 4), axis=-1) + 60 * np.sin(x / 9)[..., None] + texture
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    row = {"image": {"bytes": buffer.getvalue(), "path": "synthetic.jpg"}, "label": 0}
    count, batch = 96, args.batch_size or 8
    data = TrainingImages([row] * count, "label", 10, build_training_transform(imagenet_recipe(name), 224))
    model = build("pvt_hf", "classification", name).to(args.device).train()
    images = torch.randn(batch, 3, 224, 224, device=args.device)
    step(model, images, True)
    loading, training = [], []
    for epoch in range(args.repeats):
        sampler = EpochSampler(count, seed=epoch)
        start = time.perf_counter()
        collate(data[key] for key in sampler)
        loading.append(count / (time.perf_counter() - start))
        training.append(batch / seconds(model, images, True))
    fed, eaten = statistics.median(loading), statistics.median(training)
    return f"| {name} | {len(buffer.getvalue()) / 1000:.0f} kB | {fed:.0f} | {eaten:.1f} | {eaten / fed:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers",
        nargs="+",
        default=["transformers", "timm"],
        choices=["transformers", "timm", "torchvision", *SETTINGS],
    )
    parser.add_argument("--variants", nargs="+", default=["pvt_v2_b2"], choices=list(pvt_hf.VARIANTS))
    parser.add_argument("--tasks", nargs="+", default=["classification", "backbone"], choices=list(WORKLOADS))
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument("--batch_size", type=int, help="instead of 8 for classification and 1 for the others")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cpu_time", action="store_true", help="of this process, where a CPU has other work too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--input_pipeline", action="store_true", help="measure the loading of images instead")
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, help="measure these beside the first of them")
    args = parser.parse_args()
    if args.input_pipeline:
        print("| variant | JPEG | images/s of one worker | images/s of training | workers needed |\n|--|--|--|--|--|")
        for name in args.variants:
            print(input_pipeline(name, args))
        return

    if args.detectors:
        print("| variant | detector | step | time | over the first | peak | multiply-adds | time for each of them |")
        print("|--|--|--|--|--|--|--|--|")
        for name, mode, alone in itertools.product(args.variants, args.modes, (False, True)):
            for line in compare_detectors(name, mode == "training", alone, args):
                print(line, flush=True)
        return

    cases = [(task, name, mode) for name in args.variants for task in args.tasks for mode in args.modes]
    print(f"{args.device}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| variant | input | step | peer | speed | memory | pvt_hf's peak |\n|--|--|--|--|--|--|--|")
    for task, name, mode in tqdm(cases, desc="benchmark"):
        tqdm.write("\n".join(compare(task, name, mode == "training", args)))


if __name__ == "__main__":
    main()
