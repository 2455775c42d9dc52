"""Where a prefill's KV waits: what travels from prefill to decode in a request's ``kv_transfer_params``.

The keys are those of vLLM's NIXL connector, so that routers made for it work unchanged; two of our own are added. What
arrives came through a client, so it is read like any other foreign input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from kvserve_api.errors import SpecError
from kvserve_api.fields import Fields

PROTOCOL_KEY: Final = "kvserve_protocol"
TRACE_KEY: Final = "kvserve_traceparent"
PROTOCOL: Final = 1
MAX_ID: Final = 512
MAX_TOKENS: Final = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Remote:
    """A finished prefill in another engine.

    Attributes:
        host: Address of its transfer server.
        port: Port of it.
        engine_id: Identity of that run of the engine.
        request_id: The request's name there.
        tokens: Tokens whose KV it holds.
        traceparent: W3C trace context of the prefill; None if it was not traced.
    """

    host: str
    port: int
    engine_id: str
    request_id: str
    tokens: int
    traceparent: str | None = None

    def to_params(self, block_ids: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Return the answer's ``kv_transfer_params``; the block ids are there for routers only."""
        params: dict[str, Any] = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(ids) for ids in block_ids],
            "remote_engine_id": self.engine_id,
            "remote_request_id": self.request_id,
            "remote_host": self.host,
            "remote_port": self.port,
            "remote_num_tokens": self.tokens,
            "tp_size": 1,
            PROTOCOL_KEY: PROTOCOL,
        }
        return params if self.traceparent is None else params | {TRACE_KEY: self.traceparent}

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Self:
        """Read a request's ``kv_transfer_params``; keys of other parties are left alone.

        Raises:
            SpecError: A value is missing or wrong, or the prefill was not made by a KVServe connector.
        """
        fields = Fields(params, "kv_transfer_params")
        if fields.integer(PROTOCOL_KEY) != PROTOCOL:
            raise SpecError(f"kv_transfer_params.{PROTOCOL_KEY}", f"must be {PROTOCOL}")
        return cls(
            host=fields.string("remote_host", max_length=255),
            port=fields.integer("remote_port", minimum=1, maximum=65_535),
            engine_id=fields.string("remote_engine_id", max_length=MAX_ID),
            request_id=fields.string("remote_request_id", max_length=MAX_ID),
            tokens=fields.integer("remote_num_tokens", minimum=1, maximum=MAX_TOKENS),
            traceparent=fields.string(TRACE_KEY, None, max_length=128),
        )
