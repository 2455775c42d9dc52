"""What a pod reports of a finished transfer, checked: nothing that arrives is trusted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from kvserve_api.errors import SpecError
from kvserve_api.table import Version

MAX_REPORTS: Final = 1000
"""Most reports of one message that are read."""
MAX_SECONDS: Final = 3600.0
MAX_TRANSFER_BYTES: Final = 1 << 44
MAX_EXPANSION: Final = 16
"""A transfer with more wire bytes than so many times its native bytes (beside headers) is absurd."""
HEADER_BYTES: Final = 1 << 16
MAX_NAME: Final = 63

MAX_POD: Final = 253
MAX_SHARES: Final = 16

_TIMES: Final = ("encode_s", "wire_s", "decode_s", "total_s", "model_s", "predicted_s")


class ReportError(SpecError):
    """A report that teaches nothing.

    Attributes:
        reason: Why, as the label of a metric.
    """

    def __init__(self, reason: str, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One transfer as its consumer saw it.

    Attributes:
        workload: Its workload class.
        profile: What was used.
        wanted: What the table would have used; differs in mode Shadow.
        native_bytes: Native KV bytes.
        wire_bytes: Bytes on the wire.
        encode_s: Time of encoding, over all chunks.
        wire_s: Time on the wire, waiting included.
        decode_s: Time of decoding, over all chunks.
        total_s: Time from the pull to the last decoded chunk.
        exposed_s: What of it came after the prefill's end; all of it if the pod does not say.
        model_s: Time from the request's arrival at the producer to the end of its prefill.
        goodput_bytes_per_s: Of the link, after this transfer; 0 if unknown.
        predicted_s: What the pod expected ``total_s`` to be; 0 where nothing was predicted.
        producer: The pod that encoded; empty if unknown.
        version: Of the table that decided; None without one.
        shares: Of the native bytes by profile, where several coded it; ``profile`` is then the first.
    """

    workload: str
    profile: str
    wanted: str
    native_bytes: int
    wire_bytes: int
    encode_s: float
    wire_s: float
    decode_s: float
    total_s: float
    model_s: float
    goodput_bytes_per_s: float
    exposed_s: float
    predicted_s: float = 0.0
    producer: str = ""
    version: Version | None = None
    shares: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, message: Any) -> Self:
        """Read a report.

        Args:
            message: A ``TransferReport``.

        Raises:
            ReportError: It reports a failure, or something not finite, negative or absurd.
        """
        if message.failure:
            raise ReportError("Failed", "failure", message.failure[:MAX_NAME])
        for name in _TIMES:
            _check_number(name, getattr(message, name), MAX_SECONDS)
        exposed_s = message.exposed_s if message.HasField("exposed_s") else message.total_s
        _check_number("exposed_s", exposed_s, message.total_s)
        _check_number("goodput_bytes_per_s", message.goodput_bytes_per_s, MAX_TRANSFER_BYTES)
        if not 0 < message.native_bytes <= MAX_TRANSFER_BYTES:
            raise ReportError("Absurd", "native_bytes", f"is {message.native_bytes}")
        if not 0 < message.wire_bytes <= MAX_EXPANSION * message.native_bytes + HEADER_BYTES:
            raise ReportError("Absurd", "wire_bytes", f"is {message.wire_bytes}")
        if max(len(message.workload), len(message.profile), len(message.wanted)) > MAX_NAME:
            raise ReportError("Absurd", "profile", "has a name that no profile can have")
        if len(message.producer) > MAX_POD:
            raise ReportError("Absurd", "producer", "has a name that no pod can have")
        if len(message.shares) > MAX_SHARES or any(len(name) > MAX_NAME for name in message.shares):
            raise ReportError("Absurd", "shares", "are of more profiles than there can be")
        for share in message.shares.values():
            _check_number("shares", share, 1.0)
        return cls(
            workload=message.workload,
            profile=message.profile,
            wanted=message.wanted or message.profile,
            native_bytes=message.native_bytes,
            wire_bytes=message.wire_bytes,
            encode_s=message.encode_s,
            wire_s=message.wire_s,
            decode_s=message.decode_s,
            total_s=message.total_s,
            model_s=message.model_s,
            exposed_s=exposed_s,
            goodput_bytes_per_s=message.goodput_bytes_per_s,
            predicted_s=message.predicted_s,
            producer=message.producer,
            version=(
                Version(epoch=message.version.epoch, counter=message.version.counter)
                if message.HasField("version")
                else None
            ),
            shares=dict(message.shares),
        )


def _check_number(name: str, value: float, maximum: float) -> None:
    if not math.isfinite(value):
        raise ReportError("NotFinite", name, f"is {value}")
    if value < 0:
        raise ReportError("Negative", name, f"is {value}")
    if value > maximum:
        raise ReportError("Absurd", name, f"is {value}, more than {maximum:g}")
