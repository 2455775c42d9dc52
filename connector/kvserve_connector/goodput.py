"""What is thought of a link's goodput, and how one more sample changes it. Pure."""

import math
from dataclasses import dataclass
from typing import Final

FALL: Final = 0.7
"""Weight of a sample below the estimate: a drop is believed almost at once, because every transfer suffers by it."""
RISE: Final = 0.5
"""Weight of a sample above it: two transfers after a recovery three quarters of the way are made."""
MIN_BYTES_PER_S: Final = 1e3
MAX_BYTES_PER_S: Final = 1e12


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What was seen of a link for a while.

    Attributes:
        acked_bytes: Bytes that were acknowledged.
        burst_bytes: How many of them may have been bursts.
        busy_s: Seconds they took.
        slack_s: How many of these may not have been the link's.
    """

    acked_bytes: float
    burst_bytes: float
    busy_s: float
    slack_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """What is thought of a link, in bytes a second.

    Attributes:
        bytes_per_s: Its goodput.
        shown_bytes_per_s: What it has shown to be capable of, as far as nothing has contradicted it since.
        doubted: The last sample said that the link surely is slower.
    """

    bytes_per_s: float
    shown_bytes_per_s: float
    doubted: bool = False


def blend(known: Goodput | None, sample: Sample) -> Goodput | None:
    """Return what is thought of a link after one more sample; None if still nothing is known.

    A link is slower than thought if even all bytes, bursts included, came slower in the time that surely was the
    link's. It is faster than thought if the bytes beyond the bursts came faster. What small transfers say is often
    neither, because most of their time is not the link's: then the thought returns to what the link has shown, or a few
    late acknowledgements would make a fast link slow for as long as compressed transfers leave it idle.
    """
    if not sample.busy_s > 0:
        return known
    whole = sample.acked_bytes / sample.busy_s
    steady = max(0.0, sample.acked_bytes - sample.burst_bytes) / sample.busy_s
    surely_s = sample.busy_s - sample.slack_s
    most = sample.acked_bytes / surely_s if surely_s > 0 else math.inf
    doubted = False
    if known is None:
        moved = shown = steady or whole
    else:
        moved, shown = known.bytes_per_s, known.shown_bytes_per_s
        if most < moved:
            doubted = surely_s > sample.slack_s
            if doubted and known.doubted:
                # one may have waited for a core, two in a row are the link: as times are averaged, so that a drop to a
                # hundredth needs no third
                shown = min(shown, most)
                moved = 1 / (FALL / whole + (1 - FALL) / moved) if whole else MIN_BYTES_PER_S
            else:
                moved += FALL * (whole - moved)
        elif steady > moved:
            # in less time than can be told: at least so fast
            moved += (RISE if surely_s > 0 else 1.0) * (steady - moved)
        elif most >= shown > moved:
            moved += RISE * (shown - moved)
        shown = max(shown, moved)
    moved, shown = (min(max(value, MIN_BYTES_PER_S), MAX_BYTES_PER_S) for value in (moved, shown))
    return Goodput(bytes_per_s=moved, shown_bytes_per_s=shown, doubted=doubted)
