"""What a Spa3-VLM and its encoded scenes need of a VLM of transformers: image tokens, keywords, supported families."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput, TransformersKwargs

from spa3r.checks import shorten
from spa3r.models.placement import loaded_weights

UNSUPPORTED_FAMILIES = {
    "blip-2": "its generate takes pixels only",
    "fuyu": "its forward reads raw patch embeddings",
    "granite4_vision": "its image tokens enter between layers",
    "hunyuan_vl": "the positions of a row depend on the pictures of the rows before it",
    "instructblip": "its generate takes pixels only",
    "instructblipvideo": "it takes videos only",
    "llama4": "it projects image features inside its forward",
    "video_llava": "its pictures are not called `pixel_values`",
}
"""Families that accept ``mm_encoder_outputs``, and whose answers would be wrong."""

TESTED_FAMILIES = frozenset(
    {
        *("aya_vision", "cohere2_vision", "deepseek_vl", "deepseek_vl_hybrid", "ernie4_5_vl_moe", "exaone4_5"),
        *("fast_vlm", "gemma3", "gemma3n", "gemma4", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "idefics2"),
        *("idefics3", "internvl", "janus", "kimi_k25", "lfm2_vl", "lighton_ocr", "llava", "llava_next"),
        *("llava_next_video", "llava_onevision", "minicpmv4_6", "minicpmv4_7", "minimax_m3_vl", "mistral3", "molmo2"),
        *("ovis2", "paddleocr_vl", "paligemma", "perception_lm", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl"),
        *("qwen3_5", "qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "step3p7"),
        *("video_llama_3", "vipllava"),
    }
)
"""Families that the tests run. A model of another one is probed with its first pictures."""


def unsupported(family: str, vlm_class: type | None) -> str | None:
    """Why image tokens can't be passed to a VLM; None if they can.

    Args:
        family: The VLM's ``model_type``.
        vlm_class: The VLM's class; None if transformers has no image-text-to-text model of the family.
    """
    if vlm_class is None:
        return "transformers has no image-text-to-text model of it"
    if "mm_encoder_outputs" not in inspect.signature(getattr(vlm_class, "forward")).parameters:  # noqa: B009
        return "its forward takes no `mm_encoder_outputs`"
    return UNSUPPORTED_FAMILIES.get(family)


def check_vlm(family: str, vlm_class: type | None) -> None:
    """Raise for a VLM whose image tokens can't be fused.

    Args:
        family: The VLM's ``model_type``.
        vlm_class: The VLM's class; None if transformers has no image-text-to-text model of the family.

    Raises:
        ValueError: The family is unsupported; the message gives the reason.
    """
    if reason := unsupported(family, vlm_class):
        raise ValueError(
            f"The VLM family {family!r} can't be combined with a Spa3R: {reason}. Use a family whose fused image "
            "tokens are taken back, such as qwen2_5_vl, qwen3_vl, internvl, llava or gemma3 (the documentation lists "
            "them)."
        )


def vlm_of(model: PreTrainedModel) -> PreTrainedModel:
    """The VLM of a Spa3-VLM; any other model is a VLM itself."""
    return getattr(model, "vlm", model)


def encode_images(vlm: PreTrainedModel, inputs: Mapping[str, Any]) -> ModelOutput:
    """Compute the image tokens of prompts.

    Args:
        vlm: A VLM.
        inputs: ``pixel_values`` and everything else that the processor returned with them.

    Returns:
        The output of ``get_image_features``, which ``mm_encoder_outputs`` takes back; see :func:`image_tokens`.

    Raises:
        ValueError: A tensor that the VLM needs with ``pixel_values`` is missing.
    """
    base: Any = vlm.base_model
    known = inspect.signature(base.get_image_features).parameters
    with loaded_weights(base):
        try:
            return base.get_image_features(**{key: inputs[key] for key in known if key in inputs}, return_dict=True)
        except (TypeError, AttributeError, RuntimeError) as error:
            tensors = [name for name, parameter in known.items() if "Tensor" in str(parameter.annotation)]
            missing = [name for name in tensors if inputs.get(name) is None]
            if not missing or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"`pixel_values` must come with `{'` and `'.join(missing)}`, got None: without, the VLM can't encode "
                f"the pictures ({type(error).__name__}: {shorten(str(error))}). Pass all that the processor returned."
            ) from error


def image_tokens(features: Any) -> list[Tensor]:
    """The image tokens in an output of :func:`encode_images`: (..., h) each, for all pictures or for some of them."""
    tokens = features.pooler_output
    return [tokens] if isinstance(tokens, Tensor) else list(tokens)


# Keywords


def check_keywords(model: PreTrainedModel, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise for keywords that neither a model nor its VLM knows. VLMs pass them on without using them.

    As in transformers, None counts as not given.

    Raises:
        TypeError: A keyword is unknown; the message names similar ones.
    """
    unknown = sorted(str(name) for name, value in given.items() if name not in known and value is not None)
    if unknown:
        near = [word for name in unknown for word in difflib.get_close_matches(name, known, 2)]
        meant = f" Did you mean {' or '.join(f'`{word}`' for word in dict.fromkeys(near))}?" if near else ""
        names = ", ".join(f"`{shorten(name)[1:-1]}`" for name in unknown[:5])
        vlm = vlm_of(model)
        who = f"Neither {type(model).__name__} nor its VLM, {type(vlm).__name__}, takes"
        raise TypeError(
            f"{who if vlm is not model else f'{type(vlm).__name__} does not take'} {names}.{meant} Correct the name, "
            "or leave it out: it would have no effect."
        )


def check_generate_keywords(
    model: PreTrainedModel,
    given: Mapping[str, Any],
    generation_config: GenerationConfig | None,
    own: Collection[str] = (),
) -> None:
    """The same check for ``generate``; transformers itself checks only some keywords, after encoding pictures.

    Args:
        model: A Spa3-VLM or a VLM.
        given: The keywords.
        generation_config: The one of the call, which may have fields of its own.
        own: Keywords that the model takes and its VLM doesn't.

    Raises:
        TypeError: A keyword is unknown.
    """
    if given.get("custom_generate") is not None:  # a custom function has its own arguments
        return
    vlm = vlm_of(model)
    calls: list[Any] = [vlm.generate, GenerationMixin.generate, vlm.prepare_inputs_for_generation]
    settings = vars(GenerationConfig()) | (vars(generation_config) if generation_config is not None else {})
    others = {"tokenizer", "assistant_tokenizer", "trust_remote_code", *own}
    check_keywords(model, given, set().union(*map(_parameters, calls), settings, others, forward_keywords(vlm)))


def forward_keywords(vlm: PreTrainedModel) -> set[str]:
    """Keywords that a VLM's forward takes, including those that its decoder or its loss uses."""
    decoder, base = vlm.get_decoder(), vlm.base_model
    path = [module for module in vlm.modules() if any(part is decoder for part in module.modules())]
    calls: list[Any] = [base.get_image_features, *(module.forward for module in path)]
    recorded = {f"output_{name}" for module in path for name in getattr(module, "_can_record_outputs", None) or ()}
    of_loss = _parameters(vlm.loss_function) - {"logits", "vocab_size"}
    return set().union(*map(_parameters, calls), of_loss, recorded, TransformersKwargs.__optional_keys__, UNSIGNED)


UNSIGNED = {"past_key_values", "return_dict", "use_cache"}
"""Keywords that decorators of transformers remove before a forward, so no signature contains them."""


def _parameters(call: Callable[..., Any]) -> set[str]:
    """Names of a function's parameters, without ``*args`` and ``**kwargs``."""
    return {
        name
        for name, parameter in inspect.signature(call).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
