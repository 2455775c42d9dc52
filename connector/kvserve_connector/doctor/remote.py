"""Checks that talk to others: the controller, the artifact store, another pod, the telemetry collector."""

import asyncio
import contextlib
import email.utils
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Final

import grpc

from kvserve_api.credentials import Credentials
from kvserve_api.errors import (
    ArtifactError,
    KVServeError,
    SpecError,
    UnauthenticatedError,
)
from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.rpc import control_pb2_grpc
from kvserve_api.rpc.auth import PodSide
from kvserve_api.table import Role
from kvserve_api.wire import KVLayout
from kvserve_connector.channel import explain, open_channel, prove
from kvserve_connector.commands import Pull
from kvserve_connector.config import PATH, ConnectorConfig
from kvserve_connector.doctor.finding import (
    Finding,
    fail,
    judge_clock,
    judge_tables,
    ok,
    skew_s,
    warn,
)
from kvserve_connector.gate import Gate
from kvserve_connector.protocol import Kind
from kvserve_connector.replies import Refuse
from kvserve_strategies.artifacts import Patience, open_store

SETTLED_S: Final = 2.0
"""A controller that refuses a Hello does so at once, which on a busy machine takes more than a second."""
MAX_STATUS_BYTES: Final = 8 << 20
_NOWHERE: Final = "sha256:" + "0" * 64


async def check_controller(config: ConnectorConfig, timeout_s: float) -> Finding:
    """Open a stream to the controller as a pod does, as one that no policy selects: it is given no table."""
    check = "controller"
    if config.control_endpoint is None:
        return warn(check, "no control_endpoint: everything is sent raw", "Set control_endpoint.")
    try:
        credentials = (
            Credentials(config.credentials, PATH, serves=False) if config.credentials else None
        )
        async with (
            asyncio.timeout(timeout_s),
            open_channel(config.control_endpoint, credentials) as channel,
        ):
            await _greet(channel, config, credentials)
    except TimeoutError:
        return fail(
            check,
            f"no answer from {config.control_endpoint} in {timeout_s:g} s",
            "See whether it runs, and whether a network policy or TLS on one side only is in the way.",
        )
    except (grpc.aio.AioRpcError, UnauthenticatedError, SpecError) as error:
        failure = error if isinstance(error, SpecError) else explain(error)
        if isinstance(failure, UnauthenticatedError):
            advice = "Compare secrets and certificates with the controller's (docs/security.md)."
        elif "ocket closed" in str(failure) and not config.credentials.tls:
            advice = "If the controller speaks TLS, set tls_ca_file."
        else:
            advice = "See whether the controller runs and can be reached."
        return fail(check, f"{failure.reason}: {failure}", advice)
    proven = "proven by a secret" if config.credentials.secret_file else "not asked for a secret"
    secured = "TLS" if config.credentials.tls else "plain"
    return ok(check, f"{config.control_endpoint} lets us in: {secured}, {proven}")


async def _greet(
    channel: grpc.aio.Channel, config: ConnectorConfig, credentials: Credentials | None
) -> None:
    """Say Hello, and wait whether that is refused."""
    side = PodSide.begin(() if credentials is None else credentials.current().secrets)
    stub = control_pb2_grpc.ControlStub(channel)  # type: ignore[no-untyped-call]
    call = stub.Connect(metadata=side.metadata)
    try:
        hello = pb.Hello(
            pod=f"{config.pod}/doctor",
            namespace=config.namespace,
            role=Role.PREFILL.value,
            proof=await prove(call, side),
        )
        # a refusal is told by reading
        with contextlib.suppress(asyncio.InvalidStateError):
            await call.write(pb.PodMessage(hello=hello))
        await call.initial_metadata()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLED_S):
                await call.read()
    finally:
        call.cancel()


def check_status(url: str, policy: str | None, timeout_s: float) -> Iterator[Finding]:
    """Ask the controller's HTTP port for policies and time.

    Args:
        url: Like ``http://kvserve-controller:8081``.
        policy: The pod's policy; None for all.
        timeout_s: Most seconds.
    """
    started_s = time.time()
    try:
        with urllib.request.urlopen(f"{url}/status", timeout=timeout_s) as answer:
            here_s = time.time()
            there = email.utils.parsedate_to_datetime(answer.headers["Date"]).timestamp()
            statuses = json.loads(answer.read(MAX_STATUS_BYTES))
    except (OSError, ValueError, TypeError, http.client.HTTPException) as error:
        yield warn(
            "policy",
            f"{url}/status can't be asked: {error}",
            "Give --status; a network policy may keep this pod from it, which does no harm.",
        )
        return
    yield from judge_tables(statuses, policy)
    yield judge_clock(skew_s(here_s, there, here_s - started_s))


def check_store(config: ConnectorConfig, digest: str | None, timeout_s: float) -> Finding:
    """Fetch a bundle and verify it; without a digest, see whether the store answers."""
    check = "artifact store"
    if config.artifacts is None:
        return warn(
            check,
            "none: tables with calibrated profiles are refused",
            "Set artifacts, or KVSERVE_ARTIFACTS.",
        )
    patience = Patience(
        connect_s=timeout_s, read_s=timeout_s, request_s=60.0, retries=0, retry_s=timeout_s
    )
    try:
        store = open_store(config.artifacts, patience)
        bundle = store.get_bundle(digest or _NOWHERE)
    except ArtifactError as error:
        if digest is None:
            return ok(check, f"{config.artifacts} answers; give --bundle to fetch one")
        return fail(check, str(error), "Mount what the profiling Job writes to, or profile again.")
    except KVServeError as error:
        return fail(
            check, f"{error.reason}: {error}", "See whether it is mounted, reached and allowed."
        )
    size = sum(file.nbytes for file in bundle.manifest.files.values())
    return ok(check, f"{bundle.digest} is whole: {size / 1e6:.1f} MB, verified")


def check_peer(config: ConnectorConfig, host: str, port: int, timeout_s: float) -> Finding:
    """Ask a prefill pod for something that it does not have: the way there, and whether it lets us in."""
    check, where = "peer", f"{host}:{port}"
    started_s = time.monotonic()
    try:
        frames = Gate(config).connect(host, port, timeout_s=timeout_s)
        try:
            frames.set_budget(timeout_s)
            frames.send(_wish(timeout_s).pack())
            header = frames.receive_header()
            body = frames.receive_body(header)
            refuse = Refuse.parse(body) if header.kind == Kind.REFUSE else None
        finally:
            frames.close()
        if refuse is not None and isinstance(refuse.error, UnauthenticatedError):
            raise refuse.error
    except UnauthenticatedError as error:
        return fail(
            check, f"{where}: {error}", "Compare secrets, certificates and peers on both pods."
        )
    except KVServeError as error:
        return fail(
            check,
            f"{where}: {error}",
            "See whether it runs with kv_producer and whether a network policy is in the way.",
        )
    took_ms = (time.monotonic() - started_s) * 1000
    secured = "TLS" if config.credentials.tls else "plain"
    return ok(check, f"{where} answers: {secured}, {took_ms:.0f} ms with the handshake")


def check_otlp(env: Mapping[str, str], timeout_s: float) -> Finding:
    """Send nothing to the telemetry collector, in its own form."""
    check = "telemetry"
    endpoint = env.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not endpoint:
        return ok(check, "OTEL_EXPORTER_OTLP_ENDPOINT is not set: none is sent")
    request = urllib.request.Request(
        f"{endpoint.rstrip('/')}/v1/traces",
        data=b"",
        headers={"Content-Type": "application/x-protobuf"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s):
            return ok(check, f"{endpoint} takes traces")
    except (OSError, ValueError, http.client.HTTPException) as error:
        return warn(
            check,
            f"{endpoint} takes no traces: {error}",
            "Give the OTLP/HTTP endpoint, usually port 4318; serving does not depend on it.",
        )


def _wish(budget_s: float) -> Pull:
    return Pull(
        engine_id="kvserve-doctor",
        request_id="kvserve-doctor",
        tokens=range(1),
        prompt_digest="",
        fingerprint=_NOWHERE,
        layout=KVLayout(layers=1, kv_heads=1, head_dim=1, dtype="bfloat16"),
        stages=frozenset(),
        budget_s=budget_s,
        traceparent=None,
    )
