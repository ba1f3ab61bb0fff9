"""Imported modules and CPU seconds of `import spa3r` and of the help of the command line.

Every row uses new interpreters; times are medians, of CPU time (user and system, of the whole process) and of wall
time. The first run of a row may read files from disk; the others read them from the page cache.

    python benchmarks/imports.py
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata

COMMAND = """import sys
sys.argv = ["spa3r", {}]
from spa3r.cli.main import app
try:
    app()
except SystemExit:
    pass
"""
ROWS = {
    "python": "",
    "from transformers import PreTrainedConfig": "from transformers import PreTrainedConfig",
    "import spa3r": "import spa3r",
    "both": "from transformers import PreTrainedConfig\nimport spa3r",
    "spa3r --version": COMMAND.format("'--version'"),
    "spa3r --help": COMMAND.format("'--help'"),
    "spa3r ask --help": COMMAND.format("'ask', '--help'"),
    "spa3r eval vsi-bench --help": COMMAND.format("'eval', 'vsi-bench', '--help'"),
    "spa3r eva (a typo)": COMMAND.format("'eva'"),
}
COUNT = "\nimport sys\nprint(len(sys.modules), 'torch' in sys.modules, file=sys.stderr)"


def run(code: str) -> tuple[float, float, str]:
    """CPU seconds, wall seconds, and the last line of standard error."""
    before, start = os.times(), time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code + COUNT], capture_output=True, text=True)
    wall, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, wall, out.stderr.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "typer"))
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {versions}")
    print(f"{'':42}  modules  torch  CPU s, first  CPU s, median  wall s, median")
    for name, code in ROWS.items():
        runs = [run(code) for _ in range(args.repeats)]
        modules, torch = runs[-1][2].split()
        cpu, wall = (statistics.median(values) for values in list(zip(*runs))[:2])
        print(f"{name:42}  {modules:>7}  {torch:>5}  {runs[0][0]:12.2f}  {cpu:13.2f}  {wall:14.2f}")


if __name__ == "__main__":
    main()
