"""What our models share: choice of the attention back end, initialisation, loading that accepts no surprise."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.quantizers import AutoQuantizationConfig
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils.generic import can_return_tuple

from spa3r.checkpoints import resolve
from spa3r.models.attention import check_attention_implementation
from spa3r.models.layers import TransformerLayer
from spa3r.models.model_card import CARD, is_own_card, write_model_card
from spa3r.models.placement import execution_device
from spa3r.models.released import (
    HUB_KWARGS,
    WHERE,
    AdapterHome,
    Kind,
    ReleasedCheckpoint,
    find_adapter,
    find_released,
    quote_keys,
)


def split_hub_kwargs(kwargs: dict[str, Any], config_class: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords for the hub, and those that are fields of a configuration.

    Raises:
        TypeError: A keyword is neither: a configuration would keep it, unheard, and save it.
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


def packed_forward(forward: Callable) -> Callable:
    """Give a `forward` of packed sequences ``return_dict=False``, and refuse what packed sequences don't have."""

    @can_return_tuple
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        for name, reason in UNSUPPORTED_OUTPUTS.items():
            if kwargs.pop(name, None) or getattr(self.config, name, False):
                raise ValueError(f"`{name}` must be left out (or False) with {type(self).__name__}: {reason}.")
        return forward(self, *args, **kwargs)

    return wrapper


UNSUPPORTED_OUTPUTS = {
    "output_attentions": "packed attention never holds its weights",
    "output_hidden_states": (
        "layers of several widths run on packed tokens. `VggtModel(..., output_layers=range(n))` returns every layer's "
        "tokens; forward hooks see the rest"
    ),
}


def without_quantizing(quantization_config: Any, skipped: Sequence[str], model_class: type, config) -> Any:
    """A copy of a quantization's configuration that leaves some modules as they are.

    Args:
        quantization_config: Of transformers, or its fields.
        skipped: Regular expressions, from the start of a module's path.
        model_class: Whose modules: those that transformers itself would skip stay skipped.
        config: Of the model.
    """
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    changed = copy.deepcopy(quantization_config)
    field = next((name for name in SKIP_FIELDS if hasattr(changed, name)), None)
    if field is None:
        raise ValueError(
            f"`quantization_config` must be one that can leave modules out ({', '.join(SKIP_FIELDS)}), got "
            f"{type(changed).__name__}, and {', '.join(map(repr, skipped))} must not be quantized. Use "
            "BitsAndBytesConfig, for example."
        )
    chosen = getattr(changed, field)
    if chosen is None:  # a list of ours replaces transformers' own choice, such as the language model's head
        with torch.device("meta"):
            chosen = get_keys_to_not_convert(model_class(copy.deepcopy(config)))
    setattr(changed, field, [*chosen, *(name for name in skipped if name not in chosen)])
    return changed


SKIP_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
"""What configurations of quantizations call the modules that they leave out."""


def nonfinite_tensors(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the floating-point tensors that hold a NaN or an infinity; of sharded ones, in this process's part."""
    named = [(name, value.detach()) for name, value in named if value.is_floating_point() and not value.is_meta]
    parts = [value.to_local() if hasattr(value, "to_local") else value for _, value in named]
    if not parts:
        return []
    device = parts[0].device
    finite = torch.stack([part.isfinite().all().to(device) for part in parts]).tolist()  # read back once
    return [name for (name, _), is_finite in zip(named, finite) if not is_finite]


def check_finite(model: nn.Module, result: Tensor, what: str, **inputs: Any) -> None:
    """Refuse a result of inference that is not finite, and say why it is not.

    Training looks at its gradients instead, and a compiled graph at nothing.

    Args:
        model: What made the result.
        result: It is read back from the device once.
        what: Its name.
        **inputs: What it was made of; those that are no tensors are passed over.

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
    """Ends the generation of words by a model whose logits are no numbers; they would come out as some word.

    Args:
        model: The model, for the error.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_finite(self.model, only_nan(scores), "logits")
        return scores


def finite_logits(model: nn.Module, others: Iterable[LogitsProcessor] | None = None) -> LogitsProcessorList:
    """:class:`FiniteLogits` before other processors of logits, for ``generate``."""
    return LogitsProcessorList([FiniteLogits(model), *(others or ())])


def only_nan(logits: Tensor) -> Tensor:
    """Logits of 0 but where they are no numbers: minus infinity is that of a word that is ruled out."""
    return torch.where(logits.isnan(), logits, 0)


_CARD_TO_KEEP: ContextVar[bytes | None] = ContextVar("_CARD_TO_KEEP", default=None)
"""The card of the folder that is being saved to."""


class PackedPreTrainedModel(PreTrainedModel):
    """Base of the models whose attention is packed."""

    _skip_quantization: tuple[str, ...] = (".*camera_head",)
    """Modules that no quantization touches, as regular expressions."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _released_kinds: tuple[Kind, ...] = ()
    # Parts that one device has to hold: their positions travel in objects that accelerate's hooks don't look into.
    _no_split_modules = ["TransformerLayer", "VggtModel", "Spa3REncoder", "Spa3RDecoder"]

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Default to xformers where it is installed; refuse an unknown or unusable back end while loading."""
        name = check_attention_implementation(requested_attention)
        return super().get_correct_attn_implementation(name, is_init_check)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers searches the class's own file for its interface; ours is called in attention.py

    @property
    def device(self) -> torch.device:
        """Where the model computes, so where inputs go; also where its weights are offloaded."""
        return execution_device(self)

    def get_input_embeddings(self) -> nn.Module | None:
        """None: patches are projected, there is no table of embeddings. transformers' own raises, and FSDP2 asks."""
        return None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """As transformers' ``from_pretrained``, and strict; ``"embedded"`` names the checkpoint in the package.

        Checkpoints in the layouts of the research code are translated while they are loaded: folders, files and hub
        ids alike (:doc:`/guides/checkpoints`).

        Raises:
            ValueError: The checkpoint is another model's, lacks keys, has keys that the model doesn't know or tensors
                of other shapes, or a file of it can't be read.
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
            if kind != cls.config_class.model_type:  # before a model of default sizes is built
                raise ValueError(
                    f"{source} holds a model of type {kind!r}, and {cls.__name__} loads "
                    f"{cls.config_class.model_type!r}. Load it with its own class (AutoModel finds it); the Spa3R of a "
                    "Spa3-VLM is `Spa3VLM.from_pretrained(...).spa3r`."
                )
        if (quantization := kwargs.get("quantization_config")) is not None:
            config = kwargs.get("config")
            if not isinstance(config, PreTrainedConfig):
                config = cls.config_class.from_pretrained(config or source, **where)
            kwargs["quantization_config"] = without_quantizing(quantization, cls._skip_quantization, cls, config)
        accepts_other_shapes = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            model, info = super().from_pretrained(
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
        for kind, keys in (("lacks", info["missing_keys"]), ("has foreign", info["unexpected_keys"])):
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
            model.config.name_or_path = str(pretrained_model_name_or_path)  # of a released checkpoint
        model._finish_loading({key: kwargs[key] for key in HUB_KWARGS if key in kwargs})
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        """As transformers', once the files are known to be those of the model, which has sizes and no memory yet."""
        if expected_keys is None and not load_config.ignore_mismatched_sizes:  # else an adapter of peft is loaded
            shapes = _shapes(state_dict, checkpoint_files or ())
            if shapes and not load_config.is_quantized:  # quantized weights are packed
                _check_shapes(model, shapes, load_config.pretrained_model_name_or_path)
            # The rest, of keys that transformers renames, is ours to judge once they are renamed.
            load_config = dataclasses.replace(load_config, ignore_mismatched_sizes=True)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    def check_device(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse an input that lies where this model doesn't. Parts that accelerate's hooks place fetch theirs.

        Args:
            name: What the error calls it, without quotes.
            tensor: The input.

        Raises:
            ValueError: With the cure.
        """
        here, there = self.device, tensor.device
        # Weights on the CPU and inputs elsewhere can be right: sharded training offloads weights.
        if here.type in ("meta", there.type) or there.type not in ("cpu", "meta"):
            return
        if tensor.is_meta or not any(hasattr(module, "_hf_hook") for module in self.modules()):
            raise ValueError(
                f"`{name}` must lie on the model's device, {here}, got {there}. Move it with "
                "`inputs = inputs.to(model.device)`."
            )

    @classmethod
    def _from_adapter(cls, source, adapter: AdapterHome, where: dict[str, Any], **kwargs):
        """The base model that a peft checkpoint names, with its updates."""
        if adapter.base is None:
            raise ValueError(
                f"{source} holds an adapter of peft, which names no base model: its run combined a VLM with a Spa3R. "
                "`spa3r merge` makes a whole checkpoint of the folder of such a run."
            )
        kept = {key: kwargs[key] for key in kwargs if key not in ("revision", "subfolder")}
        loaded = cls.from_pretrained(adapter.base, **kept, **adapter.where)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        model.load_adapter(str(source), adapter_kwargs=where)
        model.eval()
        return loaded

    @classmethod
    def _translate_released(cls, released: ReleasedCheckpoint, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of transformers' ``from_pretrained`` that load a released checkpoint: the configuration and the
        tensors in our names.

        Args:
            released: The checkpoint.
            kwargs: What the caller gave; fields of the configuration are taken out.
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
        """The tensors of a released checkpoint in our names, and its configuration with these fields set."""
        raise NotImplementedError

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As transformers' ``save_pretrained``, with a model card (README.md); one that is there is kept."""
        card = Path(save_directory) / CARD
        token = _CARD_TO_KEEP.set(card.read_bytes() if is_own_card(card) else None)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            _CARD_TO_KEEP.reset(token)
        if kwargs.get("is_main_process", True):
            write_model_card(self, save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        """The last step of a push. transformers has written the hub's card, or a template, over the folder's."""
        if (kept := _CARD_TO_KEEP.get()) is not None:
            (Path(working_dir) / CARD).write_bytes(kept)
        write_model_card(self, working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _finish_loading(self, hub_kwargs: dict) -> None:
        """What remains to be done once the checkpoint's tensors are in place."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            if module.weight is not None:
                init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, TransformerLayer) and module.layer_scale_init is not None:
            init.constant_(module.layer_scale1, module.layer_scale_init)
            init.constant_(module.layer_scale2, module.layer_scale_init)


def _shapes(state_dict: Mapping[str, Tensor] | None, files: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a checkpoint by key, from the headers of its files; nothing of files without headers."""
    if state_dict is not None:
        return {key: tuple(value.shape) for key, value in state_dict.items()}
    shapes = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            return {}
        with safe_open(file, framework="pt") as content:
            shapes |= {key: tuple(content.get_slice(key).get_shape()) for key in content.keys()}
    return shapes


def _check_shapes(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], name: str | Path | None) -> None:
    """Refuse a checkpoint of other sizes than the model's before the model gets any memory.

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
    # Tied weights are not tied yet, and some families build them in another size first.
    described = sum(value.numel() for key, value in model.named_parameters() if key not in model.all_tied_weights_keys)
    if described > 2 * held:  # keys are missing, too: which ones is known only when transformers has renamed them
        raise ValueError(
            f"The checkpoint{_told(name)} must hold the {described:,} parameters of the {model_class.__name__} that "
            f"its configuration describes, got {held:,} in {len(shapes)} tensors. The configuration belongs to other "
            "weights, or files are missing: take both from the same place."
        )


def _other_shapes(model_class: type, name: str | Path | None, wrong: Sequence[str]) -> ValueError:
    return ValueError(
        f"The checkpoint{_told(name)} has tensors of other shapes than {model_class.__name__}: {quote_keys(wrong)}. "
        "Its configuration belongs to other weights. Take both from the same place."
    )


def _told(name: str | Path | None) -> str:
    return "" if name is None else f" {name}"


def save_without(save: Callable, model: nn.Module, left_out: Sequence[str], save_directory, **kwargs) -> None:
    """Call `save` (``save_pretrained`` of `model`'s base class) without the parameters below some paths."""
    if left_out:
        state_dict = kwargs.pop("state_dict", None) or model.state_dict()
        prefixes = tuple(f"{path}." for path in left_out)
        kwargs["state_dict"] = {key: value for key, value in state_dict.items() if not key.startswith(prefixes)}
    save(save_directory, **kwargs)


def _unreadable_file(name_or_path) -> str:
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
