"""The result of a run as tables for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvserve_api.latency import StageCost
from kvserve_api.profile_set import ParetoSet
from kvserve_profiler.texts import Text
from kvserve_profiler.trials import Trial, TrialLog

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
    """Yield a table of all trials for each workload class.

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
            table.add_column(heading, justify="left" if index < 2 else "right", no_wrap=True)
        kept = {profile.name for profile in result.profiles(name)}
        for trial in sorted(log.trials, key=lambda t: -_ratio(t, text.digest)):
            table.add_row("yes" if trial.name in kept else "", *_cells(trial, text.digest))
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


def _speed(cost: StageCost, native_bytes: int) -> str:
    return f"{native_bytes / cost.seconds(native_bytes) / 1e6:,.0f}"
