"""Where a model's weights are: on a device, or offloaded, which leaves a tensor without data (``meta``) in the module.

Offloading is accelerate's: a hook on each module fetches the weights when the module's ``forward`` runs. What calls a
method of a module other than ``forward``, or reads a weight, has to ask for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import Tensor, nn


def _align_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights of the module, or of one inside it, are kept elsewhere while it does not run."""
    return any(hook.offload for part in module.modules() for hook in _align_hooks(part))


def execution_device(module: nn.Module) -> torch.device:
    """Where the module computes, so where its inputs go; that its weights are offloaded makes no difference.

    Args:
        module: Of several devices, the first counts. ``meta`` only if there are no weights at all.
    """
    for part in module.modules():
        for hook in _align_hooks(part):
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
        for parameter in part.parameters(recurse=False):
            if parameter.device.type != "meta":
                return parameter.device
    return torch.device("cpu" if next(module.parameters(), None) is None else "meta")


@contextmanager
def weights_at_hand(module: nn.Module) -> Iterator[None]:
    """While it lasts, the module's own parameters (not those of modules inside it) hold their data.

    For calls of methods other than ``forward``.
    """
    with ExitStack() as stack:
        for hook in _align_hooks(module):
            if hook.offload:
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        yield


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """As ``state_dict``, with the data of offloaded weights, each read when it is asked for by accelerate."""
    state = model.state_dict()
    for path, module in model.named_modules():
        for hook in _align_hooks(module):
            if not hook.offload or hook.weights_map is None:
                continue
            for name in (*module._parameters, *module._buffers):
                key = f"{path}.{name}" if path else name
                if key in state and state[key].device.type == "meta":
                    state[key] = hook.weights_map[name]
    return state
