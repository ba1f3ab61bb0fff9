"""Configuration of a Spa3-VLM. Imports no torch."""

from typing import Any, Literal

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from spa3r.models.configuration_base import (
    check_foreign_sizes,
    checked,
    count,
    make_foreign,
    make_part,
    number,
    submodel,
)
from spa3r.models.spa3r.configuration_spa3r import Spa3RConfig


@checked
class Spa3VLMConfig(PreTrainedConfig):
    """Configuration of a :class:`~spa3r.Spa3VLMForConditionalGeneration`: of its VLM, its Spa3R and its adapter.

    Args:
        vlm_config: Configuration of any vision-language model of transformers, or its fields with ``model_type``.
            None: Qwen2.5-VL's defaults.
        spa3r_config: Configuration of the Spa3R, or its fields.
        integration: How the scene is integrated. ``"cross_attention"``: the scene's image tokens attend to its spatial
            tokens, and the result is added to them. ``"append"``, the paper's ablation: the projected spatial tokens
            are added to the prompt, right after the scene's last picture.
        spatial_source: Source of a scene's spatial tokens. ``"spa3r"``: Spa3R's L latents of width D. ``"backbone"``:
            the backbone's last-layer features of all patches of all views. ``"none"``: no spatial tokens; the model is
            the VLM alone, without Spa3R and adapter.
        adapter_num_attention_heads: Number of heads of the adapter's cross-attention; must divide the language model's
            width. None: the language model's number. Unused with ``"append"``.
        spatial_token_id: With ``"append"``: id of the token that marks the places of spatial tokens in ``input_ids``,
            the processor's ``spatial_token_id``. None: the VLM's padding token.
        initializer_range: Standard deviation of the truncated normal initialization of the adapter.

    Raises:
        ValueError: A value has the wrong type or is out of range, the VLM's fields don't name a family, the number of
            heads doesn't divide its width, or there is nothing to append.
    """

    model_type = "spa3_vlm"
    sub_configs = {"vlm_config": AutoConfig, "spa3r_config": Spa3RConfig}

    vlm_config: PreTrainedConfig | Any = submodel()
    spa3r_config: Spa3RConfig | Any = submodel()
    integration: Literal["cross_attention", "append"] = "cross_attention"
    spatial_source: Literal["spa3r", "backbone", "none"] = "spa3r"
    adapter_num_attention_heads: int | None = count(None)
    spatial_token_id: int | None = count(None, lowest=0, highest=2**31 - 1)
    initializer_range: float | int = number(0.02, 0, 1)

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vlm_config is None:
            self.vlm_config = {"model_type": "qwen2_5_vl"}
        if isinstance(self.vlm_config, dict):
            self.vlm_config = make_foreign("vlm_config", self.vlm_config)
        check_foreign_sizes("vlm_config", self.vlm_config)
        self.spa3r_config = make_part("spa3r_config", self.spa3r_config, Spa3RConfig)
        text = self.vlm_config.get_text_config()
        if self.adapter_num_attention_heads is None:
            self.adapter_num_attention_heads = text.num_attention_heads
        attends = self.integration == "cross_attention" and self.spatial_source != "none"
        if attends and text.hidden_size % self.adapter_num_attention_heads:
            raise ValueError(
                f"`adapter_num_attention_heads` must divide the language model's width {text.hidden_size}, got "
                f"{self.adapter_num_attention_heads}."
            )
        if self.spatial_token_id is not None and self.spatial_token_id >= text.vocab_size:
            raise ValueError(
                f"`spatial_token_id` must be below the VLM's vocabulary of {text.vocab_size}, got "
                f"{self.spatial_token_id}. Take `processor.spatial_token_id`."
            )
        if self.integration == "append" and self.spatial_source == "none":
            raise ValueError(
                "`integration='append'` must have tokens to append, got `spatial_source='none'`. Choose 'spa3r' or "
                "'backbone', or leave `integration` out: the VLM alone has none."
            )
        # Weights that the VLM ties are tied inside `vlm`; there is nothing to tie at this level.
        kwargs.pop("tie_word_embeddings", None)
        for choice in ("attn_implementation", "experts_implementation"):
            kwargs.setdefault(choice, {})  # None would undo the sub-configurations' choice that a loaded model uses
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Like transformers' ``from_dict``; files that name the backbone ``"vggt"`` are read as well."""
        if config_dict.get("spatial_source") == "vggt":
            config_dict = config_dict | {"spatial_source": "backbone"}
        return super().from_dict(config_dict, **kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The language model's configuration."""
        return self.vlm_config.get_text_config(*args, **kwargs)

    @property
    def spatial_hidden_size(self) -> int:
        """Width of a spatial token before projection: D of ``"spa3r"``, that of the features of ``"backbone"``."""
        spa3r = self.spa3r_config
        return spa3r.hidden_size if self.spatial_source == "spa3r" else spa3r.geometry_hidden_size

    @property
    def spatial_tokens(self) -> int | Literal["patches"] | None:
        """Number of tokens appended to a scene, for :class:`~spa3r.Spa3VLMProcessor`: a number, or one per patch of its
        views; None: none."""
        if self.integration != "append":
            return None
        return self.spa3r_config.num_latents if self.spatial_source == "spa3r" else "patches"


__all__ = ["Spa3VLMConfig"]
