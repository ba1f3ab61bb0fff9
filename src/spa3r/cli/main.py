"""The command line, ``spa3r``: its commands, each in a file of this folder.

Standard output carries the result alone, as text or with ``--json`` as one JSON object; progress, notes and errors go
to standard error. torch and the models are imported inside the commands, so that ``--help`` does not wait for them.
"""

from __future__ import annotations

from typing import Annotated

import typer

from spa3r import __version__
from spa3r.cli.app import web_demo
from spa3r.cli.ask import ask
from spa3r.cli.convert import convert
from spa3r.cli.demo import demo
from spa3r.cli.encode import encode
from spa3r.cli.eval import eval_app
from spa3r.cli.export import export
from spa3r.cli.finetune import finetune
from spa3r.cli.info import info
from spa3r.cli.merge import merge
from spa3r.cli.pretrain import pretrain
from spa3r.cli.serve import serve

ANY_KEY = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": True}
"""Settings of commands that take `--section.key value`."""

app = typer.Typer(
    name="spa3r",
    help="Spatial representations from unposed photos, and vision-language models that see space.",
    epilog="Without --model a small embedded model runs, trained on rendered rooms only.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(eval_app, name="eval")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"spa3r {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    pass


app.command(no_args_is_help=True)(ask)
app.command("app")(web_demo)
app.command()(serve)
app.command(no_args_is_help=True)(encode)
app.command(no_args_is_help=True)(convert)
app.command(no_args_is_help=True)(merge)
app.command(no_args_is_help=True)(export)
app.command(
    no_args_is_help=True,
    context_settings=ANY_KEY,
    epilog="Any key of the file can be changed: --training.max_steps 1000 --data.sources.0.root photos",
)(pretrain)
app.command(
    no_args_is_help=True,
    context_settings=ANY_KEY,
    epilog="Any key of the file can be changed: --training.policy lora --data.max_length 4096",
)(finetune)
app.command()(info)
app.command()(demo)
