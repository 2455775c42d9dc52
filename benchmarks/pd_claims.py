"""What a run of ``make bench-pd`` amounts to: a row for each policy and link, their ratios, and the claims. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import numpy as np

from pd_load import Timing
from pd_plan import (
    ALONE,
    KVSERVE,
    KVSERVE_QUALITY,
    LATE,
    MOVING,
    ONE_BY_ONE,
    OURS,
    OVERLAP,
    PAPERS_REGIME,
    RAW,
    Condition,
)

TIMES_RAW: Final = 9.13
"""The paper's largest gain over raw transfers."""
MOST_OVER_STATIC: Final = 1.02
MOST_OVER_RAW: Final = 1.02
MOST_OVER_ALONE: Final = 1.05
LESS_LOSS: Final = 2.0
HIDDEN: Final = 0.8
LEAST_LOSS_BP: Final = 1e-3
"""A smaller loss is none."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What a policy got under a condition, or in one of its rounds; parts add up.

    Attributes:
        timings: Of each request, in the order of arrival.
        bytes_wire: All that passed the link, headers included.
        grown: By how much the engines' counters grew.
    """

    timings: tuple[Timing, ...]
    bytes_wire: int
    grown: Mapping[str, float]

    def __add__(self, other: "Cell") -> "Cell":
        """Return both together, the other's requests after these."""
        return Cell(
            timings=self.timings + other.timings,
            bytes_wire=self.bytes_wire + other.bytes_wire,
            grown=Counter(self.grown) + Counter(other.grown),
        )


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, 95th percentile and mean; NaN of nothing."""
    if not seconds:
        return dict.fromkeys(("p50", "p95", "mean"), float("nan"))
    return {
        "p50": float(np.percentile(seconds, 50)),
        "p95": float(np.percentile(seconds, 95)),
        "mean": float(np.mean(seconds)),
    }


def counted(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return by how much counters grew, without those that did not."""
    return {key: grown for key in after if (grown := after[key] - before.get(key, 0.0))}


def row(
    condition: Condition,
    policy: str,
    cell: Cell,
    *,
    losses_bp: Mapping[str, float],
    objective_s: float,
) -> Row:
    """Return what a policy got under a condition.

    Args:
        condition: The link and the load.
        policy: Its name.
        cell: What it got.
        losses_bp: Of each profile.
        objective_s: The bound of the time from a prefill's end to the first token, which is the policies' objective.
    """
    timings, grown = cell.timings, cell.grown
    good = [t for t in timings if not t.error]
    used = {
        key.partition(",")[2].rstrip("}"): int(value)
        for key, value in grown.items()
        if key.startswith("transfers{receive,")
    }
    total = sum(used.values())
    return {
        "condition": condition.name,
        "bandwidth_mbit": condition.mbit,
        "moving": condition.moving,
        "policy": policy,
        "requests": len(timings),
        "per_s": condition.per_s,
        "seed": condition.seed,
        "ttft_s": percentiles([t.ttft_s for t in good]),
        "jct_s": percentiles([t.jct_s for t in good]),
        "prefill_s": percentiles([t.prefill_s for t in good if t.prefill_s]),
        "bytes_wire": cell.bytes_wire,
        "errors": len(timings) - len(good),
        "recomputed": int(sum(v for k, v in grown.items() if "failures{receive" in k)),
        "profiles": used,
        "loss_bp": sum(losses_bp[n] * c for n, c in used.items()) / total if total else 0.0,
        "attained": sum(t.ttft_s - t.prefill_s <= objective_s for t in good) / len(timings),
        "stages_s": {
            stage: sum(v for k, v in grown.items() if k.startswith(f"{stage}_seconds{{"))
            for stage in ("encode", "wire", "decode", "total", "exposed")
        },
        "jct_each_s": [round(t.jct_s, 4) if not t.error else None for t in timings],
        "ttft_each_s": [round(t.ttft_s, 4) if not t.error else None for t in timings],
        "prefill_each_s": [round(t.prefill_s, 4) if not t.error else None for t in timings],
    }


def vs_raw(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Return for each condition and policy how many times shorter its median completion time is than raw's."""
    return {
        name: {
            policy: group[RAW]["jct_s"]["p50"] / one["jct_s"]["p50"]
            for policy, one in group.items()
            if policy != RAW
        }
        for name, group in _groups(rows).items()
        if RAW in group
    }


def best_static(group: Mapping[str, Row], lossy: Iterable[str]) -> Row | None:
    """Return the fixed profile, raw included, of the least mean completion time.

    Args:
        group: One condition's rows by policy.
        lossy: Policies beyond the quality budget, which can't be chosen.
    """
    able = [
        one
        for policy, one in group.items()
        if policy not in (*OURS, ALONE, *lossy) and not one["errors"]
    ]
    return min(able, key=lambda one: one["jct_s"]["mean"], default=None)


def vs_best_static(rows: Iterable[Row], lossy: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return for each condition KVServe's mean completion time over that of the best fixed profile in hindsight."""
    found: dict[str, dict[str, Any]] = {}
    for name, group in _groups(rows).items():
        best = best_static(group, lossy)
        if best is not None and KVSERVE in group:
            ours_s = group[KVSERVE]["jct_s"]["mean"]
            found[name] = {"static": best["policy"], "times": ours_s / best["jct_s"]["mean"]}
    return found


def paired(one: Row, other: Row) -> float:
    """Return the median over requests of one row's completion time over the other's; NaN without common requests."""
    ratios = [a / b for a, b in zip(one["jct_each_s"], other["jct_each_s"], strict=True) if a and b]
    return median(ratios) if ratios else float("nan")


def less_loss(group: Mapping[str, Row]) -> float | None:
    """Return how many times the least lossy fixed profile that keeps the objective as often loses as much as KVServe.

    Returns:
        Infinite if no fixed profile keeps it as often, or KVServe loses nothing where each of these does; None where
        KVServe did not run for quality.
    """
    ours = group.get(KVSERVE_QUALITY)
    if ours is None:
        return None
    able = [
        one["loss_bp"]
        for policy, one in group.items()
        if policy not in (*OURS, ALONE) and one["attained"] >= ours["attained"]
    ]
    if not able:
        return float("inf")
    if min(able) < LEAST_LOSS_BP:
        return 1.0 if ours["loss_bp"] < LEAST_LOSS_BP else 0.0
    return min(able) / ours["loss_bp"] if ours["loss_bp"] > 0 else float("inf")


def claims(rows: Sequence[Row], lossy: Iterable[str], *, request_s: float) -> list[dict[str, Any]]:
    """Return each target with what was measured for it; targets whose rows are not there are left out.

    Args:
        rows: What was measured.
        lossy: Policies beyond the quality budget.
        request_s: What a request takes that has nothing to transfer.
    """
    groups = _groups(rows)
    found = []
    regime = groups.get(PAPERS_REGIME, {})
    if {RAW, KVSERVE} <= regime.keys():
        times = regime[RAW]["jct_s"]["p50"] / regime[KVSERVE]["jct_s"]["p50"]
        found.append(
            _claim(
                "paper's regime: median JCT, raw over KVServe",
                times,
                f"> {TIMES_RAW}",
                times > TIMES_RAW,
            )
        )
    moving = groups.get(MOVING, {})
    if (against := vs_best_static(moving.values(), lossy).get(MOVING)) is not None:
        found.append(
            _claim(
                f"moving link: mean JCT, KVServe over {against['static']}, the best fixed in hindsight",
                against["times"],
                f"<= {MOST_OVER_STATIC}",
                against["times"] <= MOST_OVER_STATIC,
            )
        )
    if (less := less_loss(moving)) is not None:
        found.append(
            _claim(
                "moving link, for quality: least loss of a fixed profile at equal attainment, over KVServe's",
                less,
                f">= {LESS_LOSS}",
                less >= LESS_LOSS,
            )
        )
    single = groups.get(ONE_BY_ONE, {})
    for name, ours, other, most in (
        ("unshaped: JCT of a request, KVServe over raw", KVSERVE, RAW, MOST_OVER_RAW),
        ("unshaped: JCT of a request, raw over no transfer", RAW, ALONE, MOST_OVER_ALONE),
    ):
        if {ours, other} <= single.keys():
            times = paired(single[ours], single[other])
            found.append(_claim(name, times, f"<= {most}", times <= most))
    if (behind := overlap(rows, request_s=request_s)) is not None:
        share = behind["hidden"]
        found.append(
            _claim(
                "100 Mbit/s: share of a transfer hidden behind its prefill",
                share,
                f">= {HIDDEN}",
                share >= HIDDEN,
            )
        )
    return found


def overlap(rows: Iterable[Row], *, request_s: float) -> dict[str, float] | None:
    """Return what it brings to pull while the prefill goes on: medians over the same requests sent in both ways.

    Args:
        rows: What was measured.
        request_s: What a request of one token takes that has nothing to transfer.

    Returns:
        ``hidden``, the share of the time between a prefill's end and the first token, less ``request_s``, that is no
        longer there; ``prefill_times``, how many times as long the prefill takes beside its transfer, whose coding may
        share its core; ``ttft_times``, the time to the first token over that of pulling afterwards. None where not both
        ways were measured.
    """
    group = _groups(rows).get(OVERLAP, {})
    after = next((one for policy, one in group.items() if policy.endswith(LATE)), None)
    during = next((one for policy, one in group.items() if not policy.endswith(LATE)), None)
    if after is None or during is None:
        return None
    # a request that failed has no times
    both = [
        (late, early)
        for late, early in zip(_first_tokens(after), _first_tokens(during), strict=True)
        if late and early and late[0] - late[1] > request_s
    ]
    if not both:
        return None
    return {
        "hidden": median(
            1 - max(ttft - prefill - request_s, 0.0) / (late_ttft - late_prefill - request_s)
            for (late_ttft, late_prefill), (ttft, prefill) in both
        ),
        "prefill_times": median(early[1] / late[1] for late, early in both),
        "ttft_times": median(early[0] / late[0] for late, early in both),
    }


def _first_tokens(one: Row) -> list[tuple[float, float] | None]:
    """Return for each request the time to its first token and to its prefill's end; None if it failed."""
    pairs = zip(one["ttft_each_s"], one["prefill_each_s"], strict=True)
    return [(ttft, prefill) if ttft and prefill else None for ttft, prefill in pairs]


def _groups(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    groups: dict[str, dict[str, Row]] = {}
    for one in rows:
        groups.setdefault(one["condition"], {})[one["policy"]] = one
    return groups


def _claim(text: str, value: float, target: str, holds: bool) -> dict[str, Any]:
    return {"claim": text, "value": float(value), "target": target, "holds": bool(holds)}
