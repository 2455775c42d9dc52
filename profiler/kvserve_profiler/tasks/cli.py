"""``kvserve bench tasks``: what strategies cost in right answers."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvserve_api.errors import KVServeError, SpecError
from kvserve_profiler.bench_options import bundle_option, model_option, strategy_option

if TYPE_CHECKING:
    from kvserve_profiler.codec_bench_rows import Subject
    from kvserve_profiler.tasks.bench import Outcome
    from kvserve_profiler.tasks.items import TaskSet
    from kvserve_strategies.bundle import Bundle


def read_task(name: str, items: int) -> "TaskSet":
    """Return a built-in task, or that of a file.

    Raises:
        SpecError: It is neither, or the file holds no items.
    """
    from kvserve_profiler.tasks.builtin import NAMES, task_set
    from kvserve_profiler.tasks.sources import read_items

    if name in NAMES:
        return task_set(name, items=items)
    try:
        task = read_items(Path(name), "--task")
    except SpecError as error:
        raise SpecError("--task", f"{error.problem}; built in: {', '.join(NAMES)}") from error
    return task.first(items)


def run(
    model_folder: Path,
    tasks: "dict[str, TaskSet]",
    subjects: "list[Subject]",
    bundle: "Bundle | None",
    *,
    confidence_percent: float,
) -> "list[tuple[str, Subject, Outcome]]":
    """Measure every strategy on every task; what can't be measured is said and left out.

    Raises:
        SpecError: The model can't be loaded, or does not take a prompt.
        UnsupportedError: It has no plain KV cache.
    """
    import torch

    from kvserve_profiler.codec import Codec
    from kvserve_profiler.model import Model, Source, fingerprint
    from kvserve_profiler.tasks.bench import answer, measure

    torch.set_num_threads(1)
    source = Source(location=str(model_folder))
    model = Model(source)
    mark = fingerprint(source.config())
    rows = []
    for name, task in tasks.items():
        answered = answer(model, task)
        right = sum(one.right for one in answered)
        _say(f"{name}: {right} of {len(answered)} right with the exact cache")
        for subject in subjects:
            try:
                codec = Codec.of(
                    subject.strategy,
                    fingerprint=mark,
                    layout=model.layout,
                    bundle=bundle if subject.calibrated else None,
                )
                outcome = measure(model, codec, answered, confidence_percent=confidence_percent)
            except KVServeError as error:
                _say(f"{subject.label} on {name}: {error}")
                continue
            rows.append((name, subject, outcome))
            _say(f"{name}: {subject.label} done")
    return rows


@click.command()
@model_option
@click.option(
    "--task",
    "names",
    multiple=True,
    default=("retrieval", "last-word"),
    show_default=True,
    metavar="NAME|FILE",
    help="A built-in task, or a file of JSON lines (see docs/profiling.md). Repeatable.",
)
@strategy_option
@bundle_option
@click.option(
    "--items",
    type=click.IntRange(1, 10_000),
    default=64,
    show_default=True,
    help="Most items of each task.",
)
@click.option(
    "--confidence",
    type=click.FloatRange(50, 99.9),
    default=95.0,
    show_default=True,
    help="Level of the one-sided upper limit of the loss, in percent.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
@click.pass_context
def tasks(
    context: click.Context,
    model: Path,
    names: tuple[str, ...],
    strategies: tuple[str, ...],
    bundle_folder: Path | None,
    items: int,
    confidence: float,
    as_json: bool,
) -> None:
    """Measure how many answers compression makes wrong.

    The KV cache of each item's prompt is coded into a blob, as between serving pods; the model then answers with the
    decoded cache. A loss of 100 basis points is one percentage point of the items; its upper limit is what to compare
    with a budget, and few items leave it wide: with 64 items and none lost it is still 406.

    Exit codes: 64 bad input, 66 the model can't be measured, 1 anything else.
    """
    from kvserve_profiler.codec_bench_cli import bundle_of, subjects_of
    from kvserve_profiler.exits import exit_code, last_words

    try:
        subjects = subjects_of(strategies)
        read = {name: read_task(name, items) for name in names}
        bundle = bundle_of(subjects, model, bundle_folder)
        rows = run(model, read, subjects, bundle, confidence_percent=confidence)
    except KVServeError as error:
        click.echo(f"kvserve bench tasks: {last_words(error)}", err=True)
        context.exit(exit_code(error))
    if as_json:
        document = [
            {"task": task, "strategy": subject.label, **outcome.to_json()}
            for task, subject, outcome in rows
        ]
        click.echo(json.dumps(document, indent=2))
    else:
        _print(rows)
    if not rows:
        context.exit(1)


def _print(rows: "list[tuple[str, Subject, Outcome]]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "strategy")
    for heading in ("items", "ratio", "exact %", "compressed %", "lost bp", "at most bp"):
        table.add_column(heading, justify="right")
    for task, subject, outcome in rows:
        score = outcome.score
        table.add_row(
            task,
            subject.label,
            str(score.items),
            f"{outcome.ratio:.2f}",
            f"{100 * score.exact:.1f}",
            f"{100 * score.compressed:.1f}",
            f"{score.loss_bp:.0f}",
            f"{score.loss_upper_bp:.0f}",
        )
    Console().print(table)


def _say(message: str) -> None:
    click.echo(message, err=True)
