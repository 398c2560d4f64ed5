"""What the configurations of detectors and segmenters have in common: the configuration of a backbone in them."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_pvt import PvtConfig
from .configuration_pvt_v2 import PvtV2Config

_PVT_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    config_class.model_type: config_class for config_class in (PvtConfig, PvtV2Config)
}


class BackboneSpec(SubConfigSpec):
    """How `backbone_config` becomes a configuration: of a PVT by the class beside this file, of others by `AutoConfig`.

    `AutoConfig` would give a PVT transformers' own class where this file came with a checkpoint.

    Args:
        model_type: Of the default backbone, a PVT.
        out_features: Of the default backbone.
    """

    def __init__(self, model_type: str, out_features: Sequence[str]):
        super().__init__(AutoConfig, model_type=model_type, init_kwargs={"out_features": list(out_features)})

    def create_subconfig(self, key: str, subconfig: Any = None, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        if subconfig is None and kwargs.get("backbone") is None:
            subconfig = self.init_kwargs | {"model_type": self.model_type}
        if isinstance(subconfig, dict) and subconfig.get("model_type") in _PVT_CONFIGS:
            subconfig = _PVT_CONFIGS[subconfig["model_type"]].from_dict(subconfig)
        return super().create_subconfig(key, subconfig, **kwargs)
