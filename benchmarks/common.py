"""What the benchmarks share: the machine in words, time and peak memory of a call, tables and JSON."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from spa3r.tables import Table

GIB = 2**30


def machine(device: str = "cpu") -> str:
    """The device and the versions, in a line."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
        name = f"{model or platform.machine()}, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", "transformers"))
    return f"{name}; Python {platform.python_version()}, {versions}"


def resident_bytes(entry: str = "VmRSS") -> int:
    """Resident memory of this process now, or ``VmHWM``, its peak since the last reset (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status must have {entry}, got none. The benchmarks need Linux.")


@dataclass
class Runs:
    """Wall seconds, CPU seconds and peak bytes above the start, of every run of a call."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    result: Any = None

    def median(self, name: str) -> float:
        return statistics.median(getattr(self, name))


def measure_once(call: Callable[[], Any], device: str, runs: Runs) -> None:
    """Run a call and note its costs. Peak memory is that of the system's or CUDA's own count."""
    runs.result = None
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system, which would hide a peak
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident_bytes()
    cpu, wall = time.process_time(), time.perf_counter()
    runs.result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    runs.wall.append(time.perf_counter() - wall)
    runs.cpu.append(time.process_time() - cpu)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM")
    runs.peak.append(peak - before)


def measure_in_turn(calls: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, Runs]:
    """Run calls in turn, so that a drift of the machine affects all equally."""
    runs = {name: Runs() for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            measure_once(call, device, runs[name])
    return runs


def matrix_rate(device: str, dtype: torch.dtype, size: int | None = None) -> float:
    """Operations a CPU second (wall second on a device) of a matrix product, the best of five.

    `size` is the side of the matrices; by default, one that keeps the device busy.
    """
    size = size or (8192 if device == "cuda" else 2048)
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    rates = []
    for _ in range(5):
        runs = Runs()
        measure_once(lambda: left @ right, device, runs)
        rates.append(2 * size**3 / (runs.wall if device == "cuda" else runs.cpu)[0])
    return max(rates)


def bandwidth(device: str, size: int = 2**27) -> float:
    """Bytes a second that a copy reads and writes, the best of five."""
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    rates = []
    for _ in range(5):
        runs = Runs()
        measure_once(lambda: target.copy_(source), device, runs)
        rates.append(2 * size / (runs.wall if device == "cuda" else runs.cpu)[0])
    return max(rates)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent k of values ~ sizes^k, by least squares on logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(x, y).slope


def report(title: str, rows: list[dict[str, Any]], file: Path | None = None, **facts: Any) -> None:
    """Print a table of rows, and write them with other facts as JSON."""
    print(f"\n{title}")
    print(Table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows]), flush=True)
    if file is not None:
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | {title: {"rows": rows, **facts}}, indent=1) + "\n")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2g}" if 0 < abs(value) < 1e-2 else f"{value:.2f}"
    return str(value)
