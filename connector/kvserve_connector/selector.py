"""The table in force in this pod, and the choice it makes for each transfer: arithmetic on values that never change."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from kvserve_api.decision import Decision
from kvserve_api.latency import Link, StageCost
from kvserve_api.policy import Mode
from kvserve_api.profile_set import DEFAULT_CLASS, NONE
from kvserve_api.selection import RAW, Bound, Selection, select
from kvserve_api.table import DecisionTable, OnControllerLoss, Version
from kvserve_connector.coding import raw_pipeline
from kvserve_connector.loads import Credit
from kvserve_connector.midway import by_merit
from kvserve_connector.ready import ReadyTable
from kvserve_strategies import Pipeline

DEFAULT_BYTES_PER_S: Final = 125e6
"""Goodput to assume of an unmeasured link without a table: 1 Gbit/s."""
MAX_INCUMBENTS: Final = 1024
"""For so many pairs of consumer and workload class it is remembered which profile is in use."""
MAX_DECISIONS: Final = 50
"""So many of the latest decisions are kept for the controller, which takes them once a second."""
MOST_ALLOWANCE_S: Final = 1e6
_FREE: Final = StageCost()
# past the arguments of a named tuple, which take as long as all else of it
_new: Final = tuple.__new__
# to look a member up in its enum takes as long as ten comparisons, and a transfer waits
_EXPLORED: Final = Bound.EXPLORED
_REVERT: Final = OnControllerLoss.REVERT


class Choice(NamedTuple):
    """What one transfer uses.

    Attributes:
        selection: The profile, and why.
        pipeline: What codes it.
        ratio: The ratio to expect.
        version: Of the table that decided; None without one.
        encode: The cost of encoding to expect.
        decode: The cost of decoding to expect.
    """

    selection: Selection
    pipeline: Pipeline
    ratio: float
    version: Version | None
    encode: StageCost = _FREE
    decode: StageCost = _FREE


class Selector:
    """Holds the table in force and chooses by it.

    Args:
        now_s: A clock that never goes back.
        wall_s: Seconds since 1970, for the record.

    Attributes:
        decisions: The latest ones, for whoever takes them away.
    """

    def __init__(
        self,
        now_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self.decisions: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        self._now_s = now_s
        self._wall_s = wall_s
        self._ready: ReadyTable | None = None
        self._heard_s = 0.0
        self._credits: dict[str, Credit] = {}
        self._incumbents: dict[tuple[str, str], str] = {}

    @property
    def table(self) -> DecisionTable | None:
        """The table in force."""
        ready = self._ready
        return None if ready is None else ready.table

    @property
    def ready(self) -> ReadyTable | None:
        """The table in force, with what it needs."""
        return self._ready

    @property
    def age_s(self) -> float:
        """Seconds since the controller was last heard of; 0 without a table."""
        return 0.0 if self._ready is None else self._now_s() - self._heard_s

    @property
    def prior_bytes_per_s(self) -> float:
        """Goodput to assume of a link nobody has measured."""
        ready = self._ready
        return DEFAULT_BYTES_PER_S if ready is None else ready.table.prior_bytes_per_s

    def install(self, ready: ReadyTable) -> None:
        """Put a table in force; its time to live starts now."""
        self._heard_s = self._now_s()
        self._ready = ready

    def renew(self, version: Version) -> None:
        """Start the time to live of the table in force anew, if it is of this version."""
        ready = self._ready
        if ready is not None and ready.table.version == version:
            self._heard_s = self._now_s()

    def drop(self) -> None:
        """Have no table from now on: everything is sent raw."""
        self._ready = None

    def choose(
        self,
        workload: str,
        *,
        native_bytes: int,
        link: Link,
        chunks: int,
        stages: frozenset[str],
        bundles: frozenset[str] = frozenset(),
        peer: str = "",
        guess: bool = False,
    ) -> Choice:
        """Choose for one transfer; microseconds, no I/O, no lock.

        Trying out is decided by a counter and a credit, so that it keeps its share and a choice can be repeated.

        Args:
            workload: The request's class.
            native_bytes: Native KV bytes of the transfer.
            link: The link as known now.
            chunks: Into how many chunks the transfer is cut.
            stages: What the consumer can decode.
            bundles: The calibration bundles that it has.
            peer: Who it is: what is in use is remembered for each.
            guess: Only ask what would be chosen now: nothing is tried out, nothing remembered.
        """
        ready = self._ready
        if ready is None:
            return Choice(selection=RAW, pipeline=raw_pipeline(), ratio=1.0, version=None)
        full = ready.table
        expired = full.on_controller_loss is _REVERT and self._now_s() - self._heard_s > full.ttl_s
        table = ready.decodable(stages, bundles)
        rule = table.rules.get(workload)
        if rule is None:
            workload = DEFAULT_CLASS
            rule = table.rules[workload]
        key = (workload, peer)
        credit: Credit | None = None
        if rule.explore_share and not guess:
            credit = self._credits.get(workload) or self._credits.setdefault(workload, Credit())
        incumbent = self._incumbents.get(key)
        allowance_s = 0.0 if credit is None else credit.allowance_s()
        selection = select(
            table,
            workload,
            native_bytes=native_bytes,
            link=link,
            chunks=chunks,
            expired=expired,
            incumbent=incumbent,
            allowance_s=allowance_s,
        )
        if credit is not None:
            credit.settle(selection.predicted_s, selection.extra_s, rule.explore_share)
        wanted = selection.wanted
        # what is in use mostly stays so
        if wanted != incumbent and not guess and selection.bound is not _EXPLORED:
            if len(self._incumbents) >= MAX_INCUMBENTS and key not in self._incumbents:
                self._incumbents.clear()
            self._incumbents[key] = wanted
        if table is not full and selection.profile == NONE:
            selection = _explain(selection, full, ready.pipelines)
        if not guess:
            self.decisions.append(
                _new(
                    Decision,
                    (
                        self._wall_s(),
                        full.version,
                        peer,
                        workload,
                        native_bytes,
                        chunks,
                        link,
                        rule.candidates,
                        incumbent or "",
                        # what a new class may spend is not limited yet
                        allowance_s if allowance_s < MOST_ALLOWANCE_S else MOST_ALLOWANCE_S,
                        selection,
                        0.0,
                        0.0,
                    ),
                )
            )
        return _chosen(ready, selection)

    def choose_rest(
        self,
        workload: str,
        *,
        before: Choice,
        before_bytes_per_s: float,
        native_bytes: int,
        link: Link,
        chunks: int,
        follows: Callable[[Pipeline], bool],
        spent_s: float,
        stages: frozenset[str],
        bundles: frozenset[str] = frozenset(),
        peer: str = "",
    ) -> Choice | None:
        """Choose again for the rest of a transfer, by the table in force now; nothing is tried out.

        Args:
            workload: The request's class.
            before: The choice until now.
            before_bytes_per_s: The link's goodput for which that was made.
            native_bytes: Native KV bytes of the rest.
            link: The link as known now.
            chunks: The chunks of the rest.
            follows: Tells of a pipeline whether it can code these.
            spent_s: Seconds of the deadline that have passed.
            stages: What the consumer can decode.
            bundles: The calibration bundles that it has.
            peer: Who it is.

        Returns:
            None to go on as before, also where the table in force chooses by nothing that the link is.
        """
        ready = self._ready
        if ready is None:
            return None
        full = ready.table
        expired = full.on_controller_loss is _REVERT and self.age_s > full.ttl_s
        if full.mode is not Mode.ACTIVE or expired:
            return None
        workload = workload if workload in full.rules else DEFAULT_CLASS
        incumbent = before.selection.profile
        able = {name: each.digest for name, each in ready.pipelines.items() if follows(each)}
        selection = select(
            ready.decodable(stages, bundles),
            workload,
            native_bytes=native_bytes,
            link=link,
            chunks=chunks,
            decodable=frozenset(able.values()),
            incumbent=incumbent,
            spent_s=spent_s,
        )
        if not by_merit(selection):
            return None
        self.decisions.append(
            Decision(
                wall_s=self._wall_s(),
                version=full.version,
                peer=peer,
                workload=workload,
                native_bytes=native_bytes,
                chunks=chunks,
                link=link,
                candidates=tuple(c for c in full.rules[workload].candidates if c in able),
                incumbent=incumbent,
                allowance_s=0.0,
                selection=selection,
                spent_s=spent_s,
                before_bytes_per_s=before_bytes_per_s,
            )
        )
        if selection.profile == incumbent:
            return None
        self._incumbents[workload, peer] = selection.profile
        return _chosen(ready, selection)

    def has_deadline(self, workload: str) -> bool:
        """Tell whether transfers of a class are to keep an objective."""
        ready = self._ready
        return ready is not None and ready.table.rule(workload).deadline_s < math.inf

    def layer_steps(
        self, workload: str, stages: frozenset[str], bundles: frozenset[str] = frozenset()
    ) -> tuple[int, ...]:
        """Return how many layers each profile codes together that a transfer to a consumer may use."""
        ready = self._ready
        if ready is None:
            return ()
        rule = ready.decodable(stages, bundles).rule(workload)
        return tuple(ready.pipelines[name].layer_step for name in rule.candidates)


def _chosen(ready: ReadyTable, selection: Selection) -> Choice:
    name = selection.profile
    candidate = ready.table.candidates[name]
    return _new(
        Choice,
        (
            selection,
            ready.pipelines[name],
            candidate.ratio,
            ready.table.version,
            candidate.encode,
            candidate.decode,
        ),
    )


def _explain(
    selection: Selection, full: DecisionTable, pipelines: Mapping[str, Pipeline]
) -> Selection:
    """Say why a fixed profile had to give way to raw: the kind of this cache, or the peer."""
    wanted = {Bound.PINNED: full.pinned, Bound.EXPIRED: full.fallback}.get(selection.bound)
    if wanted is None or wanted == NONE:
        return selection
    bound = Bound.PEER if wanted in pipelines else Bound.OPAQUE
    return selection._replace(wanted=wanted, bound=bound)
