"""The result of a run as one HTML page that needs nothing else: the front, its profiles side by side, the way there.

A function of the result and its log, without dates or random names, so that the same run gives the same page.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from kvserve_api.profile_set import ParetoSet, Profile
from kvserve_api.quality import QualityBudget
from kvserve_profiler.hypervolume import Reference, axes, hypervolume
from kvserve_profiler.trials import Phase, Trial, TrialLog

LEAST_LOSS_BP: Final = 0.1
"""Where a loss of nothing stands on a logarithmic axis."""
_STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}th,td{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}.plots{margin:1em 0}
"""
_MARGIN: Final = {"l": 50, "r": 30, "t": 50, "b": 50}


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A workload class of the report.

    Attributes:
        name: Of the class.
        text: Digest of its text.
        budget: What its profiles may lose.
    """

    name: str
    text: str
    budget: QualityBudget

    @property
    def budget_bp(self) -> float:
        """The expected growth of perplexity that its profiles may cause, in basis points."""
        return self.budget.max_loss_bp


def render(result: ParetoSet, log: TrialLog, sections: Sequence[Section]) -> str:
    """Return the page.

    Args:
        result: The Pareto set.
        log: The trials it was made of.
        sections: The workload classes, in the order in which they are shown.
    """
    return "".join(_page(result, log, sections))


def convergence(log: TrialLog, text: str, budget_bp: float) -> list[float]:
    """Return the dominated hypervolume after each trial of the search, in cubic octaves.

    Losses are those that the search saw; what could not be measured adds nothing.
    """
    known = [] if log.screening is None else [c for c in log.screening.found.values() if c]
    if not known:
        return []
    reference = Reference(
        loss_bp=max(budget_bp, 1.0), codec_s=max(cheap.codec_s for cheap in known) * (1 + 1e-9)
    )
    points = np.full((len(log.of(Phase.SEARCH)), 3), np.nan)
    for row, trial in enumerate(log.of(Phase.SEARCH)):
        cheap = log.screening.of(trial.strategy) if log.screening else None
        if trial.measurement is not None and cheap is not None:
            loss_bp = trial.measurement.qualities[text].loss_bp
            ratio, loss, codec_s = np.array([[cheap.ratio], [loss_bp], [cheap.codec_s]])
            points[row] = axes(ratio, loss, codec_s, reference)[0]
    return [hypervolume(points[: count + 1]) for count in range(len(points))]


def _page(result: ParetoSet, log: TrialLog, sections: Sequence[Section]) -> Iterator[str]:
    name = escape(result.model.name)
    trials = log.of(Phase.SEARCH)
    failed = [trial for trial in log.trials if trial.error]
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}: profiles</title>'
    yield f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body>"
    yield f"<h1>Compression profiles of {name}</h1><p>Costs on {escape(result.device)}. "
    screened = 0 if log.screening is None else len(log.screening.found)
    yield f"{screened} candidates screened, {len(trials)} tried, {len(log.of(Phase.CONFIRM))} measured again on "
    yield f"windows that the search had not seen. Digest of the set: <code>{escape(result.digest)}</code>.</p>"
    for number, section in enumerate(sections):
        yield from _section(result, log, section, number)
    if failed:
        yield "<h2>What could not be measured</h2><table><tr><th>strategy</th><th>why</th></tr>"
        for trial in failed:
            yield f"<tr><td>{escape(trial.name)}</td><td>{escape(trial.error)}</td></tr>"
        yield "</table>"
    yield "</body></html>\n"


def _section(result: ParetoSet, log: TrialLog, section: Section, number: int) -> Iterator[str]:
    native_bytes = int(result.provenance["codec_time_bytes"])
    profiles = result.profiles(section.name)
    yield f"<h2>Workload class {escape(section.name)}</h2>"
    yield f"<p>Quality budget: {section.budget_bp:g} basis points"
    yield "".join(f"; {bp} of task {escape(task)}" for task, bp in section.budget.tasks.items())
    yield f". Windows of the set: {escape(result.provenance['windows'][section.name])}.</p>"
    yield "<table><tr><th>profile</th><th>ratio</th><th>loss, bp</th><th>at most, bp</th><th>encode, ms</th>"
    yield "<th>decode, ms</th>"
    yield "".join(f"<th>{escape(task)}, at most bp</th>" for task in section.budget.tasks)
    yield "<th>within budget</th></tr>"
    for profile in profiles:
        cells = (
            escape(profile.name),
            f"{profile.ratio:.2f}",
            f"{profile.loss_bp:.1f}",
            f"{profile.loss_upper_bp:.1f}",
            f"{profile.encode.seconds(native_bytes) * 1e3:.1f}",
            f"{profile.decode.seconds(native_bytes) * 1e3:.1f}",
            *(_answers(profile, task) for task in section.budget.tasks),
            "yes" if section.budget.admits(profile) else "no",
        )
        yield f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    yield f'</table><p>Times are for a prefix of {native_bytes / 1e6:.1f} MB.</p><div class="plots">'
    figures = (
        ("front", _front(profiles, log.of(Phase.SEARCH), log, section, native_bytes)),
        ("profiles", _parallel(profiles, native_bytes)),
        ("convergence", _convergence(convergence(log, section.text, section.budget_bp))),
    )
    for kind, figure in figures:
        yield figure.to_html(
            full_html=False, include_plotlyjs=False, div_id=f"{kind}-{number}", default_height=520
        )
    yield "</div>"


def _answers(profile: Profile, task: str) -> str:
    """Return the upper limit of the answers that a profile loses of a task."""
    score = profile.tasks.get(task)
    return f"{score.loss_upper_bp:.0f}" if score else ("0" if profile.lossless else "–")


def _front(
    profiles: Sequence[Profile],
    trials: Sequence[Trial],
    log: TrialLog,
    section: Section,
    native_bytes: int,
) -> Any:
    """Return the three objectives of all that was tried, and of the set."""
    seen = []
    for trial in trials:
        cheap = log.screening.of(trial.strategy) if log.screening else None
        if trial.measurement is not None and cheap is not None:
            quality = trial.measurement.qualities[section.text]
            seen.append((trial.name, quality.ratio, quality.loss_bp, cheap.codec_s))
    kept = [(p.name, p.ratio, p.loss_upper_bp, _codec_s(p, native_bytes)) for p in profiles]
    figure = go.Figure(layout={"title": "Ratio, loss and codec time", "margin": _MARGIN})
    for label, points, marker in (
        ("tried (loss in the search, modelled time)", seen, {"size": 3, "color": "#999"}),
        ("in the set (upper limit of the loss)", kept, {"size": 6, "color": "#c22"}),
    ):
        figure.add_scatter3d(
            x=[point[1] for point in points],
            y=[max(point[2], LEAST_LOSS_BP) for point in points],
            z=[point[3] * 1e3 for point in points],
            text=[point[0] for point in points],
            mode="markers",
            marker=marker,
            name=label,
            hovertemplate="%{text}<br>ratio %{x:.2f}<br>loss %{y:.1f} bp<br>codec %{z:.1f} ms",
        )
    figure.update_scenes(
        xaxis={"title": "ratio", "type": "log"},
        yaxis={"title": "loss, bp", "type": "log"},
        zaxis={"title": "codec, ms", "type": "log"},
        # a step back from the default, which cuts off the nearest corner with its axes
        camera={"eye": {"x": 1.7, "y": 1.7, "z": 1.2}},
    )
    return figure


def _parallel(profiles: Sequence[Profile], native_bytes: int) -> Any:
    """Return the profiles of the set as lines over their properties, in octaves where they range widely."""
    columns = (
        ("log2 ratio", [float(np.log2(p.ratio)) for p in profiles]),
        ("log2 (1 + loss at most, bp)", [float(np.log2(1 + p.loss_upper_bp)) for p in profiles]),
        ("encode, ms", [p.encode.seconds(native_bytes) * 1e3 for p in profiles]),
        ("decode, ms", [p.decode.seconds(native_bytes) * 1e3 for p in profiles]),
    )
    lines = go.Parcoords(
        line={"color": columns[1][1], "colorscale": "Viridis", "showscale": True},
        dimensions=[{"label": label, "values": values} for label, values in columns],
    )
    layout = {"title": "The set's profiles; colour is the loss", "margin": _MARGIN | {"t": 90}}
    return go.Figure(lines, layout=layout)


def _convergence(volumes: Sequence[float]) -> Any:
    layout = {
        "title": "What the search had found after each trial",
        "xaxis": {"title": "trials"},
        "yaxis": {"title": "dominated hypervolume, cubic octaves", "rangemode": "tozero"},
        "margin": _MARGIN,
    }
    line = go.Scatter(x=list(range(1, len(volumes) + 1)), y=list(volumes), line={"shape": "hv"})
    return go.Figure(line, layout=layout)


def _codec_s(profile: Profile, native_bytes: int) -> float:
    return profile.encode.seconds(native_bytes) + profile.decode.seconds(native_bytes)
