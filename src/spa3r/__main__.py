"""``python -m spa3r``: the command line where its script is not on the path."""

from spa3r.cli.main import app

app()
