"""Two steps of a model in `DistributedDataParallel`, without a trainer."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoBackbone, AutoModelForImageClassification

from tests.support.small_models import STAGES, small_config


def main(output_dir: Path, settings: dict[str, Any]) -> None:
    """The gradients are in `gradients-{rank}.pt` afterwards."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = small_config(settings["version"], out_features=STAGES[:3])
    auto_class = AutoBackbone if settings["is_backbone"] else AutoModelForImageClassification
    model = DistributedDataParallel(auto_class.from_config(config).train())
    for step in range(2):  # a parameter without a gradient makes the second forward fail
        pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2 * step + dist.get_rank()))
        output = model(pixels)
        outputs = output.feature_maps if settings["is_backbone"] else [output.logits]
        sum(tensor.square().mean() for tensor in outputs).backward()
    output_dir.mkdir(parents=True, exist_ok=True)
    gradients = [parameter.grad for parameter in model.parameters()]
    torch.save(gradients, output_dir / f"gradients-{dist.get_rank()}.pt")
