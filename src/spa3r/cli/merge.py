"""``spa3r merge``: merge low-rank updates into a Spa3-VLM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spa3r.console import AsJson, Verbose, reporting


def merge(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="Folder of a run with low-rank updates, or a checkpoint; or an adapter's hub id."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Merge low-rank updates (LoRA) into the language model: a whole Spa3-VLM with its processor."""
    with reporting(as_json, verbose) as report:
        from spa3r.conversion import save_together
        from spa3r.training import merge_lora

        if output.is_dir() and any(output.iterdir()):
            raise ValueError(f"`OUT` must be a new or an empty folder, and {output} holds files. Give another.")
        with report.status(f"Merging {run}"):
            model, processor = merge_lora(run)
            save_together(output, model, processor)
        report.finish(f"{output}: the Spa3-VLM of {run}, merged", run=run, output=str(output))
