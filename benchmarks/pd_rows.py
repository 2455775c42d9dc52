"""What policies got in ``make bench-pd``: a row for each policy and link, and their ratios. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Final, TypeVar

import numpy as np

from pd_load import Timing
from pd_pairs import mean_ratio, median_ratio
from pd_plan import ALONE, KVSERVE, OURS, RAW, Condition

STAGES: Final = ("encode", "wire", "decode", "total", "exposed")

Row = dict[str, Any]
Each = TypeVar("Each")


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What a policy got in one round of a condition.

    Attributes:
        timings: Of each request, in the order of arrival; `Timing.at_s` from the turn's begin.
        bytes_wire: All that passed the link, headers included.
        grown: By how much the engines' counters grew.
        per_s: How many requests arrived in a second in the mean; 0: each waited for the one before.
        prefill_s_per_token: Of the prefill engine alone, measured beside the turn.
    """

    timings: tuple[Timing, ...]
    bytes_wire: int
    grown: Mapping[str, float]
    per_s: float
    prefill_s_per_token: float


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
    turns: Sequence[Turn],
    *,
    mbit: float | None,
    losses_bp: Mapping[str, float],
    objective_s: float,
) -> Row:
    """Return what a policy got under a condition.

    ``link_s`` over ``prefills_s`` is how many times as long as its prefills a policy's transfers keep the link busy.

    Args:
        condition: The link and the load.
        policy: Its name.
        turns: What it got, at least one.
        mbit: The link's rate; None unshaped.
        losses_bp: Of each profile.
        objective_s: The bound of the time from a prefill's end to the first token, which is the policies' objective.
    """
    timings = [timing for turn in turns for timing in turn.timings]
    good = [t for t in timings if not t.error]
    grown: Counter[str] = Counter()
    for turn in turns:
        grown.update(turn.grown)
    attained = [not t.error and t.ttft_s - t.prefill_s <= objective_s for t in timings]
    arriving_s = sum(len(turn.timings) / turn.per_s for turn in turns if turn.per_s)
    prefill_s = sum(t.tokens * turn.prefill_s_per_token for turn in turns for t in turn.timings)
    return {
        "condition": condition.name,
        "bandwidth_mbit": mbit,
        "moving": condition.moving,
        "policy": policy,
        "requests": len(timings),
        "per_s": len(timings) / arriving_s if arriving_s else 0.0,
        "prefill_s_per_token": prefill_s / sum(t.tokens for t in timings),
        "link_s": 0.0 if condition.moving else _link_s(grown, mbit),
        "prefills_s": prefill_s,
        "ttft_s": percentiles([t.ttft_s for t in good]),
        "jct_s": percentiles([t.jct_s for t in good]),
        "prefill_s": percentiles([t.prefill_s for t in good if t.prefill_s]),
        "bytes_wire": sum(turn.bytes_wire for turn in turns),
        "errors": len(timings) - len(good),
        "recomputed": int(sum(v for k, v in grown.items() if "failures{receive" in k)),
        "profiles": _used(grown),
        "loss_bp": mean_loss_bp(grown, losses_bp),
        "attained": sum(attained) / len(timings),
        "stages_s": _stages_s(grown),
        "rounds": [
            {
                "requests": len(turn.timings),
                "prefill_s_per_token": turn.prefill_s_per_token,
                "per_s": turn.per_s,
                "profiles": _used(turn.grown),
                "loss_bp": mean_loss_bp(turn.grown, losses_bp),
                "stages_s": _stages_s(turn.grown),
            }
            for turn in turns
        ],
        "at_each_s": [round(t.at_s, 4) for t in timings],
        "tokens_each": [t.tokens for t in timings],
        "attained_each": attained,
        "jct_each_s": [round(t.jct_s, 4) if not t.error else None for t in timings],
        "ttft_each_s": [round(t.ttft_s, 4) if not t.error else None for t in timings],
        "prefill_each_s": [round(t.prefill_s, 4) if not t.error else None for t in timings],
    }


def mean_loss_bp(grown: Mapping[str, float], losses_bp: Mapping[str, float]) -> float:
    """Return the mean over native bytes of the loss of what coded them, in basis points; none of no transfers.

    A transfer whose rest was chosen for again has bytes of several profiles.

    Args:
        grown: By how much the engines' counters grew.
        losses_bp: Of each profile.
    """
    native = _received("native_bytes", grown)
    total = sum(native.values())
    return sum(losses_bp[name] * each for name, each in native.items()) / total if total else 0.0


def by_round(one: Mapping[str, Any], each: Sequence[Each]) -> list[Sequence[Each]]:
    """Return a value for each request of a row, by rounds."""
    edges = [0, *accumulate(part["requests"] for part in one["rounds"])]
    return [each[a:b] for a, b in pairwise(edges)]


def pairs(one: Row, other: Row) -> list[list[tuple[float, float]]]:
    """Return by rounds the completion times of the requests that both answered; the shorter row gives the rounds."""
    # requests of a round are the same for all policies, but not all policies have a turn in every round
    shorter = min(one, other, key=lambda row: row["requests"])
    both = list(zip(one["jct_each_s"], other["jct_each_s"], strict=False))
    return [[(a, b) for a, b in part if a and b] for part in by_round(shorter, both)]


def paired(one: Row, other: Row) -> list[tuple[float, float]]:
    """Return the completion times of the requests that both answered."""
    return [pair for part in pairs(one, other) for pair in part]


def groups(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Return rows by condition and policy."""
    found: dict[str, dict[str, Row]] = {}
    for one in rows:
        found.setdefault(one["condition"], {})[one["policy"]] = one
    return found


def vs_raw(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Return for each condition and policy how many times shorter its median completion time is than raw's."""
    return {
        name: {
            policy: group[RAW]["jct_s"]["p50"] / one["jct_s"]["p50"]
            for policy, one in group.items()
            if policy != RAW
        }
        for name, group in groups(rows).items()
        if RAW in group
    }


def best_static(group: Mapping[str, Row], lossy: Iterable[str]) -> Row | None:
    """Return the fixed profile, raw included, against which KVServe does worst by mean completion times.

    Args:
        group: One condition's rows by policy; means are of the requests that both answered.
        lossy: Policies beyond the quality budget, which can't be chosen.
    """
    ours = group.get(KVSERVE)
    if ours is None:
        return None
    able = [
        one
        for policy, one in group.items()
        if policy not in (*OURS, ALONE, *lossy) and not one["errors"] and paired(ours, one)
    ]
    return max(able, key=lambda one: mean_ratio(paired(ours, one)), default=None)


def vs_best_static(rows: Iterable[Row], lossy: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return for each condition KVServe's completion time over that of the best fixed profile in hindsight.

    Returns:
        ``times`` by means, ``pair_by_pair`` the median of the requests' ratios.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, group in groups(rows).items():
        best = best_static(group, lossy)
        if best is not None:
            both = paired(group[KVSERVE], best)
            found[name] = {
                "static": best["policy"],
                "times": mean_ratio(both),
                "pair_by_pair": median_ratio(both),
            }
    return found


def _used(grown: Mapping[str, float]) -> dict[str, int]:
    """Return of how many transfers each profile coded all or a part."""
    return {name: int(value) for name, value in _received("transfers", grown).items()}


def _received(counter: str, grown: Mapping[str, float]) -> dict[str, float]:
    """Return by profile how much a counter of what was received grew."""
    start = f"{counter}{{receive,"
    return {
        key.removeprefix(start).rstrip("}"): value
        for key, value in grown.items()
        if key.startswith(start)
    }


def _stages_s(grown: Mapping[str, float]) -> dict[str, float]:
    return {
        stage: sum(v for k, v in grown.items() if k.startswith(f"{stage}_seconds{{"))
        for stage in STAGES
    }


def _link_s(grown: Mapping[str, float], mbit: float | None) -> float:
    """Return for how long what was received keeps the link busy, without headers; 0 unshaped."""
    # not the seconds between a transfer's begin and end: those of others pass the link meanwhile
    received = sum(_received("wire_bytes", grown).values())
    return received * 8 / (mbit * 1e6) if mbit else 0.0
