"""Runs the command line in this process."""

import json
import re

from typer.testing import CliRunner

from spa3r.cli.main import app


def run(*arguments, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments, code: int = 0) -> dict:
    """The one JSON object on standard output; anything else there is an error."""
    return json.loads(run(*arguments, "--json", code=code).stdout)


def said(result) -> str:
    """Standard error without the frames and breaks of usage errors."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())
