"""Serving a model over HTTP in the form of OpenAI's API (``spa3r serve``), and prompts for engines of vLLM
and SGLang.

The names are imported on first use, so that the server's settings need no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spa3r.serving.sglang import sglang_arguments
    from spa3r.serving.vllm import export_vlm, vllm_messages, vllm_prompt

__all__ = ["export_vlm", "sglang_arguments", "vllm_messages", "vllm_prompt"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'spa3r.serving' has no attribute {name!r}")
    from spa3r.serving import sglang, vllm

    return getattr(sglang if name == "sglang_arguments" else vllm, name)
