"""The frontier: how small against how faithful, every codec a point."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

from codec_rows import Measured

mpl.use("Agg")
import matplotlib.pyplot as plt

LEAST_KL: Final = 2e-5
"""What loses nothing, or next to nothing, is drawn here."""
STYLES: Final = {
    "ours": {"color": "#0b6e4f", "marker": "o", "label": "KVServe"},
    "restated": {"color": "#b5651d", "marker": "s", "label": "peers made of our stages"},
    "peer": {"color": "#6a4c93", "marker": "^", "label": "peers' own code"},
}
OFFSETS: Final = (
    (7, 5), (7, -9), (-7, 5), (-7, -9), (0, 9), (0, -13), (12, 14), (12, -18), (-12, 14), (-12, -18),
    (0, 22), (0, -26), (22, 24), (22, -28), (-22, 24), (-22, -28),
)  # fmt: skip


def draw(lines: Sequence[Measured], title: str, path: Path) -> None:
    """Draw the means over texts.

    Args:
        lines: One for each codec.
        title: Of the figure.
        path: Where the picture goes.
    """
    figure, axes = plt.subplots(figsize=(11, 7.5), dpi=130)
    axes.set_xscale("log")
    axes.set_yscale("log")
    shown = [line for line in lines if line.kl < 1]
    for kind, style in STYLES.items():
        of_kind = [line for line in shown if line.kind == kind]
        axes.scatter(
            [max(line.kl, LEAST_KL) for line in of_kind],
            [line.ratio for line in of_kind],
            s=34,
            zorder=3,
            color=style["color"],
            marker=style["marker"],
            label=style["label"],
        )
    for family in dict.fromkeys(line.family for line in shown if line.family):
        curve = sorted((max(x.kl, LEAST_KL), x.ratio) for x in shown if x.family == family)
        axes.plot(*zip(*curve, strict=True), color=STYLES["ours"]["color"], lw=1, alpha=0.6)
    ratios = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
    top = max(line.ratio for line in shown) * 1.25
    axes.set_yticks(ratios, [f"{ratio:g}×" for ratio in ratios])
    axes.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.set_ylim(0.92, top)
    axes.set_xlim(LEAST_KL * 0.75, 1)
    ticks = (LEAST_KL, 1e-4, 1e-3, 1e-2, 1e-1, 1)
    axes.set_xticks(
        ticks, ["≤ 0.00002\n(exact at the edge)", "0.0001", "0.001", "0.01", "0.1", "1"]
    )
    axes.grid(True, which="major", alpha=0.25)
    axes.set_xlabel("KL from the exact cache, nats a token (less is better)")
    axes.set_ylabel("native bytes over bytes sent (more is better)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(loc="upper left", frameon=False)
    _label(figure, axes, shown)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def _label(figure: Any, axes: Any, lines: Sequence[Measured]) -> None:
    """Write each point's name where it covers no other name and no point."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    points = [axes.transData.transform((max(line.kl, LEAST_KL), line.ratio)) for line in lines]
    taken: list[Any] = []
    families: set[str] = set()
    for line in sorted(lines, key=lambda line: (bool(line.family), -line.ratio)):
        if line.family and line.family in families:
            continue
        families.add(line.family)
        name = (line.family or line.name).replace(" (round trip)", "")
        text = None
        for dx, dy in OFFSETS:
            if text is not None:
                text.remove()
            text = axes.annotate(
                name,
                (max(line.kl, LEAST_KL), line.ratio),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                fontsize=7.5,
                color=STYLES[line.kind]["color"],
            )
            box = text.get_window_extent(renderer).expanded(1.02, 1.05)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and box.y1 <= axes.bbox.y1
            covers = any(box.overlaps(other) for other in taken)
            hides = sum(box.contains(*point) for point in points) > 0
            if inside and not covers and not hides:
                break
        assert text is not None
        taken.append(text.get_window_extent(renderer))
