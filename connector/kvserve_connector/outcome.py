"""How one transfer went, as its consumer saw it."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvserve_connector.config import TCP
from kvserve_connector.handover import Load
from kvserve_connector.replies import Accept, End, Part


@dataclass(kw_only=True, slots=True)
class Outcome:
    """How one transfer went.

    Attributes:
        load: What was wanted.
        accept: What the producer promised; None if it came to no promise.
        end: What the producer said at its end.
        native_bytes: Native KV bytes.
        wire_bytes: Bytes received, headers included.
        wire_s: Seconds in which bytes of chunks were arriving.
        decode_s: Seconds of decoding and writing into the cache.
        transport: What carried the chunks.
        total_s: From the start to the last write, without what the producer waited for the prefill.
        exposed_s: What of it came after the prefill's end: the rest was hidden behind the prefill.
        failure: Empty, or the reason why the request must be recomputed.
        detail: More about the failure, for people.
    """

    load: Load
    accept: Accept | None = None
    end: End | None = None
    native_bytes: int = 0
    wire_bytes: int = 0
    wire_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0
    exposed_s: float = 0.0
    transport: str = TCP
    failure: str = ""
    detail: str = ""

    @property
    def parts(self) -> Mapping[str, Part]:
        """What each profile coded; nothing before there was a promise."""
        if self.accept is None:
            return {}
        if self.end is not None and self.end.parts:
            return self.end.parts
        return {self.accept.profile: Part(self.native_bytes, self.wire_bytes)}
