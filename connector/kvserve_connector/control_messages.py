"""What a pod says to its controller: who it is, why it refuses a table, and how transfers went."""

from dataclasses import dataclass

from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.rpc.messages import version_to_message
from kvserve_api.table import Role, Version
from kvserve_connector.coding import known_stages
from kvserve_connector.config import ConnectorConfig
from kvserve_connector.outcome import Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What a pod says of itself in its Hello."""

    role: Role
    fingerprint: str
    version: str


def hello_message(
    config: ConnectorConfig, identity: Identity, in_force: Version | None, proof: bytes
) -> pb.Hello:
    """Return who a pod is.

    Args:
        config: Its settings.
        identity: The rest that it says of itself.
        in_force: The version of its table; None without one.
        proof: That it holds the secret; empty without one.
    """
    return pb.Hello(
        pod=config.pod,
        namespace=config.namespace,
        role=identity.role.value,
        policy=config.policy or "",
        labels=dict(config.labels),
        model_fingerprint=identity.fingerprint,
        connector_version=identity.version,
        version=None if in_force is None else version_to_message(in_force),
        stages=sorted(known_stages()),
        proof=proof,
    )


def nack_message(push: pb.Push, reason: str, detail: str) -> pb.PodMessage:
    """Return why a pushed table is not put in force."""
    return pb.PodMessage(
        nack=pb.Nack(version=push.version, nonce=push.nonce, reason=reason, detail=detail[:1024])
    )


def report_message(outcome: Outcome) -> pb.TransferReport:
    """Return a transfer's outcome as the controller is told of it."""
    accept, end = outcome.accept, outcome.end
    report = pb.TransferReport(
        workload=outcome.load.workload,
        native_bytes=outcome.native_bytes,
        wire_bytes=outcome.wire_bytes,
        wire_s=outcome.wire_s,
        decode_s=outcome.decode_s,
        total_s=outcome.total_s,
        exposed_s=outcome.exposed_s,
        failure=outcome.failure,
    )
    if accept is not None:
        report.profile = accept.profile
        report.wanted = accept.wanted
        report.bound = accept.bound
        report.producer = accept.pod
        report.predicted_s = accept.predicted_s
        report.model_s = accept.model_s
        if accept.version is not None:
            report.version.CopyFrom(version_to_message(accept.version))
    if end is not None:
        report.encode_s = end.encode_s
        report.goodput_bytes_per_s = end.goodput_bytes_per_s
        if end.parts:
            total = sum(part.native_bytes for part in end.parts.values())
            report.shares.update({n: part.native_bytes / total for n, part in end.parts.items()})
    return report
