"""What the controller counts."""

from collections.abc import Iterable, Mapping

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from kvserve_api import telemetry
from kvserve_api.otel import counter
from kvserve_api.table import Role
from kvserve_controller.counts import Counts
from kvserve_controller.session import Outcome


class Metrics:
    """The controller's instruments."""

    def __init__(self) -> None:
        meter = metrics.get_meter("kvserve.controller")
        self._pushes = counter(meter, telemetry.CONTROLLER_PUSHES)
        self._reports = counter(meter, telemetry.CONTROLLER_REPORTS)
        self._refused = counter(meter, telemetry.CONTROLLER_REFUSED)
        self._checkpoints = counter(meter, telemetry.CONTROLLER_CHECKPOINTS)
        self._observations: tuple[Observation, ...] = ()
        self._drifted: tuple[Observation, ...] = ()
        drifted = telemetry.CONTROLLER_DRIFTED
        meter.create_observable_gauge(
            drifted.name,
            callbacks=[lambda _options: self._drifted],
            unit=drifted.unit,
            description=drifted.description,
        )
        streams = telemetry.CONTROLLER_STREAMS
        meter.create_observable_gauge(
            streams.name,
            callbacks=[self._observe],
            unit=streams.unit,
            description=streams.description,
        )

    def pushes(self, policy: str, outcome: Outcome) -> None:
        """Count a push."""
        self._pushes.add(1, {telemetry.ATTR_POLICY: policy, telemetry.ATTR_REASON: outcome.value})

    def reports(self, policy: str, outcome: str, count: int) -> None:
        """Count transfer reports."""
        self._reports.add(count, {telemetry.ATTR_POLICY: policy, telemetry.ATTR_REASON: outcome})

    def refused(self, reason: str) -> None:
        """Count a stream that was refused."""
        self._refused.add(1, {telemetry.ATTR_REASON: reason})

    def checkpoint(self, outcome: str) -> None:
        """Count a checkpoint that was written, restored or refused."""
        self._checkpoints.add(1, {telemetry.ATTR_REASON: outcome})

    def drifted(self, counts: Mapping[str, int]) -> None:
        """Set how many stages are far from what was profiled."""
        self._drifted = tuple(
            Observation(number, {telemetry.ATTR_POLICY: policy})
            for policy, number in counts.items()
        )

    def streams(self, counts: Mapping[str, Mapping[Role, Counts]], total: int) -> None:
        """Set how many streams are open; those of no policy count as policy ``""``."""
        observations = []
        for policy, roles in counts.items():
            states = {
                "synced": sum(count.synced for count in roles.values()),
                "pending": sum(count.stale for count in roles.values()),
                "rejected": sum(count.rejected for count in roles.values()),
            }
            total -= sum(states.values())
            observations += [
                Observation(number, {telemetry.ATTR_POLICY: policy, telemetry.ATTR_REASON: state})
                for state, number in states.items()
            ]
        none = {telemetry.ATTR_POLICY: "", telemetry.ATTR_REASON: "pending"}
        # one assignment: the exporter reads from its own thread
        self._observations = (*observations, Observation(total, none))

    def _observe(self, _options: CallbackOptions) -> Iterable[Observation]:
        return self._observations
