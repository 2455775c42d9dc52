"""``kvserve calibrate``: learn a model's KV cache once, for all strategies that need it."""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvserve_api.errors import KVServeError, SpecError, UnsupportedError
from kvserve_api.names import ExitCode

if TYPE_CHECKING:
    from kvserve_strategies.calibration.run import Outcome
    from kvserve_strategies.calibration.windows import Report

for _package in ("torch", "transformers", "safetensors", "obstore"):
    # the command line tells from this which extra is missing, without importing what takes seconds
    if importlib.util.find_spec(_package) is None:
        raise ModuleNotFoundError(f"No module named {_package!r}", name=_package)

DEFAULT_TOKENS = 32_768
"""As `run.DEFAULT_TOKENS`, which takes seconds to import."""


@click.command()
@click.option(
    "--model",
    required=True,
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path, resolve_path=True),
    help="Folder of the model, as transformers and vLLM load it.",
)
@click.option(
    "--out",
    required=True,
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the bundle goes; a new or empty folder.",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text like that of the requests to come. Repeatable: each file has the same weight. Without it, "
    "documentation and source code that every Python has are used.",
)
@click.option("--store", metavar="URL", help="Artifact store to put the bundle into, as well.")
@click.option(
    "--tokens",
    type=click.IntRange(64),
    default=DEFAULT_TOKENS,
    show_default=True,
    help="Tokens to read; wide bases gain from more.",
)
@click.option(
    "--widths",
    metavar="LIST",
    help="Bases to make, like 1x1,1,3,10: layers, or layers x heads, that share a basis (all heads by default). "
    "A whole key, like centred.k.3x0, is taken as it is.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of everything random."
)
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    help="Threads to use; by default one for each processor.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
@click.pass_context
def calibrate(
    context: click.Context,
    model: Path,
    out: Path,
    texts: tuple[Path, ...],
    store: str | None,
    tokens: int,
    widths: str | None,
    seed: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Learn what a model's KV cache looks like, and write it as a bundle for the strategies that need one.

    The same model, texts and options give the same bundle on the same machine. Exit codes: 64 bad input, 66 the model
    can't be calibrated, 1 anything else.
    """
    # torch and transformers take seconds to import: --help and the other commands do without
    import torch

    from kvserve_strategies.artifacts import open_store
    from kvserve_strategies.calibration.run import Order, calibrate_model, parse_widths, read_texts
    from kvserve_strategies.calibration.settings import DEFAULT_KEYS

    place = str(out)
    try:
        artifacts = open_store(store) if store else None
        order = Order(
            model=model,
            texts=read_texts(texts),
            tokens=tokens,
            keys=parse_widths(widths) if widths else DEFAULT_KEYS,
            seed=seed,
            threads=threads or torch.get_num_threads(),
        )
        with _live() as report:
            outcome = calibrate_model(order, out, report)
        if artifacts:
            artifacts.put_bundle(out)
            place = artifacts.url
    except KVServeError as error:
        click.echo(f"kvserve calibrate: {error.reason}: {error}", err=True)
        context.exit(_exit_code(error))
    if as_json:
        click.echo(json.dumps({"place": place} | outcome.to_json(), indent=2))
    else:
        _show(outcome, place)


def _exit_code(error: KVServeError) -> ExitCode:
    match error:
        case SpecError():
            return ExitCode.BAD_INPUT
        case UnsupportedError():
            return ExitCode.UNSUPPORTED
        case _:
            return ExitCode.FAILED


@contextmanager
def _live() -> "Iterator[Report]":
    """Show the progress: a bar for each stage on a terminal, else a line for each quarter of it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
    )

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    rows: dict[str, TaskID] = {}
    quarters: dict[str, int] = {}
    with bar:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in rows:
                rows[stage] = bar.add_task(stage, total=total)
            bar.update(rows[stage], completed=done, total=total)
            quarter = 4 * done // max(total, 1)
            if not console.is_terminal and quarters.get(stage) != quarter:
                quarters[stage] = quarter
                console.print(f"{stage}: {done} of {total}", highlight=False)

        yield report


def _show(outcome: "Outcome", place: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console, tokens = Console(), outcome.manifest.provenance["read_tokens"]
    table = Table(title=f"{tokens:,} tokens, {outcome.seconds:.0f} s")
    table.add_column("file", no_wrap=True)
    for heading in ("groups", "components", "MB"):
        table.add_column(heading, justify="right")
    bases = {f"basis-{key}.safetensors": entry for key, entry in outcome.manifest.bases.items()}
    for name, entry in sorted(outcome.manifest.files.items()):
        basis = bases.get(name)
        table.add_row(
            name,
            str(len(basis.components)) if basis else "",
            f"{sum(basis.components):,}" if basis else "",
            f"{entry.nbytes / 1e6:.1f}",
        )
    console.print(table)
    for note in outcome.notes:
        console.print(note, soft_wrap=True, highlight=False)
    console.print(f"{place}  {outcome.digest}", soft_wrap=True, highlight=False)
