"""Where a model's weights are: on a device, or offloaded, which leaves a tensor without data (``meta``) in the module.

Offloading is done by accelerate: a hook on each module loads the weights when the module's ``forward`` runs. Code that
calls another method of a module, or reads a weight, has to load them explicitly.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import Tensor, nn


def _align_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights of the module, or of a submodule, are offloaded while it is not running."""
    return any(hook.offload for part in module.modules() for hook in _align_hooks(part))


def execution_device(module: nn.Module) -> torch.device:
    """The device of the module's computation and of its inputs, even if its weights are offloaded.

    Args:
        module: A module; on several devices, the first counts. ``meta`` only if there are no weights at all.
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
def loaded_weights(module: nn.Module) -> Generator[None]:
    """Context manager: the module's own parameters (not those of submodules) hold their data.

    For calls of methods other than ``forward``.
    """
    with ExitStack() as stack:
        for hook in _align_hooks(module):
            if hook.offload:
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        yield


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Like ``state_dict``, with the data of offloaded weights, each loaded by accelerate on access."""
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
