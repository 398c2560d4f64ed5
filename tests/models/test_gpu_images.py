"""Images that a GPU prepares: the CPU's values."""

import pytest
import torch

import pvt_hf
from pvt_hf.benchmark.images import draw_photo

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]


@pytest.mark.parametrize("backend", ["", "Pil"])
@pytest.mark.parametrize("task", ["Detection", "Segmentation"])
def test_images_for_dense_prediction_have_the_cpus_bits(task, backend, device):
    image_processor = getattr(pvt_hf, f"Pvt{task}ImageProcessor{backend}")()
    for size in ((120, 160), (1100, 900)):
        expected = image_processor(draw_photo(*size), return_tensors="pt")
        prepared = image_processor(draw_photo(*size), return_tensors="pt", device=device)
        for name, values in expected.items():
            assert prepared[name].device.type == device.type and prepared[name].cpu().equal(values)


def test_images_for_classification_are_near_the_cpus(device):
    """torchvision resizes on a GPU in float32."""
    image_processor = pvt_hf.PvtImageProcessor(do_normalize=False, do_rescale=False)
    expected = image_processor(draw_photo(375, 500), return_tensors="pt").pixel_values
    prepared = image_processor(draw_photo(375, 500), return_tensors="pt", device=device).pixel_values
    assert prepared.device.type == device.type
    torch.testing.assert_close(prepared.cpu().float(), expected.float(), rtol=0, atol=2)
