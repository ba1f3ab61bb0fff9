"""Configuration of Depth Anything 3. Imports no torch."""

from typing import Any, Literal

from spa3r.models.configuration_backbone import BackboneConfig
from spa3r.models.configuration_base import MAX_LAYERS, check_parameters, checked, count, number


@checked
class DepthAnything3Config(BackboneConfig):
    """Configuration of a :class:`~spa3r.DepthAnything3Model`. The defaults are those of Depth Anything 3 Base.

    Args:
        patch_size: Side of a patch in pixels, p.
        image_size: Side in pixels of the square picture that the learned position embedding's patch grid belongs to.
        hidden_size: Width C; the features are 2C wide.
        num_attention_heads: Number of attention heads.
        num_hidden_layers: Number of layers.
        intermediate_size: Inner width of every MLP.
        use_gated_mlp: Whether the MLPs are gated (SwiGLU), as in Giant.
        alternating_start: Index of the first layer with q/k norms and rotary encoding. From it on, layers with an odd
            index attend across the views of a scene, all others within each view.
        reference_view: How the reference view of a scene of 3 or more views is chosen, whose camera token differs.
            ``"saddle_balanced"``, the authors' default: the view that is the most ordinary. ``"first"``: the first one.
            Scenes of fewer views use the first one, and views with known cameras need none.
        rope_theta: Base of the rotary position encoding.
        layer_scale_init: Initial value of the layer scales.
        heads: Prediction heads of the model: ``"camera"``, which includes the encoder of known cameras, and
            ``"depth"``.
        camera_encoder_num_layers: Number of layers of the encoder of known cameras.
        camera_encoder_num_heads: Number of attention heads of the encoder of known cameras.
        dpt_layers: Indices of the four layers that the depth head uses.
        dpt_channels: Channels of these layers before fusion.
        dpt_features: Channels of the fusion.
        initializer_range: Standard deviation of the truncated normal initialization.

    Raises:
        ValueError: A value has the wrong type or is out of range, or the sizes contradict each other.
    """

    model_type = "depth_anything_3"
    known_heads = ("camera", "depth")

    patch_size: int = count(14, highest=256)
    image_size: int = count(518)
    hidden_size: int = count(768)
    num_attention_heads: int = count(12)
    num_hidden_layers: int = count(12, highest=MAX_LAYERS)
    intermediate_size: int = count(3072, highest=2**17)
    use_gated_mlp: bool = False
    alternating_start: int = count(4, highest=MAX_LAYERS)
    reference_view: Literal["saddle_balanced", "first"] = "saddle_balanced"
    rope_theta: float | int = number(100.0, 0, 1e12, above=True)
    layer_scale_init: float | int = number(1.0, 0, 100)
    heads: list[str] | tuple[str, ...] = ("camera", "depth")
    camera_encoder_num_layers: int = count(4, highest=MAX_LAYERS)
    camera_encoder_num_heads: int = count(16)
    dpt_layers: list[int] | tuple[int, ...] = (5, 7, 9, 11)
    dpt_channels: list[int] | tuple[int, ...] = (96, 192, 384, 768)
    dpt_features: int = count(128, lowest=8)
    initializer_range: float | int = number(0.02, 0, 1)

    @property
    def feature_size(self) -> int:
        """2C: the outputs of the last frame layer and of the layer itself, concatenated."""
        return 2 * self.hidden_size

    @property
    def num_special_tokens(self) -> int:
        """The camera token, in the place of the cls token."""
        return 1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size % self.camera_encoder_num_heads:
            raise ValueError(
                f"`camera_encoder_num_heads` must divide `hidden_size` = {self.hidden_size}, got "
                f"{self.camera_encoder_num_heads}."
            )
        if self.alternating_start >= self.num_hidden_layers:
            raise ValueError(
                f"`alternating_start` must be below `num_hidden_layers` = {self.num_hidden_layers}, got "
                f"{self.alternating_start}: without layers across views there is no scene."
            )
        ratio = (1.5 if self.use_gated_mlp else 1) * self.intermediate_size / self.hidden_size
        layers = self.num_hidden_layers + self.camera_encoder_num_layers * ("camera" in self.heads)
        check_parameters(self, self._estimated_parameters(layers, ratio))


__all__ = ["DepthAnything3Config"]
