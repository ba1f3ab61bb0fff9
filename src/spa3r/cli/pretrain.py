"""``spa3r pretrain``: train by a configuration file."""

from __future__ import annotations

import typer

from spa3r.cli.training import ConfigFile, Fresh, finish, train
from spa3r.console import AsJson, Verbose, reporting


def pretrain(
    context: typer.Context,
    config: ConfigFile,
    fresh: Fresh = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Pretrain a Spa3R by a configuration file, or resume a run that was stopped."""
    with reporting(as_json, verbose, resumable=True) as report:
        from spa3r.training import PretrainingConfig
        from spa3r.training import pretrain as run_pretraining

        settings = PretrainingConfig.from_yaml(config, context.args)
        result = train(report, settings, run_pretraining, fresh)
        text = f"Of the held-out scenes: {result.held_out_skipped}" if result.held_out_skipped.entries() else ""
        finish(
            report,
            result,
            text,
            pictures=result.skipped.pictures_tried,
            skipped_pictures=result.skipped.pictures_bad,
            held_out_skipped=result.held_out_skipped.entries(),
        )
