"""Spa3R and Spa3-VLM: spatial representations from unposed photos, and vision-language models that use them.

``import spa3r`` imports neither torch nor transformers: names are imported on first use, and
:mod:`spa3r.registration` registers the types of this package with transformers' Auto classes.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from spa3r.registration import register

__version__ = "0.1.0"

_MODULE_OF_NAME = {
    "VggtConfig": "models.vggt.configuration_vggt",
    "VggtModel": "models.vggt.modeling_vggt",
    "DepthAnything3Config": "models.depth_anything_3.configuration_depth_anything_3",
    "DepthAnything3Model": "models.depth_anything_3.modeling_depth_anything_3",
    "Spa3RConfig": "models.spa3r.configuration_spa3r",
    "Spa3RModel": "models.spa3r.modeling_spa3r",
    "Spa3RForPreTraining": "models.spa3r.modeling_spa3r",
    "Spa3RImageProcessor": "models.spa3r.image_processing_spa3r",
    "Spa3VLMConfig": "models.spa3_vlm.configuration_spa3_vlm",
    "Spa3VLMForConditionalGeneration": "models.spa3_vlm.modeling_spa3_vlm",
    "Spa3VLM": "models.spa3_vlm.modeling_spa3_vlm",
    "Spa3VLMProcessor": "models.spa3_vlm.processing_spa3_vlm",
    "EncodedScene": "models.spa3_vlm.scenes",
    "SceneCache": "models.spa3_vlm.scenes",
    "convert_checkpoint": "conversion",
}

__all__ = [*_MODULE_OF_NAME, "__version__"]

if TYPE_CHECKING:
    from spa3r.conversion import convert_checkpoint
    from spa3r.models.depth_anything_3.configuration_depth_anything_3 import DepthAnything3Config
    from spa3r.models.depth_anything_3.modeling_depth_anything_3 import DepthAnything3Model
    from spa3r.models.spa3_vlm.configuration_spa3_vlm import Spa3VLMConfig
    from spa3r.models.spa3_vlm.modeling_spa3_vlm import Spa3VLM, Spa3VLMForConditionalGeneration
    from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor
    from spa3r.models.spa3_vlm.scenes import EncodedScene, SceneCache
    from spa3r.models.spa3r.configuration_spa3r import Spa3RConfig
    from spa3r.models.spa3r.image_processing_spa3r import Spa3RImageProcessor
    from spa3r.models.spa3r.modeling_spa3r import Spa3RForPreTraining, Spa3RModel
    from spa3r.models.vggt.configuration_vggt import VggtConfig
    from spa3r.models.vggt.modeling_vggt import VggtModel


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module 'spa3r' has no attribute {name!r}")
    value = getattr(import_module(f"spa3r.{_MODULE_OF_NAME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register()
# PEFT imports bitsandbytes, which warns on some CPUs that it could not download a kernel for 4-bit weights.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
