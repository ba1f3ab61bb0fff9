"""The processes of a distributed run, as ``accelerate launch`` or ``torchrun`` start them."""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


def is_alone() -> bool:
    """Whether this process is the only one."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def processes() -> PartialState:
    """The state of all processes. Each waits for the others until their last scene is done, for days if necessary."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


def end_processes() -> None:
    """Destroy the process group of a distributed run, if there is one."""
    import torch

    if torch.distributed.is_initialized():
        gc.collect()  # a referenced group keeps its threads alive after the interpreter's end, which may abort
        torch.distributed.destroy_process_group()
