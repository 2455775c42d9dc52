"""The figure of the controller's benchmark: the paper's minute as it is decided, and all scenarios as bars."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from controller_kvserve import KVServe
from controller_policies import DynamicController, Static
from controller_replay import replay
from controller_scenarios import GBIT, scenarios
from controller_traces import Traces

BARS: Final = (
    ("kvserve", "KVServe", "#1b6ca8"),
    ("best", "best fixed profile in hindsight", "#8fb8d8"),
    ("paper-dynamic", "paper's dynamic controller", "#e0a458"),
    ("default", "default fixed profile", "#b5b5b5"),
)
MOST: Final = 3.0
"""Longer bars are cut, with their value written on them."""


def draw(document: Mapping[str, Any], traces: Traces, path: Path) -> None:
    """Draw the figure.

    Args:
        document: What the benchmark found.
        traces: Of the scenario that is drawn over time.
        path: Where to.
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(14, 7), width_ratios=(1, 1.25), layout="constrained"
    )
    _over_time(left, traces)
    _bars(right, document)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _over_time(axes: Axes, traces: Traces) -> None:
    scenario = next(s for s in scenarios(traces, 1, quick=True) if s.name == "paper-60s")
    times = [arrival.at_s for arrival in scenario.arrivals]
    for decider, label, colour in (
        (Static(scenario.default), "default fixed profile", "#9a9a9a"),
        (DynamicController(scenario), "paper's dynamic controller", "#e0a458"),
        (KVServe(scenario), "KVServe", "#1b6ca8"),
    ):
        axes.plot(times, replay(scenario, decider).total_s, label=label, color=colour, marker=".")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("seconds of a transfer")
    axes.set_title("The paper's minute: Qwen2.5-32B, 14,000 tokens")
    link = axes.twinx()
    course = np.arange(0, times[-1], 0.25)
    link.fill_between(
        course, [scenario.capacity.at(float(t)) / GBIT for t in course], color="#4caf50", alpha=0.12
    )
    link.set_ylim(0, 120)
    link.set_yticks([0, 25, 50])
    link.set_ylabel("link, Gbit/s (green)", loc="bottom")
    axes.legend(loc="upper left")


def _bars(axes: Axes, document: Mapping[str, Any]) -> None:
    rows = list(document["scenarios"])[::-1]
    height = 0.8 / len(BARS)
    for number, (name, label, colour) in enumerate(BARS):
        lengths = [_over_oracle(row, name) for row in rows]
        places = np.arange(len(rows)) + 0.4 - (number + 0.5) * height
        axes.barh(places, np.minimum(lengths, MOST), height, label=label, color=colour)
        for place, length in zip(places, lengths, strict=True):
            if length > MOST:
                axes.text(MOST, place, f" {length:.1f}", va="center", fontsize=6)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(np.arange(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(0.8, MOST + 0.25)
    axes.set_xlabel("mean time of a transfer over the oracle's")
    axes.set_title(f"All scenarios, mean of {document['seeds']} truths; less is better")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=4, fontsize=9)


def _over_oracle(row: Mapping[str, Any], name: str) -> float:
    policies = row["policies"]
    ours, oracle = policies["kvserve"]["mean_s"], policies["oracle"]["mean_s"]
    factor = {"best": row["vs_best_static"], "default": row["vs_static_default"]}.get(name)
    return float((policies[name]["mean_s"] if factor is None else factor * ours) / oracle)
