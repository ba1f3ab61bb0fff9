"""``spa3r convert``: write a released checkpoint in the layout of this package."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from spa3r.console import AsJson, Verbose, reporting
from spa3r.media.files import read_text


class Kind(StrEnum):
    vggt = "vggt"
    depth_anything_3 = "depth-anything-3"
    spa3r = "spa3r"
    spa3_vlm = "spa3-vlm"


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="File or folder of VGGT-1B or Depth Anything 3, spa3r.ckpt, or the spa3_vlm folder."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    kind: Annotated[Kind, typer.Option(help="What the source is.")],
    config: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help="Fields of the configuration that the tensors don't determine: JSON, or a JSON file."
        ),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Convert a released research checkpoint into a folder that from_pretrained and --model take."""
    with reporting(as_json, verbose) as report:
        from spa3r import convert_checkpoint

        fields = _read_config(config) if config is not None else None
        with report.status(f"Converting {source}"):
            convert_checkpoint(source, output, kind.value, fields)
        files = sorted(str(file.relative_to(output)) for file in output.rglob("*") if file.is_file())
        report.finish(
            f"{output}: {', '.join(files)}", source=str(source), output=str(output), kind=kind.value, files=files
        )


def _read_config(text: str) -> dict[str, Any]:
    """A JSON object, given as such or in a file."""
    try:
        fields = json.loads(text if text.lstrip()[:1] in ("{", "[") else read_text(text))
    except (OSError, ValueError) as error:
        raise ValueError(f"`--config` must be a JSON object or a file of one, got {text}: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"`--config` must be a JSON object or a file of one, got {text}: no object.")
    return fields
