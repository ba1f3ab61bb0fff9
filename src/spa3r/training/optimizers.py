"""Muon for the matrices of transformer layers and AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spa3r.models.spa3_vlm.modeling_spa3_vlm import Spa3VLMAdapter, Spa3VLMAppendAdapter


def layer_matrices(model: nn.Module) -> list[Tensor]:
    """The weights of linear layers inside layer lists and adapters, each (out, in), trained or not."""
    layers = (
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList | Spa3VLMAdapter | Spa3VLMAppendAdapter)
    )
    linear = (module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear))
    return list({id(module.weight): module.weight for module in linear}.values())


class MuonAndAdamW(torch.optim.Optimizer):
    """PyTorch's Muon on some matrices and its AdamW on all other parameters.

    Muon replaces the momentum of a matrix by the nearest matrix whose singular values are all 1 (K. Jordan et al.,
    "Muon: an optimizer for hidden layers in neural networks", 2024).

    Args:
        groups: Parameter groups, as for any optimizer.
        matrices: The matrices that Muon trains, each (out, in); matrices that are in no group are ignored.
        lr: Learning rate of AdamW, for groups without their own.
        muon_lr: Learning rate of Muon; it is scaled in proportion for groups with their own learning rate.
        **options: Other options of AdamW.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        matrices: Iterable[Tensor],
        lr: float = 1e-3,
        muon_lr: float = 0.02,
        **options: Any,
    ):
        chosen, of_muon, of_adamw = {id(matrix) for matrix in matrices}, [], []
        for group in groups:
            rate = group.get("lr", lr)
            for part, is_part, part_rate in ((of_muon, True, rate / lr * muon_lr), (of_adamw, False, rate)):
                members = [one for one in group["params"] if (id(one) in chosen) is is_part]
                if members:
                    part.append(group | {"params": members, "lr": part_rate})
        self._parts: list[torch.optim.Optimizer] = []
        if of_adamw:  # first, so that logs show its learning rate
            self._parts.append(torch.optim.AdamW(of_adamw, lr=lr, **options))
        if of_muon:
            self._parts.append(torch.optim.Muon(of_muon, lr=muon_lr))
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Share groups and states with the two inner optimizers, which do the work."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in any optimizer."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As in any optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


__all__ = ["MuonAndAdamW"]
