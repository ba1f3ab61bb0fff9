"""``python -m spa3r``: the command line for environments where its script is not on the path."""

from spa3r.cli import run

run()
