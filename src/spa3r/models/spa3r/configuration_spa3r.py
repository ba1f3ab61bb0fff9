"""Configuration of Spa3R. Imports no torch."""

from typing import Any, Literal, get_args

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from spa3r.models.configuration_backbone import BackboneConfig, make_backbone
from spa3r.models.configuration_base import (
    MAX_LAYERS,
    check_foreign_sizes,
    check_parameters,
    checked,
    count,
    make_foreign,
    number,
    submodel,
)

Target = Literal["geometry", "semantic"]


@checked
class Spa3RConfig(PreTrainedConfig):
    """Configuration of a :class:`~spa3r.Spa3RModel`. The defaults are those of the released model.

    Args:
        backbone_config: Configuration of the frozen geometry backbone, or its fields with ``model_type``: of a
            :class:`~spa3r.VggtModel`, the default, a :class:`~spa3r.DepthAnything3Model`, or one's own
            (:doc:`/guides/backbones`).
        backbone_name_or_path: Source of the frozen backbone's weights if the checkpoint doesn't contain them
            (``save_pretrained(..., include_backbone=False)``). None: the checkpoint contains them.
        semantic_teacher_config: Configuration of the frozen DINOv3 whose features are predicted in pretraining, or its
            fields; only :class:`~spa3r.Spa3RForPreTraining` has the teacher.
        semantic_teacher_name_or_path: Source of the teacher's weights if the checkpoint doesn't contain them.
        semantic_hidden_size: Width of the semantic features.
        hidden_size: Width D of latents, encoder and decoder.
        num_attention_heads: Number of attention heads of encoder and decoder.
        num_encoder_layers: Number of encoder layers.
        num_decoder_layers: Number of decoder layers.
        mlp_ratio: Ratio of every MLP's inner width to its width.
        num_latents: Number of latents of a scene, L.
        num_register_tokens: Number of register tokens of the encoder and of the decoder.
        layer_norm_eps: Epsilon of the LayerNorms.
        rope_theta: Base of the rotary encodings.
        initializer_range: Standard deviation of the truncated normal initialization.
        mask_ratio: Fraction of a scene's views to predict in pretraining, in [0, 1). Context views:
            ``max(1, int(V * (1 - mask_ratio)))``.
        view_masking: How the backbone is kept from leaking target views into the context. ``"asymmetric"``, as in the
            paper: one pass in which context views attend to context views, and target views to all. ``"separate"``, as
            the released weights were trained: one pass over the context, one over all views.
        loss_views: Views that the loss covers: ``"all"`` as in the released code, ``"target"`` as in the paper.
        targets: Features of the field, predicted in pretraining: ``"geometry"``, the backbone's features, and
            ``"semantic"``, the teacher's; one or both, in any order. Other features have no head and no loss, and
            without ``"semantic"`` there is no teacher.
        camera_embedding: How cameras are encoded for the decoder. ``"prope"``: rays in the camera's frame; the
            attention uses projection matrices and a rotary encoding of row and column. ``"pluecker"``: Plücker
            coordinates of each ray in the world frame, that of the scene's first camera
            (:func:`spa3r.models.cameras.pluecker_rays`); the attention uses only the encoder's rotary encoding.

    Raises:
        ValueError: A value has the wrong type or is out of range, or the values contradict each other.
    """

    model_type = "spa3r"
    sub_configs = {"backbone_config": AutoConfig, "semantic_teacher_config": AutoConfig}

    backbone_config: BackboneConfig | Any = submodel()
    backbone_name_or_path: str | None = None
    semantic_teacher_config: PreTrainedConfig | Any = submodel()
    semantic_teacher_name_or_path: str | None = None
    semantic_hidden_size: int = count(1024)
    hidden_size: int = count(768)
    num_attention_heads: int = count(12)
    num_encoder_layers: int = count(6, highest=MAX_LAYERS)
    num_decoder_layers: int = count(6, highest=MAX_LAYERS)
    mlp_ratio: float | int = number(4, 0, 64, above=True)
    num_latents: int = count(256, highest=65536)
    num_register_tokens: int = count(4, lowest=0, highest=1024)
    layer_norm_eps: float | int = number(1e-6, 0, 1, above=True)
    rope_theta: float | int = number(100.0, 0, 1e12, above=True)
    initializer_range: float | int = number(0.02, 0, 1)
    mask_ratio: float | int = 0.5
    view_masking: Literal["asymmetric", "separate"] = "asymmetric"
    loss_views: Literal["all", "target"] = "all"
    targets: list[Target] | tuple[Target, ...] = get_args(Target)
    camera_embedding: Literal["prope", "pluecker"] = "prope"

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone_config = make_backbone("backbone_config", self.backbone_config)
        if isinstance(self.semantic_teacher_config, dict):
            self.semantic_teacher_config = make_foreign(
                "semantic_teacher_config", self.semantic_teacher_config, default_type="dinov3_vit"
            )
        if self.semantic_teacher_config is not None:
            check_foreign_sizes("semantic_teacher_config", self.semantic_teacher_config)
            self.semantic_hidden_size = self.semantic_teacher_config.hidden_size
        for choice in ("attn_implementation", "experts_implementation"):
            kwargs.setdefault(choice, {})  # None would undo the sub-configurations' choice that a loaded model uses
        super().__post_init__(**kwargs)
        if self.hidden_size % (8 * self.num_attention_heads):
            raise ValueError(
                f"`hidden_size` must be a multiple of 8 x `num_attention_heads` = {8 * self.num_attention_heads} "
                f"(projective and rotary encoding share a head), got {self.hidden_size}."
            )
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"`mask_ratio` must be in [0, 1), got {self.mask_ratio}.")
        if not self.targets:
            raise ValueError("`targets` must name at least one of 'geometry' and 'semantic', got none.")
        self.targets = tuple(target for target in get_args(Target) if target in self.targets)
        layer = (4 + 2 * self.mlp_ratio) * self.hidden_size**2
        check_parameters(self, (self.num_encoder_layers + self.num_decoder_layers) * layer)

    @property
    def geometry_hidden_size(self) -> int:
        """Width of the geometry features: those of the backbone's patches."""
        return self.backbone_config.feature_size

    @property
    def patch_size(self) -> int:
        """Side of the backbone's patches in pixels."""
        return self.backbone_config.patch_size


__all__ = ["Spa3RConfig"]
