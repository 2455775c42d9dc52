"""What the demo found: values, the report's JSON, the table and the figure."""

import statistics
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from demo.load import Answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """The requests of one bandwidth and mode.

    Attributes:
        bandwidth_mbit: The link from the prefill to the decode pod; None if it could not be shaped.
        mode: ``raw`` or ``kvserve``.
        answers: What the requests got.
        bytes_raw: Native KV bytes transferred.
        bytes_wire: Bytes on the wire.
        profiles: Transfers by profile.
        coder_share: What the threads that encode get of a processor; 1 if they are not slowed.
        why: The latest decision, as `kvserve explain` has it; None in mode raw.
    """

    bandwidth_mbit: int | None
    mode: str
    answers: Sequence[Answer]
    bytes_raw: int
    bytes_wire: int
    profiles: Mapping[str, int]
    coder_share: float = 1.0
    why: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the phase as the report has it."""
        return {
            "bandwidth_mbit": self.bandwidth_mbit,
            "mode": self.mode,
            "requests": len(self.answers),
            "ttft_s": quantiles([answer.ttft_s for answer in self.answers]),
            "jct_s": quantiles([answer.jct_s for answer in self.answers]),
            "bytes_raw": self.bytes_raw,
            "bytes_wire": self.bytes_wire,
            "profiles": dict(self.profiles),
            "coder_share": self.coder_share,
            "why": None if self.why is None else dict(self.why),
        }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return median and 95th percentile (of a handful: nearly the maximum), in the unit of the values."""
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
    return {"p50": round(statistics.median(ordered), 4), "p95": round(p95, 4)}


def agreement(reference: Sequence[Answer], answers: Sequence[Answer]) -> float:
    """Return which share of the generated words stands before the first difference to the reference's text.

    Args:
        reference: The raw answers.
        answers: Answers to the same prompts.
    """
    texts = {answer.prompt: answer.text.split() for answer in reference}
    shares = []
    for answer in answers:
        words, expected = answer.text.split(), texts[answer.prompt]
        same = 0
        for word, other in zip(words, expected, strict=False):
            if word != other:
                break
            same += 1
        shares.append(same / max(len(words), len(expected), 1))
    return round(statistics.mean(shares), 4) if shares else 1.0


def build(
    *,
    pareto: Mapping[str, Any],
    trials: Sequence[Mapping[str, Any]],
    budget_bp: float,
    phases: Sequence[Phase],
    switches: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the report.

    The speed-ups compare the medians of raw and KVServe at the slowest bandwidth both ran at; the agreement compares
    all texts under KVServe with the first raw ones.

    Args:
        pareto: The parsed Pareto document.
        trials: Every profile that was measured, with ``ratio``, ``loss_bp_upper`` and ``calibrated``; those that others
            beat are not in the set.
        budget_bp: The policy's quality budget, in basis points.
        phases: In the order they ran.
        switches: The changes of profile: ``at_s``, ``from``, ``to``, ``reason``.
    """
    raw = [phase for phase in phases if phase.mode == "raw"]
    ours = [phase for phase in phases if phase.mode == "kvserve"]
    steady = [phase for phase in ours if phase.coder_share == 1]
    slowest = min(raw, key=lambda phase: phase.bandwidth_mbit or 0)
    pair = next(
        (phase for phase in steady if phase.bandwidth_mbit == slowest.bandwidth_mbit), ours[0]
    )

    def speedup(name: str) -> float:
        before, after = slowest.to_json()[name]["p50"], pair.to_json()[name]["p50"]
        return round(float(before) / float(after), 3)

    within = [trial for trial in trials if trial["loss_bp_upper"] <= budget_bp]
    plain = [trial for trial in within if not trial["calibrated"]]
    return {
        "best_ratio": max((trial["ratio"] for trial in within), default=1.0),
        "best_ratio_uncalibrated": max((trial["ratio"] for trial in plain), default=1.0),
        "pareto": [_row(profile) for profile in pareto["classes"]["default"]],
        "phases": [phase.to_json() for phase in phases],
        "speedup_jct": speedup("jct_s"),
        "speedup_ttft": speedup("ttft_s"),
        "text_agreement": agreement(raw[0].answers, [a for phase in ours for a in phase.answers]),
        "profile_switches": list(switches),
    }


def _row(profile: Mapping[str, Any]) -> dict[str, Any]:
    def mb_s(cost: Mapping[str, float]) -> float | None:
        return round(cost["bytes_per_s"] / 1e6, 1) if "bytes_per_s" in cost else None

    return {
        "profile": profile["name"],
        "strategy": profile["strategy"],
        "calibrated": "bundle" in profile,
        "ratio": profile["ratio"],
        "loss_bp": profile["loss_bp"],
        "loss_bp_upper": profile["loss_upper_bp"],
        "encode_mb_s": mb_s(profile["encode"]),
        "decode_mb_s": mb_s(profile["decode"]),
    }


def tables(report: Mapping[str, Any]) -> tuple[Table, Table]:
    """Return the report as two tables for the terminal."""
    pareto = Table(title="Pareto set, measured on this machine")
    columns = (
        "profile",
        "calibrated",
        "ratio",
        "loss (bp)",
        "≤ (bp)",
        "encode MB/s",
        "decode MB/s",
    )
    for number, column in enumerate(columns):
        pareto.add_column(column, justify="left" if number < 2 else "right")
    for row in report["pareto"]:
        pareto.add_row(
            row["profile"],
            "yes" if row["calibrated"] else "",
            f"{row['ratio']:.2f}×",
            f"{row['loss_bp']:.1f}",
            f"{row['loss_bp_upper']:.1f}",
            *(f"{row[key]:.0f}" if row[key] else "–" for key in ("encode_mb_s", "decode_mb_s")),
        )
    phases = Table(title="Requests through the router")
    headings = ("link", "mode", "TTFT p50", "JCT p50", "KV MB", "wire MB", "ratio", "profiles")
    for column in headings:
        phases.add_column(column, justify="right" if column != "profiles" else "left")
    for row in report["phases"]:
        slowed = f", coder at {row['coder_share']:.0%}" if row["coder_share"] < 1 else ""
        phases.add_row(
            f"{row['bandwidth_mbit']} Mbit/s" if row["bandwidth_mbit"] else "unshaped",
            row["mode"] + slowed,
            f"{row['ttft_s']['p50']:.2f} s",
            f"{row['jct_s']['p50']:.2f} s",
            f"{row['bytes_raw'] / 1e6:.1f}",
            f"{row['bytes_wire'] / 1e6:.1f}",
            f"{row['bytes_raw'] / max(row['bytes_wire'], 1):.2f}×",
            ", ".join(f"{name} {count}×" for name, count in row["profiles"].items()),
        )
    return pareto, phases


def reasons(report: Mapping[str, Any]) -> list[str]:
    """Return for each phase under KVServe, in a line, which profile its last transfer took and why."""
    told = []
    for row in report["phases"]:
        why = row["why"]
        if why is None:
            continue
        link = f"{row['bandwidth_mbit']} Mbit/s" if row["bandwidth_mbit"] else "the link as it is"
        slowed = f", coder at {row['coder_share']:.0%}" if row["coder_share"] < 1 else ""
        # a table that was replaced meanwhile is not explained any more
        best = sorted(why.get("candidates", []), key=lambda each: each["total_s"])[:3]
        costs = "; ".join(
            f"{each['name']} {_ms(each['encode_s'])} to encode, {_ms(each['wire_s'])} on the wire, "
            f"{_ms(each['decode_s'])} to decode"
            for each in best
        )
        told.append(
            f"{link}{slowed}: {why['profile']}." + (f" Expected: {costs}." if costs else "")
        )
    return told


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def figure(report: Mapping[str, Any], path: Path) -> None:
    """Draw the phases' completion times and the Pareto set."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    drawing, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    labels = [
        f"{row['bandwidth_mbit'] or '∞'}\n{row['mode']}\n"
        + (f"coder {row['coder_share']:.0%}\n" if row["coder_share"] < 1 else "")
        + textwrap.fill(Counter(row["profiles"]).most_common(1)[0][0], 18)
        for row in report["phases"]
    ]
    # by number, because phases with the same label would be one bar
    places = range(len(labels))
    colours = ["#9aa5b1" if row["mode"] == "raw" else "#0b7285" for row in report["phases"]]
    left.bar(places, [row["jct_s"]["p50"] for row in report["phases"]], color=colours)
    left.bar(places, [row["ttft_s"]["p50"] for row in report["phases"]], color="black", width=0.15)
    left.set_xticks(places, labels)
    left.set_ylabel("median seconds to completion (black: to first token)")
    left.tick_params(axis="x", labelsize=8)
    left.set_xlabel("link in Mbit/s · mode · most used profile")
    for row in report["pareto"]:
        right.errorbar(
            row["loss_bp"],
            row["ratio"],
            xerr=[[0], [row["loss_bp_upper"] - row["loss_bp"]]],
            fmt="o",
            color="#0b7285",
        )
        right.annotate(
            row["profile"],
            (row["loss_bp"], row["ratio"]),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8,
        )
    right.set_xlabel("quality loss in basis points, with its upper 95 % limit")
    right.set_ylabel("compression ratio")
    right.set_xscale("symlog", linthresh=1)
    right.margins(0.15, 0.08)
    drawing.savefig(path, dpi=120)
    plt.close(drawing)
