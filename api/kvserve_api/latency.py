"""The analytical latency model of one KV transfer.

For V bytes of native KV in n chunks, ratio r, link goodput B with Q bytes queued ahead:
``T = pipeline(encode e(V), wire (Q + V/r)/B + rtt, decode d(V))``. Stages overlap chunk by chunk, so a pipeline takes
the sum of one chunk's stages plus (n - 1) times the slowest stage. Without the backlog Q, saturated links (where raw
transfers take several times V/B) can't be explained.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What is known now of the way from one producer to one consumer.

    Attributes:
        bytes_per_s: Goodput in wire bytes a second.
        backlog_bytes: Wire bytes queued on it ahead of a new transfer.
        rtt_s: Round trip, in seconds.
    """

    bytes_per_s: float
    backlog_bytes: float = 0.0
    rtt_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.bytes_per_s > 0 and math.isfinite(self.bytes_per_s)):
            raise SpecError("bytes_per_s", f"must be finite and positive, got {self.bytes_per_s}")
        if not (self.backlog_bytes >= 0 and math.isfinite(self.backlog_bytes)):
            raise SpecError("backlog_bytes", f"must not be negative, got {self.backlog_bytes}")
        if not (self.rtt_s >= 0 and math.isfinite(self.rtt_s)):
            raise SpecError("rtt_s", f"must not be negative, got {self.rtt_s}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The predicted times of one transfer, in seconds."""

    encode_s: float
    wire_s: float
    decode_s: float
    total_s: float


def pipeline_s(stages_s: tuple[float, ...], chunks: int) -> float:
    """Return the time of equal chunks through overlapping stages: one chunk's sum + (n - 1) of the slowest.

    Args:
        stages_s: What each stage takes for the whole transfer, in seconds.
        chunks: Into how many equal chunks the transfer is cut, at least 1.
    """
    return (sum(stages_s) + (chunks - 1) * max(stages_s)) / chunks


def total_s(
    native_bytes: float, ratio: float, encode: StageCost, decode: StageCost, link: Link, chunks: int
) -> float:
    """Return what `predict` predicts in all; it makes nothing but a number, because a transfer waits for it."""
    bytes_per_s = link.bytes_per_s
    wire_s = native_bytes / ratio / bytes_per_s
    encode_s = max(encode.floor_s, encode.offset_s + native_bytes / encode.bytes_per_s)
    decode_s = max(decode.floor_s, decode.offset_s + native_bytes / decode.bytes_per_s)
    slowest_s = max(encode_s, wire_s, decode_s)
    # the same order of operations as in `pipeline_s`, so that both come to the same number
    stages_s = (encode_s + wire_s + decode_s + (chunks - 1) * slowest_s) / chunks
    return link.backlog_bytes / bytes_per_s + link.rtt_s + stages_s


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
    encode_s = encode.seconds(native_bytes)
    decode_s = decode.seconds(native_bytes)
    wire_s = native_bytes / ratio / link.bytes_per_s
    waiting_s = link.backlog_bytes / link.bytes_per_s + link.rtt_s
    total_s = waiting_s + pipeline_s((encode_s, wire_s, decode_s), chunks)
    return Prediction(
        encode_s=encode_s, wire_s=waiting_s + wire_s, decode_s=decode_s, total_s=total_s
    )
