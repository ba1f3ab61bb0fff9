"""Measured time over its floor, of all committed tables: how far each task is from the limit of the machine.

The floor of a table is described in its program: operations over the measured rate of a matrix product, or bytes over
the measured bandwidth of a copy. Nothing is measured here.

    python benchmarks/floors.py
"""

from __future__ import annotations

import argparse

from guard import RESULTS, ratios, read

from spa3r.tables import Table


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = []
    for title, table in read(sorted(RESULTS.glob("*.json"))).items():
        for (row, column), value in ratios(table).items():
            if column.endswith("/ floor") and not row.startswith("reference"):
                rows.append([title, row, f"{value:.2f}"])
    print(Table(["task", "row", "measured / floor"], rows))


if __name__ == "__main__":
    main()
