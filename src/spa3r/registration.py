"""Registration with transformers, deferred until transformers is imported.

``import spa3r`` imports neither torch nor transformers. The types of this package are registered as soon as the
transformers module that defines an Auto class is imported, before or after ``import spa3r``. A class of this package is
imported when an Auto class looks it up.
"""

from __future__ import annotations

import sys
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def register() -> None:
    """Register with modules that are already imported, and with the others once they are imported."""
    for name in list(_WAITING):
        if name in sys.modules:
            _WAITING.pop(name)(sys.modules[name])
    sys.meta_path.insert(0, _RegisterAfterImport())


def _register_attention(modeling_utils: ModuleType) -> None:
    import_module("spa3r.models.attention")  # registers its back end


def _register_configs(configuration_auto: ModuleType) -> None:
    names = {
        "vggt": "VggtConfig",
        "depth_anything_3": "DepthAnything3Config",
        "spa3r": "Spa3RConfig",
        "spa3_vlm": "Spa3VLMConfig",
    }
    _extend(configuration_auto.CONFIG_MAPPING, names)


def _register_models(modeling_auto: ModuleType) -> None:
    vggt, depth_anything_3, spa3r, spa3_vlm = _configs()
    models = {
        vggt: "VggtModel",
        depth_anything_3: "DepthAnything3Model",
        spa3r: "Spa3RModel",
        spa3_vlm: "Spa3VLMForConditionalGeneration",
    }
    _extend(modeling_auto.MODEL_MAPPING, models)
    _extend(modeling_auto.MODEL_FOR_PRETRAINING_MAPPING, {spa3r: "Spa3RForPreTraining"})
    _extend(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, {spa3_vlm: "Spa3VLMForConditionalGeneration"})


def _register_image_processors(image_processing_auto: ModuleType) -> None:
    *with_views, _ = _configs()
    names = dict.fromkeys(with_views, "Spa3RImageProcessor")
    _extend(image_processing_auto.IMAGE_PROCESSOR_MAPPING, names, lambda processor: {"pil": processor})


def _register_processors(processing_auto: ModuleType) -> None:
    _extend(processing_auto.PROCESSOR_MAPPING, {_configs()[-1]: "Spa3VLMProcessor"})


_WAITING: dict[str, Callable[[ModuleType], None]] = {
    "transformers.modeling_utils": _register_attention,
    "transformers.models.auto.configuration_auto": _register_configs,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.image_processing_auto": _register_image_processors,
    "transformers.models.auto.processing_auto": _register_processors,
}


class _RegisterAfterImport(MetaPathFinder):
    """Import hook that calls the function registered for a module right after the module has run."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _WAITING else None
        if spec is None or spec.loader is None:
            return None
        run_module = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run_module(module)
            if (function := _WAITING.pop(fullname, None)) is not None:
                function(module)

        spec.loader.exec_module = exec_module
        return spec


@dataclass(frozen=True)
class _NotImported:
    """A class of this package that is imported on lookup."""

    name: str
    wrap: Callable[[type], Any]

    def load(self) -> Any:
        return self.wrap(getattr(import_module("spa3r"), self.name))


class _Classes(UserDict):
    """Classes for the lookup of Auto classes, like transformers' dictionary for types of other packages."""

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        return value.load() if isinstance(value, _NotImported) else value


def _extend(mapping: Any, names: dict[Any, str], wrap: Callable[[type], Any] = lambda found: found) -> None:
    """Add class names to a mapping of transformers, like the ``register`` method of an Auto class."""
    mapping._extra_content = _Classes(mapping._extra_content)
    for key, name in names.items():
        mapping.register(key, _NotImported(name, wrap), exist_ok=True)


def _configs() -> tuple[type, type, type, type]:
    from spa3r.models.depth_anything_3.configuration_depth_anything_3 import DepthAnything3Config
    from spa3r.models.spa3_vlm.configuration_spa3_vlm import Spa3VLMConfig
    from spa3r.models.spa3r.configuration_spa3r import Spa3RConfig
    from spa3r.models.vggt.configuration_vggt import VggtConfig

    return VggtConfig, DepthAnything3Config, Spa3RConfig, Spa3VLMConfig
