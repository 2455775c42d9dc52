"""The options that all `kvserve bench` commands share."""

from pathlib import Path

import click

model_option = click.option(
    "--model",
    required=True,
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path, resolve_path=True),
    help="Folder of the model, as transformers and vLLM load it.",
)
strategy_option = click.option(
    "--strategy",
    "strategies",
    multiple=True,
    metavar="NAME|FILE",
    help="A preset's name, or a file with a strategy's JSON. Repeatable; by default all presets.",
)
bundle_option = click.option(
    "--bundle",
    "bundle_folder",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path, resolve_path=True),
    help="Calibration bundle of the model, as `kvserve calibrate` writes it. Without it, and if a "
    "strategy needs one, the model is calibrated first, once.",
)
