"""Base class of our models: selection of the attention back end, initialization, strict loading."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.generic import can_return_tuple
from transformers.utils.loading_report import LoadStateDictInfo

from spa3r.checkpoints import resolve
from spa3r.models.attention import check_attention_implementation
from spa3r.models.layers import TransformerLayer
from spa3r.models.model_card import CARD, is_own_card, log_license, write_model_card
from spa3r.models.placement import execution_device
from spa3r.models.precision import Int8Linear
from spa3r.models.quantization import plain_tensors, saved_keys, without_quantizing
from spa3r.models.released import (
    HUB_KWARGS,
    WHERE,
    AdapterBase,
    Kind,
    ReleasedCheckpoint,
    find_adapter,
    find_released,
    quote_keys,
)


def split_hub_kwargs(
    kwargs: dict[str, Any], config_class: type[PreTrainedConfig]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keywords into those for the hub and fields of a configuration.

    Raises:
        TypeError: A keyword is neither; a configuration would silently keep and save it.
    """
    hub = {key: value for key, value in kwargs.items() if key in HUB_KWARGS}
    fields = {key: value for key, value in kwargs.items() if key not in hub}
    known = {field.name for field in dataclasses.fields(config_class)}
    if unknown := sorted(fields.keys() - known):
        raise TypeError(
            f"Unknown keywords {', '.join(map(repr, unknown))}: wanted fields of {config_class.__name__} or one of "
            f"{', '.join(map(repr, HUB_KWARGS))}. For anything else load the parts yourself and pass the models."
        )
    return hub, fields


Model = TypeVar("Model", bound=PreTrainedModel)
P = ParamSpec("P")
T = TypeVar("T")


def packed_forward(forward: Callable[Concatenate[Model, P], T]) -> Callable[Concatenate[Model, P], T]:
    """Add ``return_dict=False`` to a `forward` of packed sequences, and reject unsupported arguments."""

    @can_return_tuple
    @functools.wraps(forward)
    def wrapper(self: Model, *args: P.args, **kwargs: P.kwargs) -> T:
        for name, reason in UNSUPPORTED_OUTPUTS.items():
            if kwargs.pop(name, None) or getattr(self.config, name, False):
                raise ValueError(f"`{name}` must be left out (or False) with {type(self).__name__}: {reason}.")
        return forward(self, *args, **kwargs)

    return wrapper


UNSUPPORTED_OUTPUTS = {
    "output_attentions": "packed attention doesn't compute attention weights",
    "output_hidden_states": (
        "layers of several widths run on packed tokens. `VggtModel(..., output_layers=range(n))` returns every layer's "
        "tokens; forward hooks see the rest"
    ),
}


def nonfinite_tensors(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of floating-point tensors that contain NaN or infinity; for sharded ones, in this process's shard."""
    named = [
        (name, value.detach())
        for name, value in plain_tensors(named)
        if value.is_floating_point() and not value.is_meta
    ]
    parts = [to_local() if (to_local := getattr(value, "to_local", None)) else value for _, value in named]
    if not parts:
        return []
    device = parts[0].device
    finite = torch.stack([part.isfinite().all().to(device) for part in parts]).tolist()  # a single synchronization
    return [name for (name, _), is_finite in zip(named, finite) if not is_finite]


def check_finite(model: nn.Module, result: Tensor, what: str, **inputs: Any) -> None:
    """Raise if a result of inference is not finite, with the reason.

    Training checks its gradients instead, and compiled graphs are not checked.

    Args:
        model: The model that computed the result.
        result: The result; it is read back from the device once.
        what: Its name.
        **inputs: The inputs; those that are not tensors are ignored.

    Raises:
        ValueError: The result is not finite.
    """
    if model.training or torch.compiler.is_compiling() or result.is_meta or bool(result.isfinite().all()):
        return
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if names := nonfinite_tensors(tensors.items()):
        reason = f"`{names[0]}` holds NaN or infinite values. Check the pictures and whatever else made it"
    elif names := nonfinite_tensors(model.named_parameters()):
        reason = (
            f"weights of the model are not ({quote_keys(names, 3)}): its files are damaged, or its training failed. "
            "Load others"
        )
    else:
        reason = f"a number overflowed in {result.dtype}. Load the model with dtype=torch.bfloat16 or torch.float32"
    raise ValueError(f"The {what} must be finite, and {reason}.")


class FiniteLogits(LogitsProcessor):
    """Raises an error during generation if a model's logits are NaN, which would otherwise select an arbitrary token.

    Args:
        model: The model, for the error.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_finite(self.model, only_nan(scores), "logits")
        return scores


def finite_logits(model: nn.Module, others: Iterable[LogitsProcessor] | None = None) -> LogitsProcessorList:
    """:class:`FiniteLogits`, followed by other logits processors, for ``generate``."""
    return LogitsProcessorList([FiniteLogits(model), *(others or ())])


def only_nan(logits: Tensor) -> Tensor:
    """Zeros where logits are numbers, NaN elsewhere; minus infinity is a valid logit of an excluded token."""
    return torch.where(logits.isnan(), logits, 0)


_CARD_TO_KEEP: ContextVar[bytes | None] = ContextVar("_CARD_TO_KEEP", default=None)
"""The model card that exists in the target folder of a save."""


class PackedPreTrainedModel(PreTrainedModel):
    """Base class of the models with packed attention."""

    config_class: type[PreTrainedConfig]  # ty: ignore[incompatible-mutable-override]  # none of ours lacks it
    _skip_quantization: tuple[str, ...] = (".*camera_head",)
    """Regular expressions of modules that are never quantized."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _released_kinds: tuple[Kind, ...] = ()
    # Modules that must be on one device: their positions are in objects that accelerate's hooks don't inspect.
    _no_split_modules = ["TransformerLayer", "VggtModel", "DepthAnything3Model", "Spa3REncoder", "Spa3RDecoder"]

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Default to xformers if it is installed; reject an unknown or unusable back end when loading."""
        name = check_attention_implementation(requested_attention)
        return super().get_correct_attn_implementation(name, is_init_check)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers searches the source file for its interface; we call it in attention.py

    @property
    def device(self) -> torch.device:
        """The device of the computation and of the inputs, even if weights are offloaded."""
        return execution_device(self)

    def get_input_embeddings(self) -> None:  # ty: ignore[incompatible-method-override]  # FSDP2 accepts None
        """None: patches are projected without an embedding table. FSDP2 calls it; transformers' default raises."""
        return None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Like transformers' ``from_pretrained``, but strict; ``"embedded"`` names the checkpoint in the package.

        Checkpoints in the layouts of the research code are converted on the fly, whether folder, file or hub id
        (:doc:`/guides/checkpoints`).

        Raises:
            ValueError: The checkpoint belongs to another model, lacks keys, has unknown keys or tensors of other
                shapes, or one of its files can't be read.
        """
        pretrained_model_name_or_path = source = resolve(pretrained_model_name_or_path, cls.config_class.model_type)
        where = {key: kwargs[key] for key in WHERE if key in kwargs}
        if source is not None and kwargs.get("state_dict") is None:
            released = find_released(source, cls._released_kinds, cls.__name__, **where)
            if released is not None:
                source, kwargs = None, kwargs | cls._translate_released(released, kwargs)
        if kwargs.get("config") is None and source is not None:
            if (adapter := find_adapter(source, **where)) is not None:
                return cls._from_adapter(source, adapter, where, output_loading_info=output_loading_info, **kwargs)
            kind = PreTrainedConfig.get_config_dict(source, **where)[0].get("model_type")
            if kind != cls.config_class.model_type:  # before building a model of default sizes
                raise ValueError(
                    f"{source} holds a model of type {kind!r}, and {cls.__name__} loads "
                    f"{cls.config_class.model_type!r}. Load it with its own class (AutoModel finds it); the Spa3R of a "
                    "Spa3-VLM is `Spa3VLM.from_pretrained(...).spa3r`."
                )
        if (quantization := kwargs.get("quantization_config")) is not None:
            config = kwargs.get("config")
            if not isinstance(config, PreTrainedConfig):
                config = cls.config_class.from_pretrained(str(config or source), **where)
            kwargs["quantization_config"] = without_quantizing(quantization, cls._skip_quantization, cls, config)
        accepts_other_shapes = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            loaded: Any = super().from_pretrained(
                source,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=accepts_other_shapes,
                **kwargs,
            )
        except SafetensorError as error:
            raise ValueError(
                f"{_unreadable_file(pretrained_model_name_or_path)} can't be read as safetensors ({error}). "
                "It is truncated or damaged: download or convert it again."
            ) from error
        model, info = loaded
        for kind, keys in (("lacks", info["missing_keys"]), ("has unexpected", info["unexpected_keys"])):
            if keys:
                raise ValueError(
                    f"The checkpoint {pretrained_model_name_or_path} {kind} keys of {cls.__name__}: "
                    f"{quote_keys(keys)}. Load it with the class that saved it; research checkpoints are turned into "
                    "ours by `spa3r convert`."
                )
        if info["mismatched_keys"] and not accepts_other_shapes:
            wrong = [f"{key} {tuple(got)}, wanted {tuple(wanted)}" for key, got, wanted in info["mismatched_keys"]]
            raise _other_shapes(cls, pretrained_model_name_or_path, wrong)
        if source is None and pretrained_model_name_or_path is not None:
            model.config.name_or_path = str(pretrained_model_name_or_path)  # the name of a released checkpoint
        model._finish_loading({key: kwargs[key] for key in HUB_KWARGS if key in kwargs})
        log_license(model)
        return loaded if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict | None,
        checkpoint_files: list[str] | None,
        load_config: LoadStateDictConfig,
        expected_keys: list[str] | None = None,
    ) -> tuple[LoadStateDictInfo, dict]:
        """Like transformers' method, after checking the files against the model, whose memory isn't allocated yet."""
        if expected_keys is None and not load_config.ignore_mismatched_sizes:  # else a PEFT adapter is loaded
            shapes = _shapes(state_dict, checkpoint_files or ())
            if shapes and not load_config.is_quantized:  # quantized weights are packed
                _check_shapes(model, shapes, load_config.pretrained_model_name_or_path)
            # Keys that transformers renames are checked after it has renamed them.
            load_config = dataclasses.replace(load_config, ignore_mismatched_sizes=True)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    def check_device(self, name: str, tensor: torch.Tensor) -> None:
        """Raise for an input on another device. Modules with accelerate's hooks move their inputs themselves.

        Args:
            name: Name of the input in the error, without quotes.
            tensor: The input.

        Raises:
            ValueError: The input is on another device.
        """
        here, there = self.device, tensor.device
        # Weights on the CPU with inputs elsewhere are allowed: sharded training offloads weights.
        if here.type in ("meta", there.type) or there.type not in ("cpu", "meta"):
            return
        if tensor.is_meta or not any(hasattr(module, "_hf_hook") for module in self.modules()):
            raise ValueError(
                f"`{name}` must be on the model's device, {here}, got {there}. Move it with "
                "`inputs = inputs.to(model.device)`."
            )

    @classmethod
    def _from_adapter(cls, source: str | Path, adapter: AdapterBase, where: dict[str, Any], **kwargs: Any) -> Self:
        """The base model that a PEFT checkpoint names, with the adapter loaded."""
        if adapter.base is None:
            raise ValueError(
                f"{source} holds a PEFT adapter that doesn't name its base model: its run combined a VLM with a Spa3R. "
                "Merge the folder of that run with `spa3r merge`."
            )
        kept = {key: kwargs[key] for key in kwargs if key not in ("revision", "subfolder")}
        loaded: Any = cls.from_pretrained(adapter.base, **kept, **adapter.where)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        info = model.load_adapter(str(source), adapter_kwargs=where)
        check_adapter_keys(source, cls, info.missing_keys, info.unexpected_keys)
        model.eval()
        return loaded

    @classmethod
    def _translate_released(cls, released: ReleasedCheckpoint, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments for transformers' ``from_pretrained`` that load a released checkpoint: the configuration and the
        tensors in our names.

        Args:
            released: The checkpoint.
            kwargs: The caller's arguments; fields of the configuration are removed from it.
        """
        given = kwargs.pop("config", None)
        if given is not None and not isinstance(given, PreTrainedConfig):
            given = cls.config_class.from_pretrained(given)
        inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
        names = {field.name for field in dataclasses.fields(cls.config_class)} - inherited
        fields = given.to_diff_dict() if given is not None else {}
        fields |= {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        weights, config = cls._from_released(released, fields)
        return {"config": config, "state_dict": weights}

    @classmethod
    def _from_released(
        cls, released: ReleasedCheckpoint, fields: dict[str, Any]
    ) -> tuple[dict[str, torch.Tensor], PreTrainedConfig]:
        """The tensors of a released checkpoint in our names, and its configuration with these fields."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Like transformers' ``save_pretrained``, with a model card (README.md); an existing card is kept.

        Raises:
            ValueError: Layers of the model were replaced by int8 layers, and are to be saved.
        """
        ignored = set(self._keys_to_ignore_on_save or ())
        for path, module in self.named_modules():
            if isinstance(module, Int8Linear) and f"{path}.scales" not in ignored:
                raise ValueError(
                    f"`{path}` holds int8 weights, which only compute on this machine and are not saved. Save the "
                    "model before `use_int8_layers`, or with include_backbone=False."
                )
        card = Path(save_directory) / CARD
        token = _CARD_TO_KEEP.set(card.read_bytes() if is_own_card(card) else None)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            _CARD_TO_KEEP.reset(token)
        if kwargs.get("is_main_process", True):
            write_model_card(self, save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """The last step of a push; transformers has replaced the folder's card by the hub's card or a template."""
        if (kept := _CARD_TO_KEEP.get()) is not None:
            (Path(working_dir) / CARD).write_bytes(kept)
        write_model_card(self, working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _finish_loading(self, hub_kwargs: dict[str, Any]) -> None:
        """Final steps after the checkpoint's tensors are loaded."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            for name, fill in (("weight", init.ones_), ("bias", init.zeros_)):
                if (parameter := getattr(module, name, None)) is not None:
                    fill(parameter)
        elif isinstance(module, TransformerLayer) and module.layer_scale_init is not None:
            for scale in (module.layer_scale1, module.layer_scale2):
                if isinstance(scale, Tensor):
                    init.constant_(scale, module.layer_scale_init)


def _shapes(state_dict: Mapping[str, Tensor] | None, files: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a checkpoint by key, from the headers of its files; files without headers are ignored."""
    if state_dict is not None:
        return {key: tuple(value.shape) for key, value in state_dict.items()}
    shapes = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            return {}
        with safe_open(file, framework="pt") as content:
            shapes |= {key: tuple(content.get_slice(key).get_shape()) for key in content.keys()}
    return shapes


def check_adapter_keys(
    source: str | Path, model_class: type[PreTrainedModel], missing: Iterable[str], unexpected: Iterable[str]
) -> None:
    """Check that a PEFT checkpoint has the keys of the adapter.

    Raises:
        ValueError: Keys are missing or unexpected.
    """
    for kind, keys in (("lacks", sorted(missing)), ("has unexpected", sorted(unexpected))):
        if keys:
            raise ValueError(
                f"The adapter {source} {kind} keys of {model_class.__name__}: {quote_keys(keys)}. It was made for "
                "another model, or its file is damaged: take adapter and base model from the same run."
            )


def _check_shapes(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], name: str | Path | None) -> None:
    """Raise for a checkpoint of other sizes than the model's, before the model's memory is allocated.

    Raises:
        ValueError: A tensor of the same key has another shape, or the model is far larger than all tensors together.
    """
    model_class = type(model)
    wrong = [
        f"{key} {shapes[key]}, wanted {tuple(value.shape)}"
        for key, value in model.state_dict().items()
        if key in shapes and shapes[key] != tuple(value.shape)
    ]
    if wrong:
        raise _other_shapes(model_class, name, wrong)
    held = sum(map(math.prod, shapes.values()))
    # Tied weights are not tied yet, and some families create them in another size first.
    described = sum(value.numel() for key, value in model.named_parameters() if key not in model.all_tied_weights_keys)
    if described > 2 * held:  # keys are missing; which ones is known only after transformers has renamed them
        raise ValueError(
            f"The checkpoint{_named(name)} must hold the {described:,} parameters of the {model_class.__name__} that "
            f"its configuration describes, got {held:,} in {len(shapes)} tensors. The configuration belongs to other "
            "weights, or files are missing: take both from the same place."
        )


def _other_shapes(model_class: type, name: str | Path | None, wrong: Sequence[str]) -> ValueError:
    return ValueError(
        f"The checkpoint{_named(name)} has tensors of other shapes than {model_class.__name__}: {quote_keys(wrong)}. "
        "Its configuration belongs to other weights. Take both from the same place."
    )


def _named(name: str | Path | None) -> str:
    return "" if name is None else f" {name}"


def save_without(save: Callable, model: PreTrainedModel, left_out: Sequence[str], *args: Any, **kwargs: Any) -> None:
    """Call `save` (``save_pretrained`` of `model`'s base class) without the parameters under some paths."""
    if not left_out:
        save(*args, **kwargs)
        return
    keys = saved_keys(model, kwargs.get("state_dict"))
    before, prefixes = model._keys_to_ignore_on_save, tuple(f"{path}." for path in left_out)
    # Not a shorter state dict: transformers makes that of a quantized model itself.
    model._keys_to_ignore_on_save = [*(before or ()), *(key for key in keys if key.startswith(prefixes))]
    if kwargs.get("state_dict") is not None:
        kwargs["state_dict"] = dict(kwargs["state_dict"])  # transformers removes these keys from it
    try:
        save(*args, **kwargs)
    finally:
        model._keys_to_ignore_on_save = before


def _unreadable_file(name_or_path: str | Path | None) -> str:
    """The damaged file of a local checkpoint folder, or the checkpoint's name."""
    if name_or_path is None:
        return "The state dict's file"
    for path in sorted(Path(name_or_path).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return str(path)
    return f"A weights file of {name_or_path}"
