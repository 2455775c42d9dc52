"""The result of a run as tables for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvserve_api.latency import StageCost
from kvserve_api.profile_set import ParetoSet
from kvserve_profiler.texts import Text
from kvserve_profiler.trials import Phase, Trial, TrialLog

HEADINGS: Final = (
    "in\nset",
    "\nprofile",
    "\nratio",
    "loss\nbp",
    "at most\nbp",
    "same\ntop-1",
    "encode\nMB/s",
    "decode\nMB/s",
)


def results(result: ParetoSet, log: TrialLog, texts: Mapping[str, Text]) -> Iterator[Table]:
    """Yield a table of all strategies that were tried for each workload class.

    Those that were confirmed show what was measured of them then; the others what the search saw.

    Args:
        result: The Pareto set.
        log: The trials it was made of.
        texts: The text of each class.
    """
    for name, text in texts.items():
        table = Table(
            title=f"class {name}", title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False
        )
        for index, heading in enumerate(HEADINGS):
            table.add_column(
                heading,
                justify="left" if index < 2 else "right",
                # names may be long: they take what the numbers leave
                no_wrap=index != 1,
                overflow="fold" if index == 1 else "ellipsis",
            )
        kept = {profile.name: profile for profile in result.profiles(name)}
        tasks = sorted({task for profile in kept.values() for task in profile.tasks})
        for task in tasks:
            table.add_column(f"{task}\n≤ bp", justify="right", no_wrap=True)
        latest = {t.strategy.digest: t for t in log.trials if t.phase != Phase.TASK}
        for trial in sorted(latest.values(), key=lambda t: -_ratio(t, text.digest)):
            cells = _cells(trial, text.digest)
            scores = kept[trial.name].tasks if trial.name in kept else {}
            answers = [f"{scores[t].loss_upper_bp:.0f}" if t in scores else "" for t in tasks]
            blank = [""] * (len(HEADINGS) - 1 - len(cells))
            table.add_row("yes" if trial.name in kept else "", *cells, *blank, *answers)
        yield table


def _ratio(trial: Trial, text: str) -> float:
    return trial.measurement.qualities[text].ratio if trial.measurement else 0.0


def _cells(trial: Trial, text: str) -> tuple[str, ...]:
    if trial.measurement is None:
        return (trial.name, f"failed: {trial.error}")
    quality = trial.measurement.qualities[text]
    native = trial.measurement.native_bytes
    return (
        trial.name,
        f"{quality.ratio:.2f}",
        f"{quality.loss_bp:.1f}",
        f"{quality.loss_upper_bp:.1f}",
        f"{quality.agreement:.1%}",
        _speed(trial.measurement.encode, native),
        _speed(trial.measurement.decode, native),
    )


def _speed(cost: StageCost | None, native_bytes: int) -> str:
    if cost is None:
        return ""
    return f"{native_bytes / cost.seconds(native_bytes) / 1e6:,.0f}"
