"""``spa3r finetune``: train by a configuration file."""

from __future__ import annotations

import typer

from spa3r.cli.training import ConfigFile, Fresh, finish, train
from spa3r.console import AsJson, Verbose, reporting


def finetune(
    context: typer.Context,
    config: ConfigFile,
    fresh: Fresh = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune a VLM with Spa3R on instructions by a configuration file, or resume a run that was stopped."""
    with reporting(as_json, verbose, resumable=True) as report:
        from spa3r.training import FinetuningConfig
        from spa3r.training import finetune as run_finetuning

        result = train(report, FinetuningConfig.from_yaml(config, context.args), run_finetuning, fresh)
        finish(
            report,
            result,
            rows=result.skipped.scenes_tried,
            skipped_rows=result.skipped.scenes_bad,
            parameters=result.parameters,
        )
