"""What every geometry backbone's configuration has. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING
from transformers.configuration_utils import PreTrainedConfig

from spa3r.checks import is_count, shorten
from spa3r.models.configuration_base import MAX_WIDTH, make_part


class BackboneConfig(PreTrainedConfig):
    """Base class of the configurations of geometry backbones (:doc:`/guides/backbones`).

    A subclass has the fields ``patch_size``, ``image_size``, ``hidden_size``, ``num_attention_heads``,
    ``num_hidden_layers``, ``heads`` and, for a dense head, ``dpt_layers``, ``dpt_channels`` and ``dpt_features``.

    Attributes:
        known_heads: Heads that a model of this type may have, as ``heads`` names them.
        metric_depth: Whether depth and camera positions are in meters.
    """

    known_heads = ("camera", "depth", "point")
    metric_depth = False

    if TYPE_CHECKING:
        patch_size: int
        image_size: int
        hidden_size: int
        num_attention_heads: int
        num_hidden_layers: int
        heads: list[str] | tuple[str, ...]
        dpt_layers: list[int] | tuple[int, ...]
        dpt_channels: list[int] | tuple[int, ...]
        dpt_features: int

    @property
    def feature_size(self) -> int:
        """Width of a token of the output, and so of a patch's features."""
        raise NotImplementedError

    @property
    def num_special_tokens(self) -> int:
        """Number of tokens before the patches of a view; the first is the camera token."""
        raise NotImplementedError

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        unknown = sorted(set(self.heads) - set(self.known_heads))
        if unknown:
            known = [repr(head) for head in self.known_heads]
            raise ValueError(f"`heads` may hold {', '.join(known[:-1])} and {known[-1]}, got {shorten(unknown)}.")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"`image_size` must be a multiple of `patch_size` = {self.patch_size}, got {self.image_size}."
            )
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                "`hidden_size` must be a multiple of 4 x `num_attention_heads` = "
                f"{4 * self.num_attention_heads} (rotary encoding in two dimensions), got {self.hidden_size}."
            )
        if self.has_dense_head:
            self._check_dense_head()

    @property
    def has_dense_head(self) -> bool:
        """Whether the model has a head that predicts a value for every pixel."""
        return bool({"depth", "point"} & set(self.heads))

    def _check_dense_head(self) -> None:
        if len(self.dpt_layers) != 4 or len(self.dpt_channels) != 4:
            raise ValueError(
                "`dpt_layers` and `dpt_channels` must have four entries each, got "
                f"{list(self.dpt_layers)} and {list(self.dpt_channels)}."
            )
        if not all(0 <= layer < self.num_hidden_layers for layer in self.dpt_layers):
            raise ValueError(
                f"`dpt_layers` must be below `num_hidden_layers` = {self.num_hidden_layers}, got "
                f"{list(self.dpt_layers)}."
            )
        if not all(is_count(width, 4, MAX_WIDTH) and width % 4 == 0 for width in self.dpt_channels):
            raise ValueError(
                f"`dpt_channels` must be multiples of 4 from 4 to {MAX_WIDTH} (sines and cosines of two "
                f"coordinates), got {list(self.dpt_channels)}."
            )
        if self.dpt_features % 8:
            raise ValueError(
                "`dpt_features` must be a multiple of 8 (half of them hold sines and cosines of two coordinates), "
                f"got {self.dpt_features}."
            )

    def _estimated_parameters(self, layers: float, mlp_ratio: float) -> float:
        """Approximate number of parameters: a number of layers, the patch embedding and the dense heads."""
        dense = 60 * max(*self.dpt_channels, self.dpt_features) ** 2 if self.has_dense_head else 0
        grid = (self.image_size // self.patch_size) ** 2
        width = self.hidden_size
        return layers * (4 + 2 * mlp_ratio) * width**2 + (grid + 3 * self.patch_size**2) * width + dense


def make_backbone(name: str, given: dict[str, Any] | PreTrainedConfig | None) -> BackboneConfig:
    """The configuration of a backbone of any type.

    Args:
        name: Name of our field, for errors.
        given: The configuration, or its fields, of which ``model_type`` names the type; without one, a VGGT's.

    Raises:
        ValueError: The configuration belongs to a model that is no backbone, or a field is invalid.
    """
    if isinstance(given, BackboneConfig):
        return given
    fields = given if isinstance(given, dict) else {}
    kind = given.model_type if isinstance(given, PreTrainedConfig) else fields.get("model_type", "vggt")
    part = CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in CONFIG_MAPPING else None
    if isinstance(given, PreTrainedConfig) or part is None or not issubclass(part, BackboneConfig):
        raise ValueError(
            f"`{name}` must be the configuration of a geometry backbone (a BackboneConfig) or its fields, got those of "
            f"a model of type {shorten(kind)}."
        )
    return make_part(name, fields, part)


__all__ = ["BackboneConfig", "make_backbone"]
