"""``spa3r export``: write the plain VLM of a Spa3-VLM for vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spa3r.console import AsJson, Verbose, load_saved_vlm, reporting


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id or folder of a Spa3-VLM, or 'embedded', the bundled one.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write the VLM of a Spa3-VLM, without Spa3R, to a folder that vLLM serves. Low-rank updates are merged."""
    with reporting(as_json, verbose) as report:
        from spa3r.serving.vllm import export_vlm

        if output.is_dir() and any(output.iterdir()):
            raise ValueError(f"`OUT` must be a new or an empty folder, and {output} holds files. Give another.")
        with report.status(f"Loading {model}"):
            spa3_vlm, processor = load_saved_vlm(model)
        with report.status("Writing the VLM"):
            export_vlm(spa3_vlm, processor, output)
        family = spa3_vlm.vlm.config.model_type
        report.finish(f"{output}: the VLM of {model} ({family})", model=model, output=str(output), family=family)
