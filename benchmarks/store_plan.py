"""How much `store_bench` measures."""

from dataclasses import dataclass
from typing import Final

from store_rows import KVSERVE, RAW


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much is measured.

    Attributes:
        prefixes: In tokens.
        rates_mbit: Of the link to the store; None unshaped.
        modes: Besides `RECOMPUTE`.
        long: Another prefix, in tokens, over one link and for ``kvserve`` only; 0 for none.
        long_mbit: The rate of that link.
        repeats: How often each prefix is read.
        texts: Different prefixes of a length.
        seconds: About how long it takes.
        lmcache_seconds: And with LMCache, besides the start of its engines; 0 leaves it out.
    """

    prefixes: tuple[int, ...] = (500, 1000, 2000)
    rates_mbit: tuple[float | None, ...] = (100.0, 1000.0, None)
    modes: tuple[str, ...] = (RAW, "joint-layer", "focus-3", KVSERVE)
    long: int = 8000
    long_mbit: float = 1000.0
    repeats: int = 3
    texts: int = 1
    seconds: float = 150.0
    lmcache_seconds: float = 150.0


QUICK: Final = Size(
    prefixes=(1000, 2000),
    rates_mbit=(100.0, 1000.0),
    modes=(RAW, "joint-layer", KVSERVE),
    long=0,
    repeats=2,
    texts=1,
    seconds=75.0,
    lmcache_seconds=0.0,
)
