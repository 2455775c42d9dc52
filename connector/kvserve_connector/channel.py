"""The way to a controller: a gRPC channel, the proof that opens a stream, and what the end of one means."""

import asyncio
from typing import Final

import grpc

from kvserve_api.credentials import Credentials
from kvserve_api.errors import KVServeError, UnauthenticatedError, UnavailableError
from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.rpc.auth import PodSide, channel_credentials
from kvserve_api.rpc.messages import MAX_MESSAGE_BYTES

PROOF_S: Final = 10.0
"""How long a controller may take to prove that it holds the secret."""
Call = grpc.aio.StreamStreamCall[pb.PodMessage, pb.ControllerMessage]
_OPTIONS: Final = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # messages are small and rare: to measure the connection would be two more packets for each
    ("grpc.http2.bdp_probe", 0),
    # a frozen controller must be noticed, or its successor would not be looked for
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC's own waiting would hide ours
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


def open_channel(endpoint: str, credentials: Credentials | None) -> grpc.aio.Channel:
    """Return a channel to a controller, by TLS if the credentials say so; not connected yet."""
    secured = None if credentials is None else channel_credentials(credentials.current())
    if secured is None:
        return grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
    return grpc.aio.secure_channel(endpoint, secured, options=_OPTIONS)


async def prove(call: Call, side: PodSide) -> bytes:
    """Return the proof for a stream's Hello, once the controller has given its own.

    Raises:
        UnauthenticatedError: The controller proves nothing, or not in time.
        AioRpcError: The stream ended.
    """
    if not side.secrets:
        return b""
    try:
        async with asyncio.timeout(PROOF_S):
            metadata = await call.initial_metadata()
    except TimeoutError:
        metadata = None
    if call.done():
        # what it says of itself comes first
        await call.read()
    return side.prove(metadata or ())


def explain(error: grpc.aio.AioRpcError | UnauthenticatedError) -> KVServeError:
    """Return what an ended stream means.

    Args:
        error: What gRPC, or the controller, says.
    """
    if isinstance(error, UnauthenticatedError):
        return error
    detail = error.details() or error.code().name
    if error.code() == grpc.StatusCode.UNAUTHENTICATED:
        return UnauthenticatedError(detail)
    if "handshak" in detail.lower() or "certificate" in detail.lower():
        return UnauthenticatedError(f"no TLS with the controller: {detail}")
    # the last is also said of a stream that ended while something was being written
    if error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
    ):
        return UnavailableError(detail)
    return KVServeError(f"{error.code().name}: {detail}")
