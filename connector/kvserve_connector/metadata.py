"""What the scheduler half and the worker half tell each other; they live in different processes."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvserve_connector.handover import Lease, Load, Prefill, Progress
from kvserve_connector.remote import Remote
from kvserve_connector.stores.messages import StoreNews, StoreStep


@dataclass(kw_only=True, slots=True)
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """The news of one engine step.

    Attributes:
        prefills: Prefills for consumers that arrived.
        progress: How far those that this step computes are after it.
        preempted: Prefills that lost their blocks and begin anew.
        stopped: Prefills that ended without being kept.
        leases: Prefills that finished.
        wanted: Prefills elsewhere whose requests have arrived here, and wait for room.
        loads: Fetches to start.
        releases: Prefills elsewhere that nobody will fetch.
        cancelled: Fetches to stop, because their request was aborted.
        unserved: Prefills for a consumer that can't be served here.
        idle: The step computes nothing.
        requests: How many requests the engine computes or will, without those that wait for KV.
        store: What concerns the KV store; None without one.
    """

    prefills: list[Prefill] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    wanted: list[Remote] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    releases: list[Remote] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    unserved: int = 0
    idle: bool = False
    requests: int = 0
    store: StoreStep | None = None


@dataclass(kw_only=True, slots=True)
class WorkerNews(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What the worker half tells the scheduler half after a step; there is one worker."""

    store: StoreNews

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "WorkerNews":
        """Refuse a second worker.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a KV store is used with one worker only")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerAddress(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """Where the worker half's transfer server listens; the scheduler half hands it out."""

    host: str
    port: int
