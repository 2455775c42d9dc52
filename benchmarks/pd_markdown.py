"""The tables of ``docs/benchmarks.md``, written from what ``make bench-pd`` found. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from pd_pairs import HOLDS, MISSED, UNCLEAR
from pd_plan import ALONE, KVSERVE, MOVING, ONE_BY_ONE, OVERLAP, PAPERS_REGIME, RAW
from pd_tables import interval

VERDICTS: Final = {HOLDS: "kept", MISSED: "**missed**", UNCLEAR: "**unclear**"}
SIGNS: Final = {">=": "≥", "<=": "≤"}


def tables(document: Mapping[str, Any]) -> str:
    """Return runs, the targets, what the machine did meanwhile and the model, as the docs have them."""
    parts = (
        run_lines(document),
        claim_lines(document),
        [f"- {sentence}" for sentence in sentences(document)],
        model_lines(document),
    )
    return "\n\n".join("\n".join(lines) for lines in parts)


def run_lines(document: Mapping[str, Any]) -> list[str]:
    """Return a line for each condition and policy."""
    within = f"within {document['objective_s']:g} s"
    headings = (
        *("link", "policy", "requests", "JCT p50", "p95", "mean", "TTFT p50", "MB on the link"),
        *("loss, bp", within, "wrong"),
    )
    lines = []
    last = ""
    for row in document["runs"]:
        jct = row["jct_s"]
        wrong = [f"{row[kind]} {kind}" for kind in ("errors", "recomputed") if row[kind]]
        lines.append(
            (
                _link(row) if row["condition"] != last else "",
                f"`{row['policy']}`",
                str(row["requests"]),
                *(number(jct[name]) for name in ("p50", "p95", "mean")),
                number(row["ttft_s"]["p50"]),
                f"{row['bytes_wire'] / 1e6:.0f}",
                f"{row['loss_bp']:.0f}",
                "" if row["policy"] == ALONE else f"{100 * row['attained']:.0f} %",
                ", ".join(wrong),
            )
        )
        last = row["condition"]
    # a column of nothing says less than a sentence
    kept = slice(None) if any(line[-1] for line in lines) else slice(-1)
    return _table(headings[kept], [line[kept] for line in lines])


def claim_lines(document: Mapping[str, Any]) -> list[str]:
    """Return the targets, with what was measured."""
    return _table(
        ("target", "measured", "90 %", "wanted", ""),
        [
            (
                one["claim"],
                "∞" if one["value"] is None else number(one["value"]),
                interval(one, number),
                _wanted(one["target"]),
                VERDICTS[one["verdict"]],
            )
            for one in document["claims"]
        ],
    )


def sentences(document: Mapping[str, Any]) -> list[str]:
    """Return what else the docs say of a run."""
    machine = document["machine"]
    took = [1e3 * probe["prefill_s_per_token"] for probe in document["probes"]]
    made = [
        ("A quick run: " if document["quick"] else "")
        + f"{machine['processor']}, {machine['cores']} cores, {document['measured_s'] / 60:.0f} minutes.",
        f"A prefill took {number(min(took))} to {number(max(took))} ms a token, measured {len(took)} times.",
    ]
    for name, against in document["vs_best_static"].items():
        made.append(
            f"{name}: KVServe's mean is {number(against['times'])} times that of `{against['static']}`, the median of"
            f" the requests' ratios {number(against['pair_by_pair'])}."
        )
    for row in document["runs"]:
        if row["policy"] in (KVSERVE, "kvserve-quality"):
            used = ", ".join(f"`{profile}` {count}" for profile, count in row["profiles"].items())
            made.append(f"{row['condition']}, `{row['policy']}`: {used}.")
    behind = document["overlap"]
    if behind is not None:
        first, prefill = (_surely(behind[f"{name}_times"]) for name in ("ttft", "prefill"))
        made.append(
            f"100 Mbit/s: pulled while the prefill goes on, the first token comes after {first} of the time of pulling"
            f" afterwards, and the prefill takes {prefill} times as long."
        )
    error = document["modelled"]["measured_over_modelled"]
    if error is not None:
        made.append(f"Measured over modelled on this machine: {number(error)} in the median.")
    return made


def model_lines(document: Mapping[str, Any]) -> list[str]:
    """Return what the model says of GPUs: raw, KVServe, and how many times as long raw takes."""
    rows = document["modelled"]["gpus"]
    gpus = list(dict.fromkeys(row["gpu"] for row in rows))
    found = {(row["bandwidth_gbit"], row["gpu"], row["policy"]): row["jct_p50_s"] for row in rows}
    lines = []
    for gbit in dict.fromkeys(row["bandwidth_gbit"] for row in rows):
        line = [f"{gbit:g}"]
        for gpu in gpus:
            raw_s, ours_s = (found[gbit, gpu, policy] for policy in (RAW, KVSERVE))
            line += [number(raw_s), number(ours_s), f"{number(raw_s / ours_s)}×"]
        lines.append(line)
    headings = [text for gpu in gpus for text in (f"{gpu}: raw", "KVServe", "")]
    return _table(["Gbit/s", *headings], lines)


def number(value: float) -> str:
    """Return a figure as the docs have them: three digits or so, and no zero before the point."""
    text = f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def _surely(times: Mapping[str, Any]) -> str:
    """Return a figure and, if it has one, its interval."""
    known = interval(times, number)
    return number(times["value"]) + (f" ({known})" if known else "")


def _wanted(target: str) -> str:
    sign, bound = target.split()
    return f"{SIGNS.get(sign, sign)} {bound.removeprefix('0')}"


def _link(row: Mapping[str, Any]) -> str:
    mbit = row["bandwidth_mbit"]
    rate = "unshaped" if mbit is None else f"{round(mbit, 1):g} Mbit/s"
    return {
        ONE_BY_ONE: f"{rate}, one by one",
        OVERLAP: f"{rate}, one by one",
        PAPERS_REGIME: f"paper's regime, {rate}",
        MOVING: MOVING,
    }.get(row["condition"], rate)


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rows = [headings, ["---"] * len(headings), *lines]
    return [f"| {' | '.join(row)} |" for row in rows]
