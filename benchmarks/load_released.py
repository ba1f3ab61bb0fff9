"""Time and memory of loading the released Spa3-VLM at full size: 5.4 billion parameters, bfloat16, 11 GB.

Writes a sharded `spa3_vlm/` folder of random numbers from the manifest of its keys into a temporary folder, loads it
by name, and deletes it. Memory is what the process holds in addition to before, including the file pages that it maps.
Mapped weights that are not in use may not all be counted: the system reclaims clean pages.

    python benchmarks/load_released.py
"""

import argparse
import json
import math
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
import transformers
from real_size import TEXT, VISION
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig

import spa3r

MANIFEST = Path(__file__).parents[1] / "tests" / "golden" / "released_keys.json"
GIB = 2**30


def write(folder: Path, shard_bytes: int) -> int:
    """Write the folder in its released layout; returns the number of bytes of the weights."""
    shapes = json.loads(MANIFEST.read_text())["spa3_vlm"]["bfloat16"]
    shards: list[list[str]] = [[]]
    size = 0
    for key, shape in shapes.items():
        if size > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += 2 * math.prod(shape)
    index = {"metadata": {"total_size": 2 * sum(map(math.prod, shapes.values()))}, "weight_map": {}}
    noise = torch.empty(2**20, dtype=torch.bfloat16).normal_(std=0.02)
    for number, keys in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for key in keys:
            count = math.prod(shapes[key])
            tensors[key] = noise.repeat(count // len(noise) + 1)[:count].reshape(shapes[key]).contiguous()
        save_file(tensors, folder / name, {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(keys, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    vlm = Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True)
    (folder / "config.json").write_text(json.dumps(vlm.to_dict() | {"use_geometry_encoder": True}))
    return index["metadata"]["total_size"]


class Peak:
    """The peak resident memory of this process inside the block, sampled."""

    def __enter__(self):
        self.process, self.done = psutil.Process(), threading.Event()
        self.before = self.most = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.02):
            self.most = max(self.most, self.process.memory_info().rss)

    def __exit__(self, *error) -> None:
        self.most = max(self.most, self.process.memory_info().rss)
        self.done.set()
        self.thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="Where the temporary folder is made; it takes 11 GB.")
    parser.add_argument("--shard-gib", type=float, default=1.0, help="Size of a shard; writing holds one in memory.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        folder = Path(root) / "spa3_vlm"
        folder.mkdir()
        start = time.perf_counter()
        size = write(folder, int(args.shard_gib * GIB))
        written = time.perf_counter() - start
        with Peak() as peak:
            start = time.perf_counter()
            model = spa3r.Spa3VLM.from_pretrained(root)
            loaded = time.perf_counter() - start
            start = time.perf_counter()
            checksum = sum(parameter.sum(dtype=torch.float32).item() for parameter in model.parameters())
            read = time.perf_counter() - start
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
        print(f"written: {size / GIB:.2f} GiB in {len(list(folder.glob('*.safetensors')))} shards, {written:.0f} s")
        print(f"loaded: {count / 1e9:.2f} billion parameters, {weights / GIB:.2f} GiB; from_pretrained {loaded:.1f} s")
        print(f"every weight read once: {read:.1f} s (finite: {math.isfinite(checksum)})")
        above = (peak.most - peak.before - weights) / GIB
        print(f"peak memory, weights included: {(peak.most - peak.before) / GIB:.2f} GiB")
        print(f"above the weights: {above:.2f} GiB")


if __name__ == "__main__":
    main()
