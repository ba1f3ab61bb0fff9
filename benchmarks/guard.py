"""Compares the ratios of a new run with the committed tables, and names those that got worse. Run it by hand.

Benchmarks write tables with ``--json FILE``. Only ratios are compared, since times depend on the machine: columns that
end with "ratio" or "/ floor", where lower is better. A table is known by its title, a row by its texts and whole
numbers. The exit status is 1 if a ratio is worse than the committed one by more than the tolerance.

    python benchmarks/processor.py --json new.json
    python benchmarks/guard.py new.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 0.15
"""Share by which a ratio may grow. On a busy machine ratios vary by more, so repeat a run before you act on it."""

Tables = dict[str, dict[str, Any]]


def read(files: list[Path]) -> Tables:
    """The tables of several files, by title."""
    tables: Tables = {}
    for file in files:
        tables |= json.loads(file.read_text())
    return tables


def ratios(table: dict[str, Any]) -> dict[tuple[str, str], float]:
    """The ratios of a table, by row and column."""
    found = {}
    for row in table["rows"]:
        name = ", ".join(
            value if isinstance(value, str) else f"{key} {value}"
            for key, value in row.items()
            if isinstance(value, str | int)
        )
        for column, value in row.items():
            if column.endswith(("ratio", "/ floor")) and isinstance(value, float):
                found[name, column] = value
    return found


def compare(new: Tables, known: Tables, tolerance: float) -> tuple[int, list[str], list[str]]:
    """How many ratios were compared, lines about what got worse, and about what is in one of the two only."""
    count, worse, unknown = 0, [], []
    for title, table in new.items():
        if title not in known:
            unknown.append(f"{title}: no committed table has this title")
            continue
        before = ratios(known[title])
        for place, value in ratios(table).items():
            told = f"{title}: {place[0]}: {place[1]}"
            if place not in before:
                unknown.append(f"{told}: not in the committed table")
                continue
            count += 1
            if value > before[place] * (1 + tolerance):
                change = 100 * (value / before[place] - 1)
                worse.append(f"{told}: {before[place]:.3g} -> {value:.3g} ({change:+.0f} %)")
        missing = before.keys() - ratios(table).keys()
        unknown += [f"{title}: {row}: {column}: not in the new run" for row, column in sorted(missing)]
    return count, worse, unknown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("new", type=Path, nargs="+", help="files that benchmarks wrote with --json")
    parser.add_argument("--known", type=Path, nargs="+", help="files to compare with; default: the committed ones")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="share by which a ratio may grow")
    args = parser.parse_args()
    new, known = read(args.new), read(args.known or sorted(RESULTS.glob("*.json")))
    compared, worse, unknown = compare(new, known, args.tolerance)
    for line in unknown:
        print(f"not compared: {line}")
    for line in worse:
        print(f"worse: {line}")
    print(f"{compared} ratios compared, {len(worse)} worse by more than {100 * args.tolerance:.0f} %")
    sys.exit(1 if worse or not compared else 0)


if __name__ == "__main__":
    main()
