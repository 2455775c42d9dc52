"""The figures of ``make bench-pd`` and ``make bench-store``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from pd_plan import KVSERVE, KVSERVE_QUALITY, MOVES_MBIT, RAW, SLOW_MBIT, Moves
from store_rows import FLOOR, LMCACHE, RECOMPUTE, link_name

BIN_S: Final = 3.0
"""Requests over the moving link that arrive within so long are drawn as one point."""
COLOURS: Final = {
    KVSERVE: "#1b6ca8",
    KVSERVE_QUALITY: "#0b6e4f",
    RAW: "#b5651d",
    "cachegen": "#6a4c93",
    "joint-3": "#8fb8d8",
    "joint-3-fine": "#b7cde0",
    "joint-10": "#5f8fb5",
    "joint-layer": "#0b6e4f",
    "focus-3-fine": "#c9a227",
    "focus-3": "#e0a458",
    "int8-token": "#b5b5b5",
    LMCACHE: "#6a4c93",
}
LINES: Final = {RECOMPUTE: "--", FLOOR: ":"}


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Draw completion times over the link's rate, and over the moving link by the time of arrival.

    Args:
        document: What the benchmark found.
        path: Where to.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    _over_rates(left, document)
    _moving(right, document)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _over_rates(axes: Axes, document: Mapping[str, Any]) -> None:
    rows = [row for row in document["runs"] if not row["moving"] and row["per_s"]]
    # the unshaped link at the right end
    rates = sorted({row["bandwidth_mbit"] or float("inf") for row in rows})
    places = {rate: index for index, rate in enumerate(rates)}
    for policy in dict.fromkeys(row["policy"] for row in rows):
        of_policy = sorted(
            (
                places[row["bandwidth_mbit"] or float("inf")],
                row["jct_s"]["p50"],
                row["jct_s"]["p95"],
            )
            for row in rows
            if row["policy"] == policy
        )
        wide = policy == KVSERVE
        at, middle, high = zip(*of_policy, strict=True)
        colour = COLOURS.get(policy, "#777777")
        axes.plot(at, middle, marker="o", color=colour, lw=2.6 if wide else 1.3, label=policy)
        axes.scatter(at, high, marker="_", color=colour, s=60)
    axes.set_yscale("log")
    axes.set_xticks(
        range(len(rates)), [f"{r:.0f}" if r != float("inf") else "unshaped" for r in rates]
    )
    axes.set_xlabel("link, Mbit/s")
    axes.set_ylabel("job completion time, s (line: median, dash: 95th percentile)")
    axes.set_title("Two real engines, a core each, Poisson arrivals")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(frameon=False)


def _moving(axes: Axes, document: Mapping[str, Any]) -> None:
    rows = [row for row in document["runs"] if row["moving"]]
    if not rows:
        axes.set_axis_off()
        return
    moves = Moves()
    whole_s = moves.phase_s * len(moves.rates_mbit)
    edges = np.arange(0.0, whole_s + BIN_S / 2, BIN_S)
    for row in rows:
        policy = row["policy"]
        answered = [
            (at_s % whole_s, jct_s)
            for at_s, jct_s in zip(row["at_each_s"], row["jct_each_s"], strict=True)
            if jct_s is not None
        ]
        if not answered:
            continue
        at_s, jct_s = (np.array(each) for each in zip(*answered, strict=True))
        places = np.digitize(at_s, edges) - 1
        filled = sorted(set(places.tolist()))
        colour = COLOURS.get(policy, "#777777")
        axes.scatter(at_s, jct_s, color=colour, s=7, alpha=0.35, lw=0)
        axes.plot(
            edges[filled] + BIN_S / 2,
            [jct_s[places == place].mean() for place in filled],
            color=colour,
            lw=2.6 if policy.startswith(KVSERVE) else 1.2,
            label=f"{policy}: mean {row['jct_s']['mean']:.2f} s, {row['loss_bp']:.0f} bp",
        )
    for number, mbit in enumerate(moves.rates_mbit):
        if mbit is not None:
            axes.axvspan(
                number * moves.phase_s,
                (number + 1) * moves.phase_s,
                color="#777777",
                lw=0,
                alpha=0.2 if mbit == SLOW_MBIT else 0.08,
            )
    axes.set_xlim(0.0, whole_s)
    axes.set_yscale("log")
    axes.set_xlabel(
        f"arrival in the link's cycle, s (dark {SLOW_MBIT:g} Mbit/s, grey {MOVES_MBIT[1]:g}, white unshaped)"
    )
    axes.set_ylabel(f"job completion time, s (dot: request, line: mean of {BIN_S:g} s)")
    axes.set_title("The same requests over a moving link")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)


def draw_store(document: Mapping[str, Any], path: Path) -> None:
    """Draw the figure of ``make bench-store``: time to the first token over the prefix, a panel for each link.

    Args:
        document: What the benchmark found.
        path: Where to.
    """
    links = list(dict.fromkeys((r["store"], r["bandwidth_mbit"]) for r in document["runs"]))
    figure, panels = plt.subplots(
        1,
        len(links),
        figsize=(4.6 * len(links), 4.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for (store, mbit), axes in zip(links, panels[0], strict=True):
        rows = [r for r in document["runs"] if (r["store"], r["bandwidth_mbit"]) == (store, mbit)]
        for mode in dict.fromkeys(row["mode"] for row in rows):
            points = sorted(
                (r["prefix_tokens"], r["ttft_s"]["p50"]) for r in rows if r["mode"] == mode
            )
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                color=COLOURS.get(mode, "#333333"),
                lw=2.6 if mode == KVSERVE else 1.3,
                ls=LINES.get(mode, "-"),
                label=mode,
            )
        axes.set_title(f"{store}, {link_name(mbit)}")
        axes.set_xlabel("tokens of the prefix")
        axes.set_yscale("log")
        axes.grid(True, which="both", alpha=0.2)
    panels[0][0].set_ylabel("seconds to the first token, median")
    panels[0][0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
