"""Configuration of the geometry backbone. Imports no torch."""

from typing import Any, Literal

from spa3r.models.configuration_backbone import BackboneConfig
from spa3r.models.configuration_base import MAX_LAYERS, check_parameters, checked, count, number


@checked
class VggtConfig(BackboneConfig):
    """Configuration of a :class:`~spa3r.VggtModel`. The defaults are those of VGGT-1B.

    Args:
        patch_size: Side of a patch in pixels, p.
        image_size: Side in pixels of the square picture that the learned position embedding's patch grid belongs to.
        hidden_size: Width C; the aggregated features are 2C wide.
        num_attention_heads: Number of attention heads of the aggregator's layers.
        num_hidden_layers: Number of pairs of one frame and one global layer.
        mlp_ratio: Ratio of every MLP's inner width to its width.
        num_register_tokens: Number of register tokens of a view, in the patch embedding and in the aggregator.
        patch_embedding_num_layers: Number of layers of the DINOv2 patch embedding.
        patch_embedding_num_heads: Number of attention heads of the patch embedding.
        rope_theta: Base of the rotary position encoding.
        global_qk_norm: Norm of queries and keys in the global layers. VGGT uses ``"layer_norm"``; the released Spa3R
            uses ``"rms_norm"``. Frame layers always use layer norm.
        global_attention: What the global layers compute. ``"full"``: attention across all views, as trained. The others
            approximate it for many views (:doc:`/guides/attention`): ``"merged"`` merges similar keys and values,
            ``"subset"`` lets each view attend to some views.
        global_merge_ratio: For ``"merged"``: share of the patches of all views but the first that are merged into
            others, in [0, 1].
        global_num_views: For ``"subset"``: number of views that each view attends to: itself, the first, and the most
            similar ones.
        layer_scale_init: Initial value of the layer scales.
        heads: Prediction heads of the model.
        camera_num_layers: Number of layers of the camera head's trunk.
        camera_num_heads: Number of attention heads of the camera head, at width 2C.
        camera_num_iterations: Number of pose refinements.
        dpt_layers: Indices of the four layers that the depth and point heads use.
        dpt_channels: Channels of these layers before fusion.
        dpt_features: Channels of the fusion.
        initializer_range: Standard deviation of the truncated normal initialization.

    Raises:
        ValueError: A value has the wrong type or is out of range, or the sizes contradict each other.
    """

    model_type = "vggt"

    patch_size: int = count(14, highest=256)
    image_size: int = count(518)
    hidden_size: int = count(1024)
    num_attention_heads: int = count(16)
    num_hidden_layers: int = count(24, highest=MAX_LAYERS)
    mlp_ratio: float | int = number(4, 0, 64, above=True)
    num_register_tokens: int = count(4, lowest=0, highest=1024)
    patch_embedding_num_layers: int = count(24, highest=MAX_LAYERS)
    patch_embedding_num_heads: int = count(16)
    rope_theta: float | int = number(100.0, 0, 1e12, above=True)
    global_qk_norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    global_attention: Literal["full", "merged", "subset"] = "full"
    global_merge_ratio: float | int = number(0.75, 0, 1)
    global_num_views: int = count(16, lowest=2)
    layer_scale_init: float | int = number(0.01, 0, 100)
    heads: list[str] | tuple[str, ...] = ("camera", "depth", "point")
    camera_num_layers: int = count(4, highest=MAX_LAYERS)
    camera_num_heads: int = count(16)
    camera_num_iterations: int = count(4, highest=64)
    dpt_layers: list[int] | tuple[int, ...] = (4, 11, 17, 23)
    dpt_channels: list[int] | tuple[int, ...] = (256, 512, 1024, 1024)
    dpt_features: int = count(256, lowest=8)
    initializer_range: float | int = number(0.02, 0, 1)

    @property
    def feature_size(self) -> int:
        """2C: the outputs of a frame layer and a global layer, concatenated."""
        return 2 * self.hidden_size

    @property
    def num_special_tokens(self) -> int:
        """The camera token and the registers."""
        return 1 + self.num_register_tokens

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name, width in (
            ("patch_embedding_num_heads", self.hidden_size),
            ("camera_num_heads", 2 * self.hidden_size),
        ):
            if width % getattr(self, name):
                raise ValueError(f"`{name}` must divide the width {width} of its layers, got {getattr(self, name)}.")
        layers = self.patch_embedding_num_layers + 2 * self.num_hidden_layers
        layers += 4 * self.camera_num_layers * ("camera" in self.heads)  # twice as wide
        check_parameters(self, self._estimated_parameters(layers, self.mlp_ratio))


__all__ = ["VggtConfig"]
