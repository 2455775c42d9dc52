"""What a pod's connector is told: vLLM's ``kv_connector_extra_config``, the environment and the pod's labels."""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeAlias

from kvserve_api.credentials import NO_CREDENTIALS, CredentialFiles
from kvserve_api.errors import SpecError
from kvserve_api.fields import Fields
from kvserve_api.names import ENV_ARTIFACTS
from kvserve_connector.links import PROBE_SHARE
from kvserve_connector.stores.config import StoreConfig, read_store

PATH = "kv_connector_extra_config"
DEFAULT_PORT = 7790
MAX_LABELS_BYTES = 65_536
MAX_PEERS = 64
TCP = "tcp"
NIXL = "nixl"
TRANSPORTS = (TCP, NIXL)
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectorConfig:
    """The connector's settings, the same for both of its halves.

    Attributes:
        control_endpoint: ``host:port`` of the controller; None to run without one, which sends everything raw.
        policy: ``namespace/name`` of the policy to follow; None lets the pod's labels decide.
        artifacts: URL of the store of calibration bundles; None refuses tables that need one.
        listen_host: Address that a producer's transfer server binds.
        listen_port: Its port; 0 takes any free one.
        bootstrap_port: Where routers look this producer up that send a request to two pods at once; None without them.
        advertise_host: Address that consumers use to reach this producer.
        lease_s: How long a producer keeps a finished prefill's blocks for its consumer, in seconds.
        timeout_s: Most seconds a transfer may take; then the request is recomputed.
        prefill_timeout_s: Most seconds more for one that is asked for before its prefill has ended.
        stall_s: Most seconds without a single byte; then the peer counts as lost.
        encode_ahead_bytes: Most bytes of chunks that are coded before a consumer asks for them; 0 for none.
        transport: What carries the chunks, `tcp` or `nixl`; a peer that can't do the latter gets them over TCP.
        staging_bytes: Memory that NIXL reads from, or into.
        chunk_layers: Most layers in a chunk. More chunks overlap better, fewer cost less.
        codec_threads: Threads that encode and decode, next to the engine's own.
        probe_share: Most of a link's time in which a producer may find out whether it has become faster; 0 for none.
        credentials: What this pod proves itself with, to other pods and to the controller, and what it asks of them.
        tls_server_name: Name that a producer's certificate must carry; None takes any of the authority's.
        peers: Networks that producers may be in; empty for any.
        store: The store of prompt prefixes; None to have none.
        pod: This pod's name.
        namespace: Its namespace.
        labels: Its labels.

    Raises:
        SpecError: A setting is out of range or unknown.
    """

    control_endpoint: str | None = None
    policy: str | None = None
    artifacts: str | None = None
    listen_host: str = "0.0.0.0"
    listen_port: int = DEFAULT_PORT
    bootstrap_port: int | None = None
    advertise_host: str = "127.0.0.1"
    lease_s: float = 30.0
    timeout_s: float = 30.0
    prefill_timeout_s: float = 120.0
    stall_s: float = 10.0
    encode_ahead_bytes: int = 0
    transport: str = TCP
    staging_bytes: int = 64 << 20
    chunk_layers: int = 5
    codec_threads: int = 1
    probe_share: float = PROBE_SHARE
    credentials: CredentialFiles = NO_CREDENTIALS
    tls_server_name: str | None = None
    peers: tuple[Network, ...] = ()
    store: StoreConfig | None = None
    pod: str = "pod"
    namespace: str = "default"
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.control_endpoint is not None:
            _check_endpoint(self.control_endpoint)
        if self.policy is not None and self.policy.count("/") != 1:
            raise SpecError(f"{PATH}.policy", f"must be namespace/name, got {self.policy!r}")
        if self.stall_s > self.timeout_s:
            raise SpecError(f"{PATH}.stall_s", "must not be above timeout_s")
        if self.transport not in TRANSPORTS:
            raise SpecError(f"{PATH}.transport", f"must be one of {', '.join(TRANSPORTS)}")
        if self.transport == NIXL and self.credentials.tls:
            raise SpecError(
                f"{PATH}.transport", '"nixl" is not encrypted: leave tls_* out, or take tcp'
            )
        if self.transport == NIXL and self.credentials.secret_file is None:
            raise SpecError(
                f"{PATH}.transport", '"nixl" needs secret_file: its peers have to be trusted'
            )
        if self.tls_server_name is not None and not self.credentials.tls:
            raise SpecError(f"{PATH}.tls_server_name", "needs tls_ca_file")

    def of_rank(self, rank: int) -> Self:
        """Return the settings of one tensor-parallel worker, which has its own port, and is a pod to the controller."""
        if rank == 0:
            return self
        port = self.listen_port + rank if self.listen_port else 0
        return replace(self, listen_port=port, pod=f"{self.pod}-{rank}")

    @classmethod
    def read(cls, extra: Mapping[str, Any], env: Mapping[str, str], host_ip: str) -> Self:
        """Read the settings.

        Args:
            extra: vLLM's ``kv_connector_extra_config``.
            env: The process environment; ``POD_NAME``, ``POD_NAMESPACE`` and ``POD_IP`` are used, as the downward API
                sets them, and ``KVSERVE_ARTIFACTS``.
            host_ip: The address to advertise where neither the settings nor ``POD_IP`` name one.

        Raises:
            SpecError: A setting is unknown, of the wrong type or out of range; or the labels file can't be read.
        """
        fields = Fields(extra, PATH)
        labels_file = fields.string("labels_file", None, max_length=4096)
        config = cls(
            control_endpoint=fields.string("control_endpoint", None, max_length=512),
            policy=fields.string("policy", None, max_length=320),
            artifacts=fields.string("artifacts", None, max_length=2048)
            or env.get(ENV_ARTIFACTS)
            or None,
            listen_host=fields.string("listen_host", "0.0.0.0", max_length=255),
            listen_port=fields.integer("listen_port", DEFAULT_PORT, minimum=0, maximum=65_535),
            bootstrap_port=fields.integer("bootstrap_port", minimum=0, maximum=65_535)
            if fields.has("bootstrap_port")
            else None,
            advertise_host=fields.string("advertise_host", None, max_length=255)
            or env.get("POD_IP")
            or host_ip,
            lease_s=fields.number("lease_s", 30.0, minimum=0.1, maximum=3600),
            timeout_s=fields.number("timeout_s", 30.0, minimum=0.1, maximum=3600),
            prefill_timeout_s=fields.number("prefill_timeout_s", 120.0, minimum=0.1, maximum=3600),
            stall_s=fields.number("stall_s", 10.0, minimum=0.1, maximum=3600),
            encode_ahead_bytes=fields.integer("encode_ahead_bytes", 0, minimum=0, maximum=1 << 40),
            transport=fields.string("transport", TCP, max_length=16),
            staging_bytes=fields.integer(
                "staging_bytes", 64 << 20, minimum=8 << 20, maximum=1 << 40
            ),
            chunk_layers=fields.integer("chunk_layers", 5, minimum=1, maximum=1024),
            codec_threads=fields.integer("codec_threads", 1, minimum=1, maximum=64),
            probe_share=fields.number("probe_share", PROBE_SHARE, minimum=0, maximum=0.5),
            credentials=CredentialFiles(
                secret_file=_file(fields, "secret_file"),
                tls_cert_file=_file(fields, "tls_cert_file"),
                tls_key_file=_file(fields, "tls_key_file"),
                tls_ca_file=_file(fields, "tls_ca_file"),
            ),
            tls_server_name=fields.string("tls_server_name", None, max_length=253),
            peers=tuple(map(_network, fields.items("peers", [], max_items=MAX_PEERS))),
            store=read_store(fields),
            pod=fields.string("pod", None, max_length=253) or env.get("POD_NAME") or os.uname()[1],
            namespace=fields.string("namespace", None, max_length=63)
            or env.get("POD_NAMESPACE")
            or "default",
            labels=read_labels(Path(labels_file)) if labels_file else {},
        )
        fields.done()
        return config


def read_labels(path: Path) -> dict[str, str]:
    """Read a labels file as the downward API writes it: a line ``key="value"`` for each label.

    Raises:
        SpecError: The file is missing, too large, or has a line of another form.
    """
    where = f"{PATH}.labels_file"
    try:
        if path.stat().st_size > MAX_LABELS_BYTES:
            raise SpecError(where, f"{path} has more than {MAX_LABELS_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(where, f"can't be read: {error}") from error
    labels: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip():
            continue
        key, equals, value = line.partition("=")
        if not equals or len(value) < 2 or value[0] != '"' or value[-1] != '"':
            raise SpecError(where, f'must hold lines like key="value", got {line[:80]!r}')
        labels[key] = value[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    return labels


def _file(fields: Fields, key: str) -> Path | None:
    name = fields.string(key, None, max_length=4096)
    return Path(name) if name else None


def _network(value: object) -> Network:
    try:
        # a plain integer is an address too, to ipaddress
        return ipaddress.ip_network(value if isinstance(value, str) else "")
    except ValueError as error:
        raise SpecError(f"{PATH}.peers", f"must be networks like 10.0.0.0/8: {error}") from error


def _check_endpoint(endpoint: str) -> None:
    host, colon, port = endpoint.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65_536):
        raise SpecError(f"{PATH}.control_endpoint", f"must be host:port, got {endpoint!r}")
