"""What is exported in tests: small models, and an exporter that takes no time."""

import torch

import pvt_hf
from tests.support.small_models import randomize, small_config

# Two stages, which are exported in half the time.
_TWO_STAGES = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [8, 16],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}
TWO_STAGES = {
    "v1": _TWO_STAGES | {"sequence_reduction_ratios": [4, 1], "strides": [4, 2], "patch_sizes": [4, 2]},
    "v2": _TWO_STAGES | {"sr_ratios": [4, 2], "strides": [4, 2], "patch_sizes": [7, 3]},
}


def small_classifier(**fields: object) -> pvt_hf.PvtV2ForImageClassification:
    config = small_config("v2", **TWO_STAGES["v2"], **fields)
    return randomize(pvt_hf.PvtV2ForImageClassification(config), std=0.2).eval()


class Exporter:
    """Writes a word in place of a program, and runs the model itself.

    Attributes:
        change: What is done with each output.
        fail: Called while the file is written.
    """

    def __init__(self):
        self.change = lambda value: value
        self.fail = lambda: None
        self.samples = None

    def __call__(self, model, target, shapes, dtype, samples, file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dtype)
        self.samples = samples
        self.fail()

        def run(batch):
            with torch.no_grad():
                return {name: self.change(value) for name, value in model(**batch).items()}

        return run
