"""The selection law: which profile one transfer uses, by the pushed table and the live link.

A pure function of values, evaluated in the serving pod for each transfer; no clock, no network, no randomness: what it
needs of these is passed in.
"""

import math
from enum import StrEnum
from typing import Final, NamedTuple, TypeAlias

from kvserve_api.latency import MOST_UTILISATION, Link
from kvserve_api.policy import Goal, Mode
from kvserve_api.profile_set import DEFAULT_CLASS, NONE
from kvserve_api.table import DecisionTable

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


class Selection(NamedTuple):
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
NEAR: Final = 0.1
"""Where none is in time, one whose time and cost to others is worse than the best by no more than this share counts as
good: by less than that predictions scatter."""
EQUAL: Final = 0.01
"""Of times to minimise, those that exceed the least by no more than this share of the work count as equal: predictions
scatter by far more, and a third of the usual hysteresis leaves room for it."""
ROUNDED: Final = 1 + 1e-9
"""What rounding may take from a sum of times is far less."""
_Weighed: TypeAlias = tuple[int, str, float, float, float, float, float, tuple[float, float, float]]
"""A candidate's turn, name, time, merit, times of encoding, wire and decoding, and hopes."""
_Near: TypeAlias = tuple[float, float, float, int, str]
"""A candidate's upper limit of the loss, merit, time, order and name."""
_Late: TypeAlias = tuple[float, float, float, int, str]
"""A candidate's merit by the goal, merit by time, time, order and name."""
_BOUNDS: Final = (Bound.GOAL, Bound.GOAL, Bound.DEADLINE, Bound.UNSTABLE)
# past the arguments of a named tuple, which take as long as all else of it
_new: Final = tuple.__new__
# to look a member up in its enum takes as long as ten comparisons, and a transfer waits
_ACTIVE: Final = Mode.ACTIVE
_LATENCY: Final = Goal.MINIMIZE_LATENCY
_OFF_MODE: Final = Mode.OFF
_QUALITY: Final = Goal.MAXIMIZE_QUALITY
_SHADOW: Final = Mode.SHADOW
_KEPT: Final = Bound.KEPT
_INFINITY: Final = math.inf


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
    spent_s: float = 0.0,
) -> Selection:
    """Choose a profile for one transfer, or for what is left of it.

    The class's candidates are all within its quality budget. Of those that meet the deadline at the SLO's percentile,
    for which only what comes after the prefill's end counts, and keep every queue finite at the present load, the best
    by the goal wins; a time to minimise counts the delay that the transfer causes to those behind it, and to what
    engines compute on the processors that code, and among those that take as long as the best, within `EQUAL`, the one
    with the least loss wins. If none meets the deadline, the fastest wins, because missing by less
    is better than giving up; for another goal the best by it among those that are about as fast. If none keeps the
    queues finite, what they are now and what each adds to them decides, so that transfers divide themselves between
    link and coders.

    Args:
        table: The last acknowledged table.
        workload_class: The request's class.
        native_bytes: Native KV bytes of the transfer, or of what is left of it, at least 1.
        link: The link as known now.
        chunks: Into how many chunks that is cut.
        expired: The table's time to live has passed and the table says to revert then.
        decodable: Digests of the strategies that can be used, because the consumer can decode them; None if all.
        incumbent: The profile in use for such transfers, which another must beat by the table's hysteresis, or in loss
            within `EQUAL`.
        allowance_s: What trying out another candidate may be expected to cost now, in seconds; 0 tries nothing.
        spent_s: Seconds of the deadline that have passed already.
    """
    mode = table.mode
    if mode is _OFF_MODE:
        return _OFF
    if expired:
        return _fixed(table, table.fallback, Bound.EXPIRED, decodable)
    if table.pinned is not None:
        return _fixed(table, table.pinned, Bound.PINNED, decodable)
    rule = table.rules.get(workload_class)
    if rule is None:
        workload_class = DEFAULT_CLASS
        rule = table.rules[workload_class]
    led = table.rows[workload_class]
    rows = led.get(incumbent) or led[None]
    if decodable is not None:
        rows = tuple(row for row in rows if row[0] == NONE or _known(table, row[0], decodable))
        if not rows:
            return _fixed(table, table.fallback, Bound.PEER, decodable)

    # all of `latency.predict`, unfolded and in the same order of operations: a transfer waits for this
    bytes_per_s = link.bytes_per_s
    encode_wait_s = link.encode_backlog_s
    wire_wait_s = link.backlog_bytes / bytes_per_s
    decode_wait_s = link.decode_backlog_s
    rtt_s = link.rtt_s
    encode_factor = link.encode_factor
    encode_delays, decode_delays = link.encode_delays, link.decode_delays
    more = chunks - 1
    hidden_s = link.hidden_s
    link_load, coder_load = link.load, link.encoder_load
    link_rate, coder_rate = link_load.arrivals_per_s, coder_load.arrivals_per_s
    loaded = link_rate > 0 or coder_rate > 0
    link_share = coder_share = 0.0
    if loaded:
        link_share = link_load.native_bytes_per_s / native_bytes
        coder_share = coder_load.native_bytes_per_s / native_bytes

    by_time = rule.goal is _LATENCY
    # the deadline is of what comes after the prefill's end
    limit_s = deadline_s = rule.deadline_s + hidden_s - spent_s
    if not by_time and incumbent is not None and deadline_s < _INFINITY:
        limit_s = deadline_s / (1 + table.hysteresis)
    exploring = (
        allowance_s > 0 and rule.explore_share > 0 and mode is _ACTIVE and rule.goal is not _QUALITY
    )
    weighed: list[_Weighed] = []
    late: list[_Late] = []
    near: list[_Near] = []
    # what takes longer than this, and is no better in keeping its deadline, is neither chosen nor tried
    longest_s = _INFINITY
    surely_late_s = deadline_s * ROUNDED
    arrives_s, encoded_s = rtt_s + wire_wait_s, rtt_s + encode_wait_s
    best_name, best_s, best_merit, best_level = "", _INFINITY, _INFINITY, UNSTABLE + 1
    best_order = 0
    own_s = own_merit = own_loss = 0.0
    own_level = -1
    # the one in use comes first, so none of what is left out is it
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
        loss,
        hopes,
        order,
    ) in rows:
        if fixed is None:
            # no transfer takes less than its wire, or its encoding, alone, and no merit is better than the time
            wire_s = native_bytes / ratio / bytes_per_s
            least_s = arrives_s + wire_s
            if least_s > longest_s:
                if best_level == FITS or least_s > surely_late_s:
                    # and that of all that follow is as long
                    break
                if least_s * margin > surely_late_s:
                    continue
        elif best_level == FITS and fixed > best_merit and not exploring:
            # and that of all that follow is as bad
            break
        else:
            wire_s = native_bytes / ratio / bytes_per_s
        encode_s = offset_e + native_bytes / speed_e
        if encode_s < floor_e:
            encode_s = floor_e
        encode_s *= encode_factor
        least_s = encoded_s + encode_s
        if least_s > longest_s and (best_level == FITS or least_s * margin > surely_late_s):
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
        percentile_s = seconds * margin
        if seconds > longest_s and (best_level == FITS or percentile_s > surely_late_s):
            continue

        level = FITS
        merit = engines_s = encode_delays * encode_s + decode_delays * decode_s
        if percentile_s > limit_s:
            level = TIGHT if name != incumbent else FITS
            if percentile_s > deadline_s:
                level = LATE
        if hidden_s and (encode_s + wire_s + decode_s) / chunks * margin > rule.deadline_s:
            # the last chunk can't begin before the prefill ends
            level = LATE
        if loaded:
            busy_e, busy_w, busy_d = (
                coder_share * encode_s,
                link_share * wire_s,
                link_share * decode_s,
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
            merit = (decode_cost if decode_cost > cost else cost) + engines_s
        merit += seconds
        if fixed is not None:
            if level < LATE:
                merit = fixed
            elif level == LATE:
                late.append((fixed, merit, seconds, order, name))
        if name == incumbent:
            own_s, own_merit, own_level, own_loss = seconds, merit, level, loss
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
            if by_time and level < UNSTABLE:
                # as good as the best, or less
                longest_s = merit * (1 + EQUAL)
                if exploring and level == FITS:
                    # held against what is chosen, or against what is kept in its place
                    longest_s = (own_merit if own_merit > longest_s else longest_s) + allowance_s
                longest_s *= ROUNDED
            elif not by_time:
                # in time, the goal decides, whatever it takes
                longest_s = merit * (1 + NEAR) * ROUNDED if level == LATE else _INFINITY
        if by_time and level == FITS and merit <= best_merit * (1 + EQUAL):
            near.append((loss, merit, seconds, order, name))
        if exploring and level < LATE:
            turn = -1 if name == incumbent else order
            weighed.append((turn, name, seconds, merit, encode_s, wire_s, decode_s, hopes))

    if best_level == LATE and late:
        near_s = best_merit * (1 + NEAR)
        _, best_merit, best_s, _, best_name = min([one for one in late if one[1] <= near_s])
    bound = _BOUNDS[best_level]
    wait_s = wire_wait_s if wire_wait_s > encode_wait_s else encode_wait_s
    waiting_s = rtt_s + (decode_wait_s if decode_wait_s > wait_s else wait_s)
    # a share of the work, not of the waiting, which is the same for all
    least_merit, work_s = best_merit, best_merit - waiting_s
    least_loss = _INFINITY
    if best_level == FITS and by_time:
        most = least_merit + EQUAL * work_s
        least_loss, best_merit, best_s, _, best_name = min([one for one in near if one[1] <= most])
    if (
        by_time
        and own_level == best_level
        and best_name != incumbent
        and own_merit - least_merit <= table.hysteresis * work_s
        # or what became as fast would never take the place of what loses more
        and own_loss <= least_loss
    ):
        assert incumbent is not None
        best_name, best_s, best_merit = incumbent, own_s, own_merit
        # that a constraint is not kept is more to say than that nothing changed
        bound = _KEPT if best_level < LATE else bound
    if mode is _SHADOW:
        return _new(Selection, (NONE, best_name, bound, best_s, 0.0))
    if exploring and best_level == FITS:
        others_s = best_merit - best_s if by_time else 0.0
        if waiting_s + others_s <= QUIET * best_s:
            # what is hoped of two is seldom equal, but then the first wins: the one in use, then as the rule has them
            weighed.sort()
            tried = _explore(weighed, rule.goal, best_name, best_s, best_merit, chunks, allowance_s)
            if tried is not None:
                return tried
    return _new(Selection, (best_name, best_name, bound, best_s, 0.0))


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
    for _, name, seconds, merit, encode_s, wire_s, decode_s, (left_e, left_w, left_d) in weighed:
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


def _known(table: DecisionTable, name: str, decodable: frozenset[str]) -> bool:
    return table.candidates[name].strategy.digest in decodable


def _fixed(
    table: DecisionTable, name: str, bound: Bound, decodable: frozenset[str] | None
) -> Selection:
    """Return a profile that was not chosen by merit, or raw if the consumer can't decode it."""
    if decodable is not None and table.candidates[name].strategy.digest not in decodable:
        return Selection(profile=NONE, wanted=name, bound=Bound.PEER)
    acts = NONE if table.mode == Mode.SHADOW else name
    return Selection(profile=acts, wanted=name, bound=bound)
