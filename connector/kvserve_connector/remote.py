"""Where a prefill's KV waits: what travels from prefill to decode in a request's ``kv_transfer_params``.

The keys are those of vLLM's NIXL connector, so that routers made for it work unchanged; some of our own are added. A
router that sends a request to both pods at once can't wait for the prefill's answer: it gives both the same
``transfer_id``, and the decode pod the address, or as vLLM's Mooncake connector has it, the engine's name as the
prefill pod's bootstrap server told it. Ours has the address in that name. What arrives came through a client, so it is
read like any other foreign input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from kvserve_api.errors import SpecError
from kvserve_api.fields import Fields

PROTOCOL_KEY: Final = "kvserve_protocol"
TRACE_KEY: Final = "kvserve_traceparent"
TRANSFER_KEY: Final = "transfer_id"
PORTS_KEY: Final = "kvserve_ports"
PROTOCOL: Final = 1
MAX_ID: Final = 512
MAX_RANKS: Final = 64
MAX_TOKENS: Final = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Remote:
    """A prefill in another engine, finished unless it is named by its transfer.

    Attributes:
        host: Address of its transfer server.
        port: Port of it, of the first tensor-parallel worker's if there are several.
        ports: The ports of all workers, in order of their ranks; empty if there is one.
        engine_id: Identity of that run of the engine; empty where only the transfer is known.
        request_id: The request's name there, or the transfer's.
        tokens: Tokens whose KV it holds; 0 where that is not known.
        traceparent: W3C trace context of the prefill; None if it was not traced.
        transfer: Whether it is named by its transfer, and may not have begun.
    """

    host: str
    port: int
    engine_id: str
    request_id: str
    tokens: int
    traceparent: str | None = None
    transfer: bool = False
    ports: tuple[int, ...] = ()

    @property
    def ranks(self) -> int:
        """Tensor-parallel workers of the engine."""
        return max(1, len(self.ports))

    def of_rank(self, rank: int) -> "Remote":
        """Return the same as one worker of an engine of as many sees it."""
        return replace(self, port=self.ports[rank], ports=()) if self.ports else self

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
            "tp_size": self.ranks,
            PROTOCOL_KEY: PROTOCOL,
        }
        if self.ports:
            params[PORTS_KEY] = list(self.ports)
        return params if self.traceparent is None else params | {TRACE_KEY: self.traceparent}

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Self:
        """Read a request's ``kv_transfer_params``; keys of other parties are left alone.

        Raises:
            SpecError: A value is missing or wrong, or the prefill was not made by a KVServe connector.
        """
        fields = Fields(params, "kv_transfer_params")
        if params.get(TRANSFER_KEY) and params.get("remote_request_id") is None:
            return cls._of_transfer(fields)
        if fields.integer(PROTOCOL_KEY) != PROTOCOL:
            raise SpecError(f"kv_transfer_params.{PROTOCOL_KEY}", f"must be {PROTOCOL}")
        return cls(
            host=fields.string("remote_host", max_length=255),
            port=fields.integer("remote_port", minimum=1, maximum=65_535),
            engine_id=fields.string("remote_engine_id", max_length=MAX_ID),
            request_id=fields.string("remote_request_id", max_length=MAX_ID),
            tokens=fields.integer("remote_num_tokens", minimum=1, maximum=MAX_TOKENS),
            traceparent=fields.string(TRACE_KEY, None, max_length=128),
            ports=_ports(fields),
        )

    @classmethod
    def _of_transfer(cls, fields: Fields) -> Self:
        """Read the parameters of a decode request that was sent at the same time as its prefill."""
        if fields.has("remote_host"):
            host = fields.string("remote_host", max_length=255)
            ports = _ports(fields)
            port = ports[0] if ports else fields.integer("remote_port", minimum=1, maximum=65_535)
            engine_id = ""
        else:
            name = fields.string("remote_engine_id", max_length=MAX_ID)
            engine_id, host, (port, *more) = parse_engine_name(name)
            ports = (port, *more) if more else ()
        return cls(
            host=host,
            port=port,
            engine_id=engine_id,
            request_id=fields.string(TRANSFER_KEY, max_length=MAX_ID),
            tokens=0,
            transfer=True,
            ports=ports,
        )


def engine_name(engine_id: str, host: str, ports: Sequence[int]) -> str:
    """Return the name by which a producer's bootstrap server makes its engine known, with the port of each worker."""
    return f"{engine_id}@{host}:{','.join(map(str, ports))}"


def parse_engine_name(name: str) -> tuple[str, str, tuple[int, ...]]:
    """Return the engine's identity, host and ports.

    Raises:
        SpecError: It is not the name of a KVServe engine.
    """
    engine_id, at, address = name.rpartition("@")
    host, colon, ports = address.rpartition(":")
    numbers = [int(port) if port.isdecimal() else 0 for port in ports.split(",")]
    known = all(0 < number < 65_536 for number in numbers) and len(numbers) <= MAX_RANKS
    if not (at and host and colon and known):
        raise SpecError(
            "kv_transfer_params.remote_engine_id",
            f"must be ID@HOST:PORT[,PORT…] of a producer, got {name!r}",
        )
    return engine_id, host, tuple(numbers)


def _ports(fields: Fields) -> tuple[int, ...]:
    ports = fields.items(PORTS_KEY, [], max_items=MAX_RANKS)
    if not all(type(port) is int and 0 < port < 65_536 for port in ports):
        raise SpecError(f"kv_transfer_params.{PORTS_KEY}", "must be ports")
    return tuple(ports)
