"""Packed attention compared with padding and a dense mask: the time of one call, as ratios within one run.

``padded`` is a batch without packing: every scene padded to the longest, a boolean mask, one SDPA call.

    python benchmarks/packed_attention.py
"""

import platform
import statistics
import time
from types import SimpleNamespace

import torch

import spa3r  # noqa: F401  (registers the "xformers" back end)
from spa3r.models.attention import Segments, packed_attention, why_unusable

HEADS, HEAD_DIM, REPEATS = 12, 64, 15
SCENES = {
    "3 ragged scenes": (2 * 140, 5 * 252, 7 * 196),
    "8 equal views": (260,) * 8,
    "1 long, 7 short": (1500, *(150,) * 7),
}


def padded(query, key, value, lengths):
    """The dense way: pad, mask, one call, unpad."""
    longest = max(lengths)
    inputs = [
        torch.nn.utils.rnn.pad_sequence(tensor.split(lengths), batch_first=True).transpose(1, 2)
        for tensor in (query, key, value)
    ]
    places = torch.arange(longest, device=query.device)
    mask = (places[None] < torch.tensor(lengths, device=query.device)[:, None])[:, None, None]
    output = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask.expand(-1, 1, longest, -1))
    return torch.cat([scene[:, :length].transpose(0, 1) for scene, length in zip(output, lengths)])


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    names = [name for name in ("sdpa", "eager", "xformers", "flash_attention_2") if not why_unusable(name)]
    if device == "cpu":
        names.remove("xformers")  # it uses the same path as sdpa there
    where = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    print(f"{where}; torch {torch.__version__}; {HEADS} heads of {HEAD_DIM}; {dtype}; medians of {REPEATS}")
    print(f"{'tokens':<18}{'back end':<20}{'time / padded':>14}{'max error':>12}")
    for label, lengths in SCENES.items():
        query, key, value = torch.randn(3, sum(lengths), HEADS, HEAD_DIM, device=device, dtype=dtype)
        calls = {"padded": lambda: padded(query, key, value, lengths)}  # noqa: B023
        for name in names:
            module = SimpleNamespace(config=SimpleNamespace(_attn_implementation=name), is_causal=False)
            calls[name] = lambda module=module: packed_attention(module, query, key, value, Segments.within(lengths))  # noqa: B023
        seconds = {name: [] for name in calls}
        for _ in range(REPEATS + 1):  # in turn, so that a drift of the machine affects all equally
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
        reference = calls["padded"]()
        for name in names:
            ratio = statistics.median(seconds[name][1:]) / statistics.median(seconds["padded"][1:])
            error = (calls[name]() - reference).abs().max().item()
            print(f"{label:<18}{name:<20}{ratio:>14.2f}{error:>12.1e}")


if __name__ == "__main__":
    main()
