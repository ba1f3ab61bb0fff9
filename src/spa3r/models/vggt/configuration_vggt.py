"""Configuration of the geometry backbone. Imports no torch."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class VggtConfig(PreTrainedConfig):
    """Sizes and choices of a :class:`~spa3r.VggtModel`. The defaults are VGGT-1B's.

    Args:
        patch_size: Side of a patch in pixels, p.
        image_size: Side in pixels of the square picture whose patch grid the learnt position embedding has.
        hidden_size: Width C; the aggregated features are 2C wide.
        num_attention_heads: Heads of the aggregator's layers.
        num_hidden_layers: Pairs of one frame and one global layer.
        mlp_ratio: Inner width of every MLP over its width.
        num_register_tokens: Register tokens of a view, in the patch embedding and in the aggregator.
        patch_embedding_num_layers: Layers of the DINOv2 patch embedding.
        patch_embedding_num_heads: Its heads.
        rope_theta: Base of the rotary position encoding.
        global_qk_norm: Norm of queries and keys in the global layers. ``"layer_norm"`` is VGGT's; the released Spa3R
            has ``"rms_norm"``. Frame layers always have layer norm.
        layer_scale_init: Initial value of the residual factors.
        heads: Which prediction heads the model has.
        camera_num_layers: Layers of the camera head's trunk.
        camera_num_heads: Its heads, at width 2C.
        camera_num_iterations: Refinements of the pose.
        dpt_layers: Indices of the layers that the depth and point heads read, four of them.
        dpt_channels: Their channels before fusion.
        dpt_features: Channels of the fusion.
        initializer_range: Standard deviation of the truncated normal initialisation.

    Raises:
        ValueError: The sizes contradict one another.
    """

    model_type = "vggt"

    patch_size: int = 14
    image_size: int = 518
    hidden_size: int = 1024
    num_attention_heads: int = 16
    num_hidden_layers: int = 24
    mlp_ratio: float | int = 4
    num_register_tokens: int = 4
    patch_embedding_num_layers: int = 24
    patch_embedding_num_heads: int = 16
    rope_theta: float | int = 100.0
    global_qk_norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    layer_scale_init: float = 0.01
    heads: list[str] | tuple[str, ...] = ("camera", "depth", "point")
    camera_num_layers: int = 4
    camera_num_heads: int = 16
    camera_num_iterations: int = 4
    dpt_layers: list[int] | tuple[int, ...] = (4, 11, 17, 23)
    dpt_channels: list[int] | tuple[int, ...] = (256, 512, 1024, 1024)
    dpt_features: int = 256
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        unknown = sorted(set(self.heads) - {"camera", "depth", "point"})
        if unknown:
            raise ValueError(f"`heads` may hold 'camera', 'depth' and 'point', got {unknown}.")
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                "`hidden_size` must be a multiple of 4 x `num_attention_heads` = "
                f"{4 * self.num_attention_heads} (rotary encoding in two dimensions), got {self.hidden_size}."
            )
        for name, width in (
            ("patch_embedding_num_heads", self.hidden_size),
            ("camera_num_heads", 2 * self.hidden_size),
        ):
            if width % getattr(self, name):
                raise ValueError(f"`{name}` must divide the width {width} of its layers, got {getattr(self, name)}.")
        if {"depth", "point"} & set(self.heads):
            if len(self.dpt_layers) != 4 or len(self.dpt_channels) != 4:
                raise ValueError(
                    "`dpt_layers` and `dpt_channels` must have four entries each, got "
                    f"{list(self.dpt_layers)} and {list(self.dpt_channels)}."
                )
            if max(self.dpt_layers) >= self.num_hidden_layers:
                raise ValueError(
                    f"`dpt_layers` must be below `num_hidden_layers` = {self.num_hidden_layers}, got "
                    f"{list(self.dpt_layers)}."
                )


__all__ = ["VggtConfig"]
