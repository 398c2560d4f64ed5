"""The list of all architectures, and which of them a checkpoint or a saved folder is."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..formats import Format
from ..rename import ConversionError, quote
from .atss import ATSS
from .base import Architecture, DensePredictor
from .cascade_mask_rcnn import CascadeMaskRCNN, CascadeRCNN
from .classifier import Backbone, Classifier
from .detr import Detr
from .gfl import GFL
from .mask_rcnn import FasterRCNN, MaskRCNN
from .retinanet import RetinaNet
from .semantic_fpn import SemanticFPN
from .sparse_rcnn import SparseRCNN

CLASSIFIER, BACKBONE = Classifier(), Backbone()
# The first that recognizes a checkpoint counts: a Mask R-CNN has all that a Faster R-CNN has, and Sparse R-CNN and the
# cascades some of it.
DENSE_PREDICTORS: tuple[DensePredictor, ...] = (
    SemanticFPN(),
    RetinaNet(),
    ATSS(),
    GFL(),
    SparseRCNN(),
    CascadeMaskRCNN(),
    CascadeRCNN(),
    MaskRCNN(),
    FasterRCNN(),
    Detr(),
)


def find_architecture(names: Iterable[str], source_format: Format, backbone_only: bool) -> Architecture:
    """What a checkpoint becomes.

    Args:
        names: Of its tensors.
        source_format: Its format.
        backbone_only: Whether only its backbone is wanted.

    Raises:
        ConversionError: If it is a detector or a segmenter that pvt_hf does not have.
    """
    if backbone_only:
        return BACKBONE
    if not source_format.is_dense:
        return CLASSIFIER
    names = list(names)
    for architecture in DENSE_PREDICTORS:
        if architecture.recognizes(names):
            return architecture
    parts = {name.split(".")[0] for name in names if not name.startswith("backbone.")}
    raise ConversionError(
        f"This is an {source_format.name} checkpoint of an architecture with {quote(parts)}, which pvt_hf does not "
        "have. `--backbone-only` converts its backbone."
    )


def find_saved_architecture(known: Mapping[str, Any], names: Iterable[str]) -> Architecture:
    """What a folder of `save_pretrained` holds.

    Args:
        known: Its `config.json`.
        names: Of its tensors.
    """
    for architecture in DENSE_PREDICTORS:
        if architecture.recognizes_config(known):
            return architecture
    return BACKBONE if all(name.startswith("encoder.") for name in names) else CLASSIFIER
