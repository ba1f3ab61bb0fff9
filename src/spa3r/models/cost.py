"""What encoding a scene costs: tokens, operations, and memory counted by running the model without data.

Weights, tensors and kernels' outputs are counted; workspaces of kernels and gaps of the allocator are not.
"""

from __future__ import annotations

import copy
import weakref
from bisect import bisect_right
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel

from spa3r.models.layers import TransformerLayer, rows_at_once
from spa3r.models.packing import ViewLayout
from spa3r.models.vggt.configuration_vggt import VggtConfig


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors while it is active: ``live`` now, and ``peak``.

    Works on real tensors, on fake ones and on the meta device.

    Args:
        known: Tensors that exist already and are not counted, such as weights.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor, once, until it is freed."""
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return output

    def _free(self, size: int) -> None:
        self.live -= size


class FusedAttention(TorchFunctionMode):
    """Makes tensors without data take the path that devices take: fused attention kernels, and no pinned memory.

    Without it PyTorch computes attention on such tensors step by step, with all scores in memory.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        if func is nn.functional.scaled_dot_product_attention:
            query, key, value = args[:3]
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)


@dataclass(frozen=True)
class SceneCost:
    """What encoding one scene costs.

    Attributes:
        views: Views of the scene.
        tokens: Tokens of the backbone's global layers.
        operations: Additions and multiplications of all matrix products and attention.
        weights: Bytes of the weights.
        activations: Peak bytes of everything else, the input included.
    """

    views: int
    tokens: int
    operations: int
    weights: int
    activations: int

    @property
    def memory(self) -> int:
        """Peak bytes: weights and activations."""
        return self.weights + self.activations


def scene_cost(model: PreTrainedModel, views: int, grid_hw: tuple[int, int]) -> SceneCost:
    """What ``encode`` costs for one scene of equal views, in the model's dtype; nothing is computed.

    Args:
        model: A Spa3RModel on any device, also the meta device.
        views: Number of views.
        grid_hw: Patch grid (height, width) of a view.
    """
    per_view = model.config.backbone_config.num_special_tokens + grid_hw[0] * grid_hw[1]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    few, many, slope = _growth(model, grid_hw)
    activations = _activations(model, views, grid_hw) if views <= many[0] else few[1] + slope * (views - few[0])
    return SceneCost(views, views * per_view, count_operations(model, views, grid_hw), weights, int(activations))


_GROWTH: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


def _growth(model: PreTrainedModel, grid_hw: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int], float]:
    """Two numbers of views with their activations, and the bytes per view above: memory is linear where chunks of
    tokens are full. Counted once for a model."""
    known = _GROWTH.setdefault(model, {})
    if (key := (model.dtype, grid_hw)) not in known:
        inner = min(layer.intermediate_size for layer in model.modules() if isinstance(layer, TransformerLayer))
        rows = rows_at_once(inner, torch.empty(0, dtype=model.dtype, device="meta"))
        count = -(-2 * rows // (grid_hw[0] * grid_hw[1]))
        few, many = ((views, _activations(model, views, grid_hw)) for views in (count, 2 * count))
        known[key] = few, many, (many[1] - few[1]) / count
    return known[key]


def count_operations(model: PreTrainedModel, views: int, grid_hw: tuple[int, int]) -> int:
    """Operations of ``encode``: from 3 views on a quadratic polynomial of their number, from counts of 3, 4 and 5.

    Fewer views are counted themselves: Depth Anything 3 chooses a reference view from 3 on.
    """
    hollow = _hollow(model, copy.deepcopy(model.config))

    def counted(few: int) -> int:
        with FlopCounterMode(display=False) as counter:
            _encode_nothing(hollow, few, grid_hw)
        return counter.get_total_flops()

    if views < 3:
        return counted(views)
    counts = [counted(few) for few in (3, 4, 5)]
    first, second = counts[1] - counts[0], counts[2] - 2 * counts[1] + counts[0]
    return counts[0] + (views - 3) * first + (views - 3) * (views - 4) // 2 * second


def _activations(model: PreTrainedModel, views: int, grid_hw: tuple[int, int]) -> int:
    """Counted peak bytes of ``encode``, which do not depend on the number of layers: of VGGT, one of each is run."""
    config = copy.deepcopy(model.config)
    config.num_encoder_layers = 1
    if isinstance(config.backbone_config, VggtConfig):
        config.backbone_config.num_hidden_layers = config.backbone_config.patch_embedding_num_layers = 1
    hollow = _hollow(model, config)
    with LiveBytes([*hollow.parameters(), *hollow.buffers()]) as count:
        _encode_nothing(hollow, views, grid_hw, count)
    return count.peak


def _hollow(model: PreTrainedModel, config: PreTrainedConfig) -> Any:
    """A model without data, of the dtype of `model`, with exact attention."""
    config.backbone_name_or_path = None
    config.backbone_config.heads = []
    if isinstance(config.backbone_config, VggtConfig):
        config.backbone_config.global_attention = "full"
    with torch.device("meta"):
        hollow = type(model)(config).to(model.dtype).eval()
    hollow.set_attn_implementation("sdpa")
    return hollow


def _encode_nothing(hollow: Any, views: int, grid_hw: tuple[int, int], count: LiveBytes | None = None) -> None:
    pixels = torch.empty(views * grid_hw[0] * grid_hw[1], 3 * hollow.config.patch_size**2, device="meta")
    if count is not None:
        count.add(pixels)
    with FusedAttention(), torch.no_grad():
        hollow.encode(pixels, [grid_hw] * views, [views])


def largest_scene(model: PreTrainedModel, grid_hw: tuple[int, int], memory: int) -> int:
    """The largest number of views whose cost, weights included, fits into `memory` bytes; 0 if none does."""
    few, _, slope = _growth(model, grid_hw)
    free = memory - sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if free < few[1]:  # chunks are not full here
        return bisect_right(range(1, few[0]), free, key=lambda views: _activations(model, views, grid_hw))
    return int(few[0] + (free - few[1]) / slope)


OUT_OF_MEMORY = ("not enough memory", "out of memory", "can't allocate memory")
"""Words of errors of PyTorch's allocators."""


@contextmanager
def naming_what_fits(model: PreTrainedModel, layout: ViewLayout) -> Generator[None]:
    """Context manager: running out of memory raises an error that names the largest scene that fits.

    Args:
        model: The model whose ``encode`` runs.
        layout: Views of the batch.

    Raises:
        torch.OutOfMemoryError: Memory ran out.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        raise torch.OutOfMemoryError(_advice(model, layout)) from error


def _advice(model: PreTrainedModel, layout: ViewLayout) -> str:
    grid = max(layout.grid_hw, key=lambda grid: grid[0] * grid[1])
    views = max(layout.views_per_scene)
    height, width = (side * model.config.patch_size for side in grid)
    needed, total = scene_cost(model, views, grid).memory, total_memory(model.device)
    fits = largest_scene(model, grid, total)
    text = (
        f"Out of memory on {model.device}: a scene of {views} views of {width} x {height} in "
        f"{str(model.dtype).removeprefix('torch.')} takes {needed / 2**30:.1f} GiB, weights included, of the device's "
        f"{total / 2**30:.1f} GiB. By this count {fits} views fit, if nothing else is on the device."
    )
    if len(layout.views_per_scene) > 1:
        text += f" The batch has {len(layout.views_per_scene)} scenes: encode fewer at once."
    return text + " Use fewer views, smaller ones, or dtype=torch.bfloat16. `spa3r info --views N` prints the cost."


def total_memory(device: torch.device) -> int:
    """Bytes of memory that a device has in total."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return psutil.virtual_memory().total
