"""What a run of ``make bench-pd`` shows of its targets, and how surely. Pure."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from pd_pairs import (
    HOLDS,
    LEAST_ROUNDS,
    RESAMPLES,
    UNCLEAR,
    Estimate,
    Target,
    estimate,
    made,
    mean_ratio,
    median_ratio,
    resampled,
)
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
    REGIME,
)
from pd_rows import Row, best_static, by_round, groups, pairs

TIMES_RAW: Final = Target(">", 9.13)
"""The paper's largest gain over raw transfers."""
OVER_STATIC: Final = Target("<=", 1.02)
OVER_RAW: Final = Target("<=", 1.02)
OVER_ALONE: Final = Target("<=", 1.05)
LESS_LOSS: Final = Target(">=", 2.0)
HIDDEN: Final = Target(">=", 0.8)
LEAST_LOSS_BP: Final = 1e-3
"""A smaller loss is none."""

Claim = dict[str, Any]


def claims(rows: Sequence[Row], lossy: Iterable[str]) -> list[Claim]:
    """Return each target with what was measured for it; targets whose rows are not there are left out.

    Args:
        rows: What was measured.
        lossy: Policies beyond the quality budget.
    """
    by_name = groups(rows)
    found: list[Claim] = []
    regime = by_name.get(PAPERS_REGIME, {})
    if {RAW, KVSERVE} <= regime.keys():
        found.append(_regime(regime[RAW], regime[KVSERVE]))
    moving = by_name.get(MOVING, {})
    if (best := best_static(moving, lossy)) is not None:
        found.append(
            _claim(
                f"moving link: mean JCT, KVServe over {best['policy']}, the best fixed in hindsight",
                estimate(pairs(moving[KVSERVE], best), mean_ratio),
                OVER_STATIC,
            )
        )
    if (less := less_loss(moving)) is not None:
        text = "moving link, for quality: least loss of a fixed profile at equal attainment, over KVServe's"
        found.append(_claim(text, less, LESS_LOSS))
    single = by_name.get(ONE_BY_ONE, {})
    for text, ours, other, target in (
        ("unshaped: JCT of a request, KVServe over raw", KVSERVE, RAW, OVER_RAW),
        ("unshaped: JCT of a request, raw over no transfer", RAW, ALONE, OVER_ALONE),
    ):
        if {ours, other} <= single.keys():
            ratio = estimate(pairs(single[ours], single[other]), median_ratio)
            found.append(_claim(text, ratio, target))
    if (share := hidden(by_name.get(OVERLAP, {}))) is not None:
        text = "100 Mbit/s: share of a transfer that is over when its prefill ends"
        found.append(_claim(text, share, HIDDEN))
    return found


def less_loss(group: Mapping[str, Row]) -> Estimate | None:
    """Return how many times the least lossy fixed profile that keeps the objective as often loses as much as KVServe.

    Args:
        group: One condition's rows by policy. Who keeps the objective is counted over the requests that both had.

    Returns:
        Infinite if no fixed profile keeps it as often, or KVServe loses nothing where each of these does; None where
        KVServe did not run for quality.
    """
    ours = group.get(KVSERVE_QUALITY)
    if ours is None:
        return None
    fixed = [one for policy, one in group.items() if policy not in (*OURS, ALONE)]
    kept = [(one["loss_bp"], _attained(ours, one)) for one in fixed]
    # a turn is the least that counters tell apart
    lost = [[part["loss_bp"]] * part["requests"] for part in ours["rounds"]]
    dice = random.Random(1)
    draws = [
        _less(
            [(loss_bp, resampled(both, dice)) for loss_bp, both in kept],
            resampled(lost, dice),
        )
        for _ in range(RESAMPLES)
    ]
    whole = [(loss_bp, [pair for part in both for pair in part]) for loss_bp, both in kept]
    value = _less(whole, [loss_bp for part in lost for loss_bp in part])
    return made(value, draws if len(lost) >= LEAST_ROUNDS else [], ours["requests"])


def hidden(group: Mapping[str, Row]) -> Estimate | None:
    """Return the share of transfers' time, by the connector's counters, that was over when their prefill ended.

    Args:
        group: Rows by policy, of which the one that pulls while the prefill goes on counts.

    Returns:
        None where nothing was transferred so.
    """
    one = next((one for policy, one in group.items() if not policy.endswith(LATE)), None)
    if one is None:
        return None
    # a turn is the least that counters tell apart
    turns = [(p["stages_s"]["exposed"], p["stages_s"]["total"]) for p in one["rounds"]]
    known = [turn for turn in turns if turn[1] > 0]
    return estimate([[turn] for turn in known], _hidden) if known else None


def overlap(rows: Iterable[Row]) -> dict[str, Any] | None:
    """Return what else it brings to pull while the prefill goes on: the same requests sent in both ways.

    Returns:
        ``ttft_times``, the time to the first token over that of pulling afterwards, and ``prefill_times``, how many
        times as long the prefill takes beside its transfer, whose coding may share its core: the median over requests,
        with its interval. None where not both ways were measured.
    """
    group = groups(rows).get(OVERLAP, {})
    after = next((one for policy, one in group.items() if policy.endswith(LATE)), None)
    during = next((one for policy, one in group.items() if not policy.endswith(LATE)), None)
    if after is None or during is None:
        return None
    found = {}
    for name in ("ttft", "prefill"):
        both = list(zip(during[f"{name}_each_s"], after[f"{name}_each_s"], strict=False))
        # a request that failed has no times
        rounds = [[(a, b) for a, b in part if a and b] for part in by_round(during, both)]
        times = estimate(rounds, median_ratio)
        if not times.items:
            return None
        found[f"{name}_times"] = {"value": _finite(times.value)} | _interval(times)
    return found


def _regime(raw: Row, ours: Row) -> Claim:
    """Return the claim of the paper's regime; it says what the regime was, and is unclear outside of it."""
    times = raw["link_s"] / raw["prefills_s"]
    text = (
        f"paper's regime, raw transfers {times:.1f} times as long as their prefills:"
        " JCT of a request, raw over KVServe"
    )
    # one round: raw transfers that begin anew would not wait for each other
    ratio = estimate(pairs(raw, ours), median_ratio, least_rounds=1)
    found = _claim(text, ratio, TIMES_RAW)
    if times < REGIME:
        found |= {"verdict": UNCLEAR, "holds": False}
    return found | {"link_over_prefill": times}


def _attained(ours: Row, other: Row) -> list[Sequence[tuple[bool, bool]]]:
    """Return by rounds for each request that both had whether either kept the objective."""
    shorter = min(ours, other, key=lambda row: row["requests"])
    both = list(zip(ours["attained_each"], other["attained_each"], strict=False))
    return by_round(shorter, both)


def _less(
    fixed: Iterable[tuple[float, Sequence[tuple[bool, bool]]]], losses_bp: Sequence[float]
) -> float:
    """Return the least loss of the fixed profiles that keep the objective as often, over the mean of KVServe's."""
    able = [
        loss_bp for loss_bp, both in fixed if sum(b for _, b in both) >= sum(a for a, _ in both)
    ]
    ours_bp = sum(losses_bp) / len(losses_bp)
    if not able:
        return float("inf")
    if min(able) < LEAST_LOSS_BP:
        return 1.0 if ours_bp < LEAST_LOSS_BP else 0.0
    return min(able) / ours_bp if ours_bp > 0 else float("inf")


def _hidden(turns: Sequence[tuple[float, float]]) -> float:
    return 1 - sum(exposed for exposed, _ in turns) / sum(total for _, total in turns)


def _claim(text: str, found: Estimate, target: Target) -> Claim:
    verdict = target.verdict(found)
    return (
        {"claim": text, "value": _finite(found.value), "target": str(target)}
        | _interval(found)
        | {"items": found.items, "verdict": verdict, "holds": verdict == HOLDS}
    )


def _interval(found: Estimate) -> dict[str, float | None]:
    return {"low": _finite(found.low), "high": _finite(found.high)}


def _finite(value: float) -> float | None:
    """Return a number as JSON has it: None for what is infinite or not known."""
    return float(value) if math.isfinite(value) else None
