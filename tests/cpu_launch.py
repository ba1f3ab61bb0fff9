"""`spa3r` in processes for which accelerate takes the CPU for an accelerator.

accelerate turns FSDP and DeepSpeed on where there is an accelerator, and trains with DDP, or alone, on a CPU. PyTorch's
FSDP2 and DeepSpeed themselves run on a CPU too, with gloo; launched through this file, they do.
"""

import os
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import training_args

from spa3r.cli.main import app

PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))
training_args.is_torch_bf16_gpu_available = lambda: True  # the CPU has bfloat16

if __name__ == "__main__":
    try:
        app()
    except SystemExit as end:
        # A device mesh keeps gloo's threads for good, and those abort a process whose interpreter ends at a bad moment.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)
