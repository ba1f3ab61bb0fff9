"""Configuration of a Spa3-VLM. Imports no torch."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from spa3r.models.spa3r.configuration_spa3r import Spa3RConfig


@strict
class Spa3VLMConfig(PreTrainedConfig):
    """Configuration of a :class:`~spa3r.Spa3VLMForConditionalGeneration`: a VLM's, a Spa3R's and the adapter's.

    Args:
        vlm_config: Configuration of any vision-language model of transformers, or its fields with ``model_type``.
            None: Qwen2.5-VL's defaults.
        spa3r_config: Configuration of the Spa3R, or its fields.
        adapter_num_attention_heads: Heads of the adapter's cross-attention; they divide the language model's width.
            None: as many as the language model has.
        initializer_range: Standard deviation of the truncated normal initialisation of the adapter.

    Raises:
        ValueError: The VLM's fields don't name a family, or the heads don't divide its width.
    """

    model_type = "spa3_vlm"
    sub_configs = {"vlm_config": AutoConfig, "spa3r_config": Spa3RConfig}

    vlm_config: dict[str, Any] | PreTrainedConfig | None = None
    spa3r_config: dict[str, Any] | PreTrainedConfig | None = None
    adapter_num_attention_heads: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.vlm_config is None:
            self.vlm_config = {"model_type": "qwen2_5_vl"}
        if isinstance(self.vlm_config, dict):
            fields = dict(self.vlm_config)
            if "model_type" not in fields:
                raise ValueError("`vlm_config` must name its family, as in {'model_type': 'qwen2_5_vl', ...}.")
            self.vlm_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        if self.spa3r_config is None:
            self.spa3r_config = Spa3RConfig()
        elif isinstance(self.spa3r_config, dict):
            self.spa3r_config = Spa3RConfig(**self.spa3r_config)
        text = self.vlm_config.get_text_config()
        if self.adapter_num_attention_heads is None:
            self.adapter_num_attention_heads = text.num_attention_heads
        if text.hidden_size % self.adapter_num_attention_heads:
            raise ValueError(
                f"`adapter_num_attention_heads` must divide the language model's width {text.hidden_size}, got "
                f"{self.adapter_num_attention_heads}."
            )
        # What the heads of the VLM tie is tied inside `vlm`; there is nothing to tie at this level.
        kwargs.pop("tie_word_embeddings", None)
        for choice in ("attn_implementation", "experts_implementation"):
            kwargs.setdefault(choice, {})  # None would undo the choice of sub-configurations that a live model uses
        super().__post_init__(**kwargs)

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The language model's configuration."""
        return self.vlm_config.get_text_config(*args, **kwargs)


__all__ = ["Spa3VLMConfig"]
