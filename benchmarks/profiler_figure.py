"""Convergence: how much of the front each search has found after how many evaluations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import matplotlib as mpl
import numpy as np

from profiler_curves import TARGET, Outcome

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS: Final = {
    "KVServe": "#0b6e4f",
    "KVServe, sampled": "#3fa7d6",
    "KVServe, no forecasts": "#8fbf6b",
    "KVServe paper": "#6a4c93",
    "NSGA-II": "#b5651d",
    "Sobol": "#33658a",
    "random": "#808080",
}


def draw(outcomes: Sequence[Outcome], *, space: int, budget: int, title: str, path: Path) -> None:
    """Draw the medians of the seeds, with quartiles.

    Args:
        outcomes: What the searches did.
        space: Strategies of the space.
        budget: Evaluations to mark.
        title: Of the figure.
        path: Where the picture goes.
    """
    figure, axes = plt.subplots(figsize=(9, 5.6), dpi=130)
    for outcome in outcomes:
        longest = max(map(len, outcome.curves))
        evaluations = np.unique(np.geomspace(1, longest, 200).round().astype(int))
        low, middle, high = np.array([outcome.quartiles(int(n)) for n in evaluations]).T
        colour = COLOURS.get(outcome.name, "black")
        axes.fill_between(evaluations, 100 * low, 100 * high, color=colour, alpha=0.18, lw=0)
        axes.plot(evaluations, 100 * middle, color=colour, lw=1.8, label=outcome.name)
    axes.axhline(100 * TARGET, color="black", lw=0.8, ls=":")
    axes.axvline(budget, color="black", lw=0.8, ls="--")
    axes.annotate(
        f"1/50 of {space:,}", (budget, 42), xytext=(4, 0), textcoords="offset points", fontsize=9
    )
    axes.annotate(
        f"{TARGET:.0%}", (1, 100 * TARGET), xytext=(2, -11), textcoords="offset points", fontsize=9
    )
    axes.set_xscale("log")
    axes.set_xlim(1, space)
    axes.set_ylim(40, 101)
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if tick <= space]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.set_xlabel("quality evaluations")
    axes.set_ylabel("share of the exhaustive hypervolume, %")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
