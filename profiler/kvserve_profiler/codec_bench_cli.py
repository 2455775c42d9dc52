"""``kvserve bench``: measurements that anyone can repeat on their own model."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvserve_api.errors import KVServeError, SpecError, StrategyError
from kvserve_api.strategy import MAX_JSON_BYTES, StrategyConfig
from kvserve_profiler.bench_options import bundle_option, model_option, strategy_option
from kvserve_profiler.tasks.cli import tasks

if TYPE_CHECKING:
    from kvserve_profiler.codec_bench import CodecBench
    from kvserve_profiler.codec_bench_rows import Row, Subject
    from kvserve_profiler.settings import Settings
    from kvserve_profiler.texts import Text
    from kvserve_strategies.bundle import Bundle

for _package in ("torch", "transformers"):
    # the command line tells from this which extra is missing, without importing what takes seconds
    if importlib.util.find_spec(_package) is None:
        raise ModuleNotFoundError(f"No module named {_package!r}", name=_package)


@click.group()
def bench() -> None:
    """Measure what KVServe does, on your own model and texts."""


bench.add_command(tasks)


@bench.command()
@model_option
@click.option(
    "--text",
    "texts",
    required=True,
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="UTF-8 text whose beginning is measured. Repeatable.",
)
@strategy_option
@bundle_option
@click.option(
    "--prefix",
    type=click.IntRange(16, 1_048_576),
    default=1024,
    show_default=True,
    help="Tokens whose KV cache is coded.",
)
@click.option(
    "--continuation",
    type=click.IntRange(8, 65_536),
    default=256,
    show_default=True,
    help="Tokens after them that are predicted with it.",
)
@click.option(
    "--windows",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Successive stretches of prefix and continuation to measure of each text, if it has them.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="How often encoding and decoding are timed; the best counts.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Threads of the model; codecs are always timed on one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.pass_context
def codec(
    context: click.Context,
    model: Path,
    texts: tuple[Path, ...],
    strategies: tuple[str, ...],
    bundle_folder: Path | None,
    prefix: int,
    continuation: int,
    windows: int,
    repeats: int,
    threads: int,
    as_json: bool,
) -> None:
    """Measure ratio, loss and speed of compression strategies.

    The KV cache of each text's beginning is coded into blobs, as between serving pods, with headers and checksums;
    the model then reads on with the decoded cache. The loss is the divergence of its predictions from those with the
    exact cache, computed in float32. Speed is that of one thread, in native megabytes a second of its processor time.

    Exit codes: 64 bad input, 66 the model can't be measured, 1 anything else.
    """
    # torch and transformers take seconds to import: --help and the other commands do without
    from kvserve_profiler.codec_bench_tables import tables
    from kvserve_profiler.exits import exit_code, last_words
    from kvserve_profiler.settings import Settings
    from kvserve_profiler.texts import Text

    try:
        subjects = subjects_of(strategies)
        read = named_texts([(path, Text.read(path, f"--text {path}")) for path in texts])
        settings = Settings(
            prefix_tokens=prefix,
            continuation_tokens=continuation,
            max_windows=windows,
            cost_repeats=repeats,
            threads=threads,
        )
        bundle = bundle_of(subjects, model, bundle_folder)
        bench = _bench(model, settings, bundle)
        about_s = bench.estimate_s(len(read), len(subjects))
        _say(f"{len(subjects)} strategies on {len(read)} texts: about {_duration(about_s)}")
        rows = _rows(bench, subjects, read)
    except KVServeError as error:
        click.echo(f"kvserve bench codec: {last_words(error)}", err=True)
        context.exit(exit_code(error))
    if as_json:
        click.echo(json.dumps([row.to_json() for row in rows], indent=2))
    else:
        from rich.console import Console

        for table in tables(rows, subjects):
            Console().print(table)
    if not rows:
        context.exit(1)


def subjects_of(names: Sequence[str]) -> "list[Subject]":
    """Return the strategies that options name; all presets if there are none.

    Raises:
        StrategyError: A name is no preset and no file, or the file holds no strategy.
    """
    from kvserve_profiler.codec_bench_rows import Subject
    from kvserve_strategies import PRESETS

    subjects = []
    for name in names or tuple(PRESETS):
        if name in PRESETS:
            subjects.append(Subject(label=name, preset=name, strategy=PRESETS[name]))
            continue
        path = Path(name)
        if not path.is_file():
            raise StrategyError(
                "--strategy", f"{name!r} is no file and no preset; presets: {', '.join(PRESETS)}"
            )
        subjects.append(Subject(label=path.stem, preset="", strategy=read_strategy(path)))
    return subjects


def read_strategy(path: Path) -> StrategyConfig:
    """Read a strategy's JSON.

    Raises:
        StrategyError: The file is unreadable, too large, no JSON, or no strategy that can work.
    """
    from kvserve_strategies import Pipeline

    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise StrategyError("--strategy", f"{path} has more than {MAX_JSON_BYTES} bytes")
        document = json.loads(data)
    except OSError as error:
        raise StrategyError("--strategy", f"can't read {path}: {error.strerror}") from error
    except ValueError as error:
        raise StrategyError("--strategy", f"{path} is not JSON: {error}") from error
    config = StrategyConfig.from_json(document)
    Pipeline.of(config)
    return config


def named_texts(texts: "Sequence[tuple[Path, Text]]") -> "dict[str, Text]":
    """Return texts by the names of their files, with as much of the path as tells them apart.

    Raises:
        SpecError: A file is given twice.
    """
    paths = [path for path, _ in texts]
    if len({path.resolve() for path in paths}) < len(paths):
        raise SpecError("--text", "the same file is given twice")
    plain = [path.name for path in paths]
    names = [str(p) if plain.count(p.name) > 1 else p.name for p in paths]
    return {name: text for name, (_, text) in zip(names, texts, strict=True)}


def bundle_of(subjects: "Sequence[Subject]", model: Path, folder: Path | None) -> "Bundle | None":
    """Return the bundle that strategies need, if one does."""
    if not any(subject.calibrated for subject in subjects):
        return None
    from kvserve_profiler.codec_bench_bundle import calibrated_folder
    from kvserve_strategies.bundle import Bundle

    strategies = [subject.strategy for subject in subjects]
    return Bundle.open(folder or calibrated_folder(model, strategies, _say))


def _bench(folder: Path, settings: "Settings", bundle: "Bundle | None") -> "CodecBench":
    from kvserve_profiler.codec_bench import CodecBench
    from kvserve_profiler.model import Model, Source, fingerprint

    source = Source(location=str(folder))
    return CodecBench(
        Model(source), settings, fingerprint=fingerprint(source.config()), bundle=bundle
    )


def _rows(
    bench: "CodecBench", subjects: "Sequence[Subject]", texts: "dict[str, Text]"
) -> "list[Row]":
    """Measure everything; what can't be measured is said and left out."""
    from kvserve_profiler.exits import last_words

    rows = []
    for name, text in texts.items():
        passages = bench.prepare("\n".join(text.documents), name)
        for subject in subjects:
            try:
                rows.append(bench.measure(subject, passages, name))
            except KVServeError as error:
                _say(f"{subject.label} on {name}: {last_words(error)}")
        _say(f"{name}: done")
    return rows


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _say(message: str) -> None:
    click.echo(message, err=True)
