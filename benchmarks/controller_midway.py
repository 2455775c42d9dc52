"""KVServe as it runs, on a way that is sent chunk by chunk: what codes a transfer may change midway.

The connector's own `Course` runs here, with its law of when to choose again, and of how often.
"""

from collections import Counter
from dataclasses import replace
from typing import Any, Final

from controller_kvserve import KVServe
from controller_link import Account
from controller_queue import Sent
from controller_scenarios import Scenario
from controller_way import Passing
from kvserve_api.selection import select
from kvserve_api.table import DecisionTable
from kvserve_connector.chunks import MAX_CHUNK_BYTES
from kvserve_connector.course import Course, Rest
from kvserve_connector.encoder import Coded
from kvserve_connector.midway import by_merit
from kvserve_connector.selector import Choice

ZEROS: Final = memoryview(bytes(2 * MAX_CHUNK_BYTES))
"""Stand for chunks' bytes: it only matters how many they are."""


class Midway(KVServe):
    """The real thing; see `KVServe`.

    Args:
        scenario: What was profiled, the budgets, and the prior.
        told: Whether it is told the link's rate of the moment when a transfer arrives.
        changes: Whether it chooses again for the rest of a transfer.
    """

    def __init__(self, scenario: Scenario, *, told: bool = False, changes: bool = True) -> None:
        super().__init__(scenario, told=told)
        self._changes = changes
        self._courses: dict[int, tuple[Passing, Course, Any]] = {}

    def sent(self, index: int, profile: str, sent: Sent) -> None:
        """Take note of a transfer."""
        self._under_way.append((index, profile, self._table, sent))

    def begins(self, passing: Passing, now_s: float) -> None:
        """Have the next chunk coded as the connector would."""
        self._until(now_s)
        if passing.index not in self._courses:
            self._courses[passing.index] = self._course(passing)
        _, course, _ = self._courses[passing.index]
        name: Any = course.pipeline(passing.begun)
        if name != passing.name:
            work = self._scenario.work(passing.index, name)
            passing.name, passing.work = name, replace(work, chunks=passing.work.chunks)

    def coded(self, passing: Passing, now_s: float) -> None:
        """Do what the connector does when a chunk was coded."""
        self._until(now_s)
        _, course, _ = self._courses[passing.index]
        course.coded(self._code(passing, len(passing.sizes)))

    def went(self, passing: Passing, now_s: float) -> None:
        """Do what the connector's server does when a chunk was sent."""
        self._until(now_s)
        _, course, account = self._courses[passing.index]
        self._watched.state.sample(account)
        course.sent(self._code(passing, passing.gone - 1))
        if passing.gone == passing.work.chunks:
            self._watched.state.detach(account)
            course.end()
            self._watched.ended(self._scenario.arrivals[passing.index].native_bytes)

    def _code(self, passing: Passing, place: int) -> Coded:
        name = passing.names[place]
        work = self._scenario.work(passing.index, name)
        pipeline: Any = name
        nbytes = round(work.wire_bytes / passing.work.chunks)
        return Coded(place, ZEROS[:nbytes], work.encode_s / passing.work.chunks, pipeline)

    def _course(self, passing: Passing) -> tuple[Passing, Course, Any]:
        native_bytes = self._scenario.arrivals[passing.index].native_bytes
        chunks = self._scenario.plan(passing.index, passing.name)
        choice = self._chosen(passing.index, self._table)
        course = Course(
            choice,
            chunks,
            [native_bytes // len(chunks)] * len(chunks),
            self._watched.state,
            self._watched.coders,
            self._table.prior_bytes_per_s,
            (lambda rest: self._again(passing, rest)) if self._changes else None,
        )
        account: Any = Account(
            passing.sent,
            self._scenario.rtt_s,
            lambda: self._watched.now_s,
            passing.sizes.__getitem__,
        )
        self._watched.state.attach(account)
        return passing, course, account

    def _chosen(self, index: int, table: DecisionTable) -> Choice:
        selection = self._selections[index]
        candidate = table.candidates[selection.profile]
        # a name stands for the pipeline: nothing is coded
        name: Any = selection.profile
        return Choice(
            selection, name, candidate.ratio, table.version, candidate.encode, candidate.decode
        )

    def _again(self, passing: Passing, rest: Rest) -> Choice | None:
        arrival = self._scenario.arrivals[passing.index]
        table = self._table
        first = passing.names[0]
        fitting = [n for n in table.candidates if self._scenario.follows(passing.index, first, n)]
        before = rest.before.selection.profile
        selection = select(
            table,
            arrival.workload,
            native_bytes=rest.native_bytes,
            link=self._link(),
            chunks=len(rest.chunks),
            decodable=frozenset(table.candidates[name].strategy.digest for name in fitting),
            incumbent=before,
            spent_s=self._watched.now_s - arrival.at_s,
        )
        if not by_merit(selection) or selection.profile == before:
            return None
        self._incumbents[arrival.workload] = selection.profile
        candidate = table.candidates[selection.profile]
        name: Any = selection.profile
        return Choice(
            selection, name, candidate.ratio, table.version, candidate.encode, candidate.decode
        )

    def _report(self, index: int, profile: str, table: DecisionTable, sent: Sent) -> Any:
        report = super()._report(index, profile, table, sent)
        passing, _, _ = self._courses.pop(index)
        counts = Counter(passing.names)
        if len(counts) > 1:
            report.shares.update({n: count / len(passing.names) for n, count in counts.items()})
        return report
