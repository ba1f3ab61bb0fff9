"""Import and load time of a Spa3R from the page cache, against loading all tensors into a model that was built before.

Every run is a new interpreter. ``reference`` builds the model with random weights, reads all tensors of the file into
memory and copies them into the model. Afterwards every weight is read once in both rows, since mapped files are read
on first use. The floor of loading is that of copying the file's bytes, at the measured rate. Times are CPU seconds on
one thread, medians; peak memory is the process's.

    python benchmarks/load.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import GIB, bandwidth, machine, report
from encode import make_config

from spa3r import Spa3RModel

CHILD = """
import json, resource, sys, time

def cpu():
    return time.process_time()

folder, how = sys.argv[1:]
start = cpu()
import torch
from spa3r import Spa3RModel
torch.set_num_threads(1)
imported = cpu()
if how == "spa3r":
    model = Spa3RModel.from_pretrained(folder)
else:
    from safetensors.torch import load_file
    from spa3r import Spa3RConfig
    model = Spa3RModel(Spa3RConfig.from_pretrained(folder)).eval()
    model.load_state_dict(load_file(folder + "/model.safetensors"))
loaded = cpu()
total = sum(p.sum().item() for p in model.parameters())
read = cpu()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"import": imported - start, "load": loaded - imported, "read": read - loaded, "peak": peak,
                  "sum": total}))
"""


def run(folder: str, how: str) -> dict[str, float]:
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, folder, how],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if out.returncode:
        raise SystemExit(out.stderr[-2000:])
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="layers of each stack of the model")
    parser.add_argument("--width", type=int, help="width of the backbone; default: the full one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rate = bandwidth("cpu")
    print(machine())
    print(f"copying: {rate / 1e9:.1f} GB read and written a CPU second")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Spa3RModel(make_config(args.layers, args.width)).save_pretrained(folder, max_shard_size="100GB")
        size = Path(folder, "model.safetensors").stat().st_size
        runs: dict[str, list[dict[str, float]]] = {"reference": [], "spa3r": []}
        for _ in range(args.repeats):
            for how, own in runs.items():
                own.append(run(folder, how))
    if len({round(values["sum"], 3) for own in runs.values() for values in own}) > 1:
        raise SystemExit("the weights of the library and of the reference differ")
    floor = 2 * size / rate
    rows, plain = [], 0.0
    for how, own in runs.items():
        values = {key: statistics.median(line[key] for line in own) for key in own[0]}
        time = values["load"] + values["read"]
        plain = plain or time
        rows.append(
            {
                "": how,
                "import s": values["import"],
                "load s": values["load"],
                "read s": values["read"],
                "peak GiB": values["peak"] / GIB,
                "load and read ratio": time / plain,
                "load and read / floor": time / floor,
            }
        )
    report(f"a Spa3R of {size / GIB:.2f} GiB, from the page cache", rows, args.json)


if __name__ == "__main__":
    main()
