"""The analytical latency model of one KV transfer.

V bytes of native KV in n chunks pass through three stages: encode ``e(V)``, wire ``V/(r*B)`` for ratio r and goodput B,
decode ``d(V)``. Each stage may have to finish earlier work first: the coder ``E`` seconds, the link ``Q`` bytes, the
decoder ``D`` seconds. Stages overlap chunk by chunk, and waiting for a later stage overlaps with work at an earlier
one, so the time is the longest path through a flow shop of equal jobs:
``T = rtt + max(E + pipe(e, w, d), Q/B + pipe(w, d), D + pipe(d))``, where ``pipe`` is the sum of one chunk's stages
plus (n - 1) times the slowest of them. Without the backlog, saturated links (where raw transfers take several times
V/B) can't be explained. Coding also delays what engines compute on the same processors: that is no part of T, but of
what a transfer costs others.
"""

import math
from dataclasses import dataclass
from typing import Any, Final, Self

from kvserve_api.errors import SpecError
from kvserve_api.fields import Fields


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """What one codec direction costs on one kind of device: ``max(floor_s, offset_s + V / bytes_per_s)``.

    Attributes:
        floor_s: The least time of any call, in seconds.
        offset_s: The fixed part, in seconds.
        bytes_per_s: Native (uncompressed) KV bytes a second; infinity for a stage that costs nothing.
    """

    floor_s: float = 0.0
    offset_s: float = 0.0
    bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        if not (self.floor_s >= 0 and math.isfinite(self.floor_s)):
            raise SpecError("floor_s", f"must be finite and not negative, got {self.floor_s}")
        if not (self.offset_s >= 0 and math.isfinite(self.offset_s)):
            raise SpecError("offset_s", f"must be finite and not negative, got {self.offset_s}")
        if not self.bytes_per_s > 0:
            raise SpecError("bytes_per_s", f"must be positive, got {self.bytes_per_s}")

    def seconds(self, native_bytes: float) -> float:
        """Return the time for so many native bytes, in seconds."""
        return max(self.floor_s, self.offset_s + native_bytes / self.bytes_per_s)

    def to_json(self) -> dict[str, Any]:
        """Return the cost as an object; an infinite speed is left out."""
        value = {"floor_s": float(self.floor_s), "offset_s": float(self.offset_s)}
        if math.isinf(self.bytes_per_s):
            return value
        return value | {"bytes_per_s": float(self.bytes_per_s)}

    @classmethod
    def from_json(cls, fields: Fields) -> Self:
        """Read a cost."""
        cost = cls(
            floor_s=fields.number("floor_s", 0.0, minimum=0),
            offset_s=fields.number("offset_s", 0.0, minimum=0),
            bytes_per_s=fields.number("bytes_per_s", math.inf, minimum=1),
        )
        fields.done()
        return cost


# not frozen, as `Link` is not: a frozen one takes more than twice as long to make, and each transfer makes three
@dataclass(kw_only=True, slots=True, unsafe_hash=True)
class Load:
    """What a link, or a coder, was asked for lately; never changed once made.

    Attributes:
        arrivals_per_s: Transfers a second; 0 where nothing is known.
        native_bytes_per_s: Native KV bytes a second.
    """

    arrivals_per_s: float = 0.0
    native_bytes_per_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.arrivals_per_s < math.inf:
            raise SpecError("arrivals_per_s", f"must not be negative, got {self.arrivals_per_s}")
        if not 0 <= self.native_bytes_per_s < math.inf:
            raise SpecError(
                "native_bytes_per_s", f"must not be negative, got {self.native_bytes_per_s}"
            )


MOST_UTILISATION: Final = 0.95
"""A stage that is busy for more than this share of the time has a queue that grows without end."""
NO_LOAD: Final = Load()


@dataclass(kw_only=True, slots=True, unsafe_hash=True)
class Link:
    """What is known now of the way from one producer to one consumer; never changed once made.

    Attributes:
        bytes_per_s: Goodput in wire bytes a second.
        backlog_bytes: Wire bytes queued on it ahead of a new transfer.
        rtt_s: Round trip, in seconds.
        encode_backlog_s: Seconds of encoding that the producer has promised ahead of it.
        decode_backlog_s: Seconds of decoding that the producer has sent this consumer ahead of it.
        load: What the link was asked for lately.
        encoder_load: What the producer's coder was asked for lately, over all its links.
        encode_factor: By how much the producer encodes slower now than its table says.
        encode_delays: How many requests of the producer's engine a second of encoding delays by a second.
        decode_delays: The same of the consumer's engine, and decoding.
        hidden_s: Seconds for which the prefill still goes on whose KV is to be sent: so much of a transfer delays
            nobody, but for its last chunk.
    """

    bytes_per_s: float
    backlog_bytes: float = 0.0
    rtt_s: float = 0.0
    encode_backlog_s: float = 0.0
    decode_backlog_s: float = 0.0
    load: Load = NO_LOAD
    encoder_load: Load = NO_LOAD
    encode_factor: float = 1.0
    encode_delays: float = 0.0
    decode_delays: float = 0.0
    hidden_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.bytes_per_s < math.inf:
            raise SpecError("bytes_per_s", f"must be finite and positive, got {self.bytes_per_s}")
        # one comparison each, which NaN fails too: a link is made for every transfer
        if not 0 <= self.backlog_bytes < math.inf:
            raise SpecError("backlog_bytes", f"must not be negative, got {self.backlog_bytes}")
        if not 0 <= self.rtt_s < math.inf:
            raise SpecError("rtt_s", f"must not be negative, got {self.rtt_s}")
        if not 0 < self.encode_factor < math.inf:
            raise SpecError("encode_factor", f"must be positive, got {self.encode_factor}")
        if not 0 <= self.encode_backlog_s < math.inf:
            raise SpecError(
                "encode_backlog_s", f"must not be negative, got {self.encode_backlog_s}"
            )
        if not 0 <= self.decode_backlog_s < math.inf:
            raise SpecError(
                "decode_backlog_s", f"must not be negative, got {self.decode_backlog_s}"
            )
        if not 0 <= self.encode_delays < math.inf:
            raise SpecError("encode_delays", f"must not be negative, got {self.encode_delays}")
        if not 0 <= self.decode_delays < math.inf:
            raise SpecError("decode_delays", f"must not be negative, got {self.decode_delays}")
        if not 0 <= self.hidden_s < math.inf:
            raise SpecError("hidden_s", f"must not be negative, got {self.hidden_s}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The predicted times of one transfer.

    Attributes:
        encode_s: Encoding alone, in seconds.
        wire_s: On the wire alone, in seconds.
        decode_s: Decoding alone, in seconds.
        wait_s: What earlier work and the round trip add to the pipeline of the three, in seconds.
        total_s: In all, in seconds.
        utilisation: Of the busiest stage, if every transfer did the same; at 1 its queue has no end.
        others_s: What the transfer adds to the waiting of those behind it, and takes from what the engines compute, in
            seconds.
    """

    encode_s: float
    wire_s: float
    decode_s: float
    wait_s: float
    total_s: float
    utilisation: float
    others_s: float

    def exposed_s(self, hidden_s: float, chunks: int, margin: float = 1.0) -> float:
        """Return what of the transfer comes after its prefill's end: at least its last chunk.

        Args:
            hidden_s: Seconds for which the prefill still goes on.
            chunks: Into how many equal chunks the transfer is cut.
            margin: What predicted times are multiplied with.
        """
        last_s = (self.encode_s + self.wire_s + self.decode_s) / chunks if hidden_s else 0.0
        return max(self.total_s * margin - hidden_s, last_s * margin)


def pipeline_s(stages_s: tuple[float, ...], chunks: int) -> float:
    """Return the time of equal chunks through overlapping stages: one chunk's sum + (n - 1) of the slowest.

    Args:
        stages_s: What each stage takes for the whole transfer, in seconds.
        chunks: Into how many equal chunks the transfer is cut, at least 1.
    """
    return (sum(stages_s) + (chunks - 1) * max(stages_s)) / chunks


def utilisation(native_bytes: float, stage_s: float, load: Load) -> float:
    """Return the share of time a stage is busy if every transfer takes it as long as this one does, for its size."""
    return load.native_bytes_per_s * stage_s / max(native_bytes, 1)


def others_s(stage_s: float, wait_s: float, load: Load) -> float:
    """Return the delay that a transfer causes to those behind it at one stage, in seconds, summed over them.

    Whoever arrives before the stage is idle again waits as much longer as this transfer keeps it busy. Of those only
    the ones count that arrive until the transfer itself has passed: how long the stage stays busy after that depends on
    what they will choose, and to assume that they choose the same (the busy period of a queue, Kleinrock 1975, section
    5.8) makes every candidate that would overload a stage by itself too dear, though a mixture would not.

    Args:
        stage_s: What the transfer takes there, in seconds.
        wait_s: Work that is there already, in seconds.
        load: What it is asked for.
    """
    return load.arrivals_per_s * stage_s * (wait_s + stage_s)


def predict(
    *,
    native_bytes: float,
    ratio: float,
    encode: StageCost,
    decode: StageCost,
    link: Link,
    chunks: int = 1,
) -> Prediction:
    """Predict one transfer; see the module's docstring for the formula."""
    encode_s = encode.seconds(native_bytes) * link.encode_factor
    decode_s = decode.seconds(native_bytes)
    wire_s = native_bytes / ratio / link.bytes_per_s
    queue_s = link.backlog_bytes / link.bytes_per_s
    total_s = link.rtt_s + max(
        link.encode_backlog_s + pipeline_s((encode_s, wire_s, decode_s), chunks),
        queue_s + pipeline_s((wire_s, decode_s), chunks),
        link.decode_backlog_s + pipeline_s((decode_s,), chunks),
    )
    stages = (
        (encode_s, link.encode_backlog_s, link.encoder_load),
        (wire_s, queue_s, link.load),
        (decode_s, link.decode_backlog_s, link.load),
    )
    return Prediction(
        encode_s=encode_s,
        wire_s=wire_s,
        decode_s=decode_s,
        wait_s=max(0.0, total_s - pipeline_s((encode_s, wire_s, decode_s), chunks)),
        total_s=total_s,
        utilisation=max(utilisation(native_bytes, stage_s, load) for stage_s, _, load in stages),
        others_s=max(others_s(stage_s, wait_s, load) for stage_s, wait_s, load in stages)
        + (link.encode_delays * encode_s + link.decode_delays * decode_s),
    )
