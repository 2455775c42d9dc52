"""The selection law: which profile one transfer uses, by the pushed table and the live link.

A pure function of values, evaluated in the serving pod for each transfer; no clock, no network, no randomness: what it
needs of these is passed in.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeAlias

from kvserve_api.latency import MOST_UTILISATION, Link
from kvserve_api.policy import Goal, Mode
from kvserve_api.profile_set import NONE
from kvserve_api.table import DecisionTable, Row

LEAST_GAIN: Final = 0.5
"""What it could gain then must be half of what it is believed to lose, or its chance is below one in four."""
QUIET: Final = 0.5
"""Nothing is tried out where waiting, the transfer's own and that of those behind it, is more than this share of it."""


class Bound(StrEnum):
    """What decided a selection."""

    GOAL = "Goal"
    KEPT = "Kept"
    EXPLORED = "Explored"
    DEADLINE = "DeadlineUnmet"
    UNSTABLE = "LoadUnmet"
    PINNED = "Pinned"
    OFF = "Off"
    EXPIRED = "TableExpired"
    NO_TABLE = "NoTable"
    PEER = "PeerCannotDecode"
    OPAQUE = "OpaqueCache"


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What was chosen for one transfer, and why.

    Attributes:
        profile: The name of the profile to use.
        wanted: The name the policy would use if it acted; differs from ``profile`` in mode Shadow only.
        bound: What decided.
        predicted_s: The predicted time of ``wanted``, in seconds; 0 where nothing was predicted.
        extra_s: What trying it out is expected to cost beyond the best, in seconds.
    """

    profile: str
    wanted: str
    bound: Bound
    predicted_s: float = 0.0
    extra_s: float = 0.0


RAW: Final = Selection(profile=NONE, wanted=NONE, bound=Bound.NO_TABLE)
"""The selection of a pod that has no table."""
_OFF: Final = Selection(profile=NONE, wanted=NONE, bound=Bound.OFF)

# how far a candidate is from what is asked: a lower level wins, whatever the goal
FITS: Final = 0
TIGHT: Final = 1
"""In time, but by so little that it does not take the place of a profile in use."""
LATE: Final = 2
UNSTABLE: Final = 3
SAFE: Final = 1 - 1e-9
"""What rounding may add to a sum of times is far less."""
_Weighed: TypeAlias = tuple[str, float, float, float, float, float, tuple[float, float, float]]
"""A candidate's name, time, merit, times of encoding, wire and decoding, and hopes."""
_BOUNDS: Final = (Bound.GOAL, Bound.GOAL, Bound.DEADLINE, Bound.UNSTABLE)


def select(
    table: DecisionTable,
    workload_class: str,
    *,
    native_bytes: int,
    link: Link,
    chunks: int = 1,
    expired: bool = False,
    decodable: frozenset[str] | None = None,
    incumbent: str | None = None,
    allowance_s: float = 0.0,
) -> Selection:
    """Choose a profile for one transfer.

    The class's candidates are all within its quality budget. Of those that meet the deadline at the SLO's percentile
    and keep every queue finite at the present load, the best by the goal wins; a time to minimise counts the delay
    that the transfer causes to those behind it, and to what engines compute on the processors that code. If none meets
    the deadline the fastest wins, because missing by less is better than giving up; if none keeps the queues finite,
    what they are now and what each adds to them decides, so that transfers divide themselves between link and coders.

    Args:
        table: The last acknowledged table.
        workload_class: The request's class.
        native_bytes: Native KV bytes of the transfer, at least 1.
        link: The link as known now.
        chunks: Into how many chunks the transfer is cut.
        expired: The table's time to live has passed and the table says to revert then.
        decodable: Digests of the strategies that the consumer can decode; None if all.
        incumbent: The profile in use for such transfers, which another must beat by the table's hysteresis.
        allowance_s: What trying out another candidate may be expected to cost now, in seconds; 0 tries nothing.
    """
    if table.mode == Mode.OFF:
        return _OFF
    if expired:
        return _fixed(table, table.fallback, Bound.EXPIRED, decodable)
    if table.pinned is not None:
        return _fixed(table, table.pinned, Bound.PINNED, decodable)
    rows = table.rows.get(workload_class)
    if rows is None:
        workload_class = "default"
        rows = table.rows[workload_class]
    rule = table.rules[workload_class]
    if decodable is None:
        rows = table.led[workload_class].get(incumbent or "", rows)
    else:
        rows = tuple(row for row in rows if row.name == NONE or _known(table, row, decodable))
    if not rows:
        return _fixed(table, table.fallback, Bound.PEER, decodable)

    # all of `latency.predict`, unfolded and in the same order of operations: a transfer waits for this
    bytes_per_s = link.bytes_per_s
    encode_wait_s = link.encode_backlog_s
    wire_wait_s = link.backlog_bytes / bytes_per_s
    decode_wait_s = link.decode_backlog_s
    rtt_s = link.rtt_s
    encode_factor = link.encode_factor
    waiting_s = rtt_s + max(encode_wait_s, wire_wait_s, decode_wait_s)
    more = chunks - 1
    deadline_s = rule.deadline_s
    limit_s = deadline_s
    if incumbent is not None and deadline_s < math.inf and rule.goal is not Goal.MINIMIZE_LATENCY:
        limit_s = deadline_s / (1 + table.hysteresis)
    link_rate, coder_rate = link.load.arrivals_per_s, link.encoder_load.arrivals_per_s
    link_load = link.load.native_bytes_per_s / native_bytes
    coder_load = link.encoder_load.native_bytes_per_s / native_bytes
    loaded = link_rate > 0 or coder_rate > 0
    encode_delays, decode_delays = link.encode_delays, link.decode_delays

    exploring = allowance_s > 0 and rule.explore_share > 0 and table.mode is Mode.ACTIVE
    weighed: list[_Weighed] = []
    # what is worse than the best by more than trying it out may cost is neither chosen nor tried
    spare_s = allowance_s if exploring else 0.0
    least_worse_s = math.inf
    prunes = rule.goal is Goal.MINIMIZE_LATENCY
    arrives_s, encoded_s = rtt_s + wire_wait_s, rtt_s + encode_wait_s
    best_name, best_s, best_merit, best_level = "", math.inf, math.inf, UNSTABLE + 1
    best_order = 0
    own_s = own_merit = 0.0
    own_level = -1
    for (
        name,
        ratio,
        floor_e,
        offset_e,
        speed_e,
        floor_d,
        offset_d,
        speed_d,
        margin,
        fixed,
        hopes,
        order,
    ) in rows:
        wire_s = native_bytes / ratio / bytes_per_s
        # no transfer takes less than its wire, or its encoding, alone, and no merit is better than the time
        least_s = (arrives_s + wire_s) * SAFE
        if (
            least_s > least_worse_s
            and name != incumbent
            and (best_level == FITS or least_s * margin > deadline_s)
        ):
            continue
        encode_s = offset_e + native_bytes / speed_e
        if encode_s < floor_e:
            encode_s = floor_e
        encode_s *= encode_factor
        if (
            best_level == FITS
            and (encoded_s + encode_s) * SAFE > least_worse_s
            and name != incumbent
        ):
            continue
        decode_s = offset_d + native_bytes / speed_d
        if decode_s < floor_d:
            decode_s = floor_d
        slow_s = wire_s if wire_s > decode_s else decode_s
        seconds = wire_wait_s + (wire_s + decode_s + more * slow_s) / chunks
        if encode_s > slow_s:
            slow_s = encode_s
        whole_s = encode_wait_s + (encode_s + wire_s + decode_s + more * slow_s) / chunks
        if whole_s > seconds:
            seconds = whole_s
        if decode_wait_s:
            last_s = decode_wait_s + (decode_s + more * decode_s) / chunks
            if last_s > seconds:
                seconds = last_s
        seconds = rtt_s + seconds
        if seconds > least_worse_s and best_level == FITS and name != incumbent:
            continue

        level = FITS
        engines_s = encode_delays * encode_s + decode_delays * decode_s
        merit = seconds + engines_s
        if seconds * margin > limit_s:
            level = TIGHT if name != incumbent else FITS
            if seconds * margin > deadline_s:
                level = LATE
        if loaded:
            busy_e, busy_w, busy_d = (
                coder_load * encode_s,
                link_load * wire_s,
                link_load * decode_s,
            )
            busy = busy_e if busy_e > busy_w else busy_w
            if busy_d > busy:
                busy = busy_d
            if busy > MOST_UTILISATION:
                level = UNSTABLE
            cost = coder_rate * encode_s * (encode_wait_s + encode_s)
            wire_cost = link_rate * wire_s * (wire_wait_s + wire_s)
            if wire_cost > cost:
                cost = wire_cost
            decode_cost = link_rate * decode_s * (decode_wait_s + decode_s)
            merit = seconds + ((decode_cost if decode_cost > cost else cost) + engines_s)
        if level < LATE and fixed is not None:
            merit = fixed
        if level < best_level or (
            level == best_level
            and (
                merit < best_merit
                or (
                    merit == best_merit
                    and (seconds < best_s or (seconds == best_s and order < best_order))
                )
            )
        ):
            best_name, best_s, best_merit, best_level = name, seconds, merit, level
            best_order = order
            if prunes and level < UNSTABLE:
                least_worse_s = merit + spare_s
        if name == incumbent:
            own_s, own_merit, own_level = seconds, merit, level
        if exploring and level < LATE:
            weighed.append((name, seconds, merit, encode_s, wire_s, decode_s, hopes))

    bound = _BOUNDS[best_level]
    if (
        own_level == best_level
        and best_name != incumbent
        and rule.goal is Goal.MINIMIZE_LATENCY
        # a share of the work, not of the waiting, which is the same for all
        and own_merit - best_merit <= table.hysteresis * (best_merit - waiting_s)
    ):
        assert incumbent is not None
        best_name, best_s, best_merit = incumbent, own_s, own_merit
        # that a constraint is not kept is more to say than that nothing changed
        bound = Bound.KEPT if best_level < LATE else bound
    if table.mode == Mode.SHADOW:
        return Selection(profile=NONE, wanted=best_name, bound=bound, predicted_s=best_s)
    others_s = best_merit - best_s if rule.goal is Goal.MINIMIZE_LATENCY else 0.0
    if exploring and best_level == FITS and waiting_s + others_s <= QUIET * best_s:
        tried = _explore(weighed, rule.goal, best_name, best_s, best_merit, chunks, allowance_s)
        if tried is not None:
            return tried
    return Selection(profile=best_name, wanted=best_name, bound=bound, predicted_s=best_s)


def _explore(
    weighed: list[_Weighed],
    goal: Goal,
    best: str,
    best_s: float,
    best_merit: float,
    chunks: int,
    allowance_s: float,
) -> Selection | None:
    """Return the candidate that could be best, in place of the one believed to be; None if there is none to afford.

    Optimism in the face of uncertainty (upper confidence bounds, Auer et al. 2002) among the candidates that keep
    every constraint as believed, so that no deadline is staked on hope.
    """
    chosen: Selection | None = None
    least = best_merit
    for name, seconds, merit, encode_s, wire_s, decode_s, (left_e, left_w, left_d) in weighed:
        if name == best:
            continue
        if goal is Goal.MINIMIZE_LATENCY:
            extra_s = merit - best_merit
            if extra_s > allowance_s:
                continue
            saved = (encode_s * (1 - left_e), wire_s * (1 - left_w), decode_s * (1 - left_d))
            # what the slowest stage saves is saved in full, of the others one chunk
            slowest = max(zip((encode_s, wire_s, decode_s), saved, strict=True))[1]
            saved_s = slowest + (sum(saved) - slowest) / chunks
            hoped = merit - saved_s
            if saved_s - extra_s < LEAST_GAIN * extra_s:
                continue
        elif goal is Goal.MINIMIZE_BYTES:
            extra_s = seconds - best_s
            hoped = merit / left_w
        else:
            continue
        if hoped < least and extra_s <= allowance_s:
            least = hoped
            chosen = Selection(
                profile=name,
                wanted=name,
                bound=Bound.EXPLORED,
                predicted_s=seconds,
                extra_s=max(0.0, extra_s),
            )
    return chosen


def _known(table: DecisionTable, row: Row, decodable: frozenset[str]) -> bool:
    return table.candidates[row.name].strategy.digest in decodable


def _fixed(
    table: DecisionTable, name: str, bound: Bound, decodable: frozenset[str] | None
) -> Selection:
    """Return a profile that was not chosen by merit, or raw if the consumer can't decode it."""
    if decodable is not None and table.candidates[name].strategy.digest not in decodable:
        return Selection(profile=NONE, wanted=name, bound=Bound.PEER)
    acts = NONE if table.mode == Mode.SHADOW else name
    return Selection(profile=acts, wanted=name, bound=bound)
