"""KVServe as it runs, in the replay's time: the pod's selection and link, and the controller's `Program` behind it.

What a pod knows at once (its link, its queue) it uses at once. The controller hears of transfers as the connector
reports them, in one batch a second, and pushes a table when its own rules say so, looking twice a second; the pod has
it a little later. Nothing here decides, but for whether a link is worth a probe, as `kvserve_connector.choices` does
for a real PULL: all else only carries values at the times at which they would arrive.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from controller_link import FREE, WatchedLink
from controller_profiles import MODEL
from controller_queue import Sent
from controller_replay import Queues
from controller_scenarios import PERCENTILE, Arrival, Scenario, chunks_of
from kvserve_api.latency import Link
from kvserve_api.policy import Policy
from kvserve_api.profile_set import DEFAULT_CLASS, NONE
from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.rpc.messages import version_to_message
from kvserve_api.selection import Bound, Selection, select
from kvserve_api.table import DecisionTable
from kvserve_connector.choices import FASTER
from kvserve_connector.control import REPORT_EVERY_S
from kvserve_connector.loads import Credit
from kvserve_connector.midway import by_merit
from kvserve_controller.program import Instant, Program
from kvserve_controller.server import TICK_S
from kvserve_controller.source import Entry
from kvserve_controller.versions import VersionClock

REPORT_DELAY_S: Final = 0.1
PUSH_DELAY_S: Final = 0.2


class KVServe:
    """The real thing, or less of it.

    Args:
        scenario: What was profiled, the budgets, and the prior.
        residuals: Whether controller and pod learn from transfers what codecs really take.
        backlog: Whether the pod knows what is queued, and how much is asked for.
        bandit: Whether it may explore.
        told: Whether the pod is told the link's rate of the moment, in place of what it has seen of it.
    """

    def __init__(
        self,
        scenario: Scenario,
        *,
        residuals: bool = True,
        backlog: bool = True,
        bandit: bool = True,
        told: bool = False,
    ) -> None:
        self._scenario = scenario
        self._told = told
        self._residuals = residuals
        self._backlog = backlog
        self._watched = WatchedLink(scenario.rtt_s)
        self._queues: Queues | None = None
        self._workload = DEFAULT_CLASS
        self._watched.ended = self._ended
        self._program = Program(
            "default/bench",
            prior_bytes_per_s=scenario.prior_bytes_per_s,
            next_version=VersionClock(1.0).next,
        )
        entry = Entry(
            policy=policy(scenario.budgets_bp, bandit=bandit, objective_s=scenario.objective_s),
            pareto=scenario.pareto,
            generation=1,
        )
        self._program.load(entry, Instant(0.0, 0.0))
        if self._program.problem is not None:
            raise self._program.problem
        self._table = self._in_force()
        self._pushed: deque[tuple[float, DecisionTable]] = deque()
        self._selections: dict[int, Selection] = {}
        self._incumbents: dict[str, str] = {}
        self._credits: dict[str, Credit] = {}
        self._under_way: list[tuple[int, str, DecisionTable, Sent]] = []
        self._reports: list[Any] = []
        self._posted: deque[tuple[float, list[Any]]] = deque()
        self._next_post_s = REPORT_EVERY_S
        self._next_tick_s = TICK_S

    def choose(self, index: int, arrival: Arrival, tandem: Queues) -> str:
        """Return what the pod selects."""
        self._queues = tandem
        self._until(arrival.at_s)
        self._workload = arrival.workload
        known = self._link()
        if self._told:
            known = replace(known, bytes_per_s=tandem.capacity.at(arrival.at_s))
        table, workload = self._table, arrival.workload
        credit = self._credits.setdefault(workload, Credit())
        selection = select(
            table,
            workload,
            native_bytes=arrival.native_bytes,
            link=known,
            chunks=chunks_of(arrival.native_bytes),
            incumbent=self._incumbents.get(workload),
            allowance_s=credit.allowance_s(),
        )
        share = table.rules[workload].explore_share
        credit.settle(selection.predicted_s, selection.extra_s, share)
        if selection.bound is not Bound.EXPLORED:
            self._incumbents[workload] = selection.wanted
        for arrivals in (self._watched.state.arrivals, self._watched.coders.arrivals):
            arrivals.add(arrival.at_s, arrival.native_bytes)
        self._selections[index] = selection
        return selection.profile

    def sent(self, index: int, profile: str, sent: Sent) -> None:
        """Take note of a transfer."""
        candidate = self._table.candidates[profile]
        native = self._scenario.arrivals[index].native_bytes
        self._watched.promise(
            sent,
            native / candidate.ratio,
            FREE if profile == NONE else candidate.encode,
            candidate.decode,
            native,
        )
        self._under_way.append((index, profile, self._table, sent))

    def _ended(self, native_bytes: int) -> None:
        """Probe the link, as the connector would when a transfer has ended."""
        state, table = self._watched.state, self._table
        if self._queues is None or not state.unsure:
            return
        known = self._link()
        now, then = (
            select(
                table,
                self._workload,
                native_bytes=native_bytes,
                link=replace(known, bytes_per_s=faster * known.bytes_per_s),
                chunks=chunks_of(native_bytes),
                incumbent=self._incumbents.get(self._workload),
            )
            for faster in (1.0, FASTER)
        )
        if by_merit(now) and now.profile != then.profile:
            state.wish_probe()
            self._watched.probe(self._queues)

    def _link(self) -> Link:
        """Return what the pod knows of the link, and of its coder: there is one of each."""
        self._watched.coders.follow(self._table)
        known = self._watched.link(self._table.prior_bytes_per_s)
        if not self._backlog:
            known = Link(
                bytes_per_s=known.bytes_per_s,
                rtt_s=known.rtt_s,
                encode_factor=known.encode_factor,
            )
        return known if self._residuals else replace(known, encode_factor=1.0)

    def _until(self, now_s: float) -> None:
        """Let everything happen that happens by now, in its order."""
        while (at_s := min(self._next_post_s, self._next_tick_s)) <= now_s:
            if at_s == self._next_post_s:
                self._watched.until(at_s)
                self._collect(at_s)
                if self._reports:
                    self._posted.append((at_s + REPORT_DELAY_S, self._reports))
                    self._reports = []
                self._next_post_s += REPORT_EVERY_S
            else:
                self._tick(at_s)
                self._next_tick_s += TICK_S
        self._watched.until(now_s)
        while self._pushed and self._pushed[0][0] <= now_s:
            self._table = self._pushed.popleft()[1]

    def _tick(self, now_s: float) -> None:
        now = Instant(now_s, now_s)
        while self._posted and self._posted[0][0] <= now_s:
            messages = self._posted.popleft()[1]
            if self._residuals:
                self._program.observe(messages, now, consumer="consumer")
        if self._program.tick(now) is not None:
            self._pushed.append((now_s + PUSH_DELAY_S, self._in_force()))

    def _collect(self, now_s: float) -> None:
        """Report the transfers that have ended."""
        still = []
        for entry in self._under_way:
            if entry[3].done_s <= now_s:
                self._reports.append(self._report(*entry))
            else:
                still.append(entry)
        self._under_way = still

    def _report(self, index: int, profile: str, table: DecisionTable, sent: Sent) -> Any:
        arrival, selection = self._scenario.arrivals[index], self._selections[index]
        return pb.TransferReport(
            workload=arrival.workload,
            profile=profile,
            wanted=selection.wanted,
            bound=selection.bound.value,
            version=version_to_message(table.version),
            producer="producer",
            native_bytes=arrival.native_bytes,
            wire_bytes=max(1, int(sent.work.wire_bytes)),
            encode_s=sent.work.encode_s,
            wire_s=sum(end_s - start_s for _, start_s, end_s in sent.link),
            decode_s=sent.work.decode_s,
            total_s=sent.total_s,
            predicted_s=selection.predicted_s,
            goodput_bytes_per_s=self._watched.link(table.prior_bytes_per_s).bytes_per_s,
        )

    def _in_force(self) -> DecisionTable:
        table = self._program.table
        assert table is not None
        return table


def policy(
    budgets_bp: Mapping[str, int], *, bandit: bool = True, objective_s: float | None = None
) -> Policy:
    """Return the policy of a scenario; all but what is given is the default."""
    slo: dict[str, Any] = {}
    if objective_s is not None:
        objective = {
            "name": "transfer",
            "metric": "KVTransferTime",
            "percentile": PERCENTILE,
            "thresholdMilliseconds": round(objective_s * 1000),
        }
        slo = {"slo": {"goal": "MaximizeQuality", "objectives": [objective]}}
    return Policy.from_object(
        {
            "apiVersion": "kvserve.io/v1alpha1",
            "kind": "KVServePolicy",
            "metadata": {"name": "bench", "namespace": "default"},
            "spec": {
                "model": {"name": MODEL},
                "targets": [
                    {"role": role, "selector": {"matchLabels": {"app": role.lower()}}}
                    for role in ("Prefill", "Decode")
                ],
                "quality": {"maxLossBasisPoints": budgets_bp["default"]},
                "control": {} if bandit else {"exploration": {"maxBasisPoints": 0}},
                "workloads": [
                    {"name": name, "quality": {"maxLossBasisPoints": budget_bp}}
                    for name, budget_bp in budgets_bp.items()
                    if name != "default"
                ],
                **slo,
            },
        }
    )
