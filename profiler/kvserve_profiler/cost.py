"""What encoding and decoding cost on this device: timed at three sizes, fitted to ``max(floor, offset + V / S)``."""

import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from kvserve_api.latency import StageCost
from kvserve_profiler.quality import MeasurementError

SMALL_TOKENS: Final = 16


def sizes_tokens(prefix_tokens: int) -> tuple[int, ...]:
    """Return the sizes at which codecs are timed, ascending: a floor, a short prompt, a whole prefix."""
    return tuple(sorted({min(SMALL_TOKENS, prefix_tokens), prefix_tokens // 4, prefix_tokens}))


def least_s(action: Callable[[], object], repeats: int) -> float:
    """Return the least time of an action over some repeats after a first one, in seconds.

    Time means the calling thread's on a processor, in which codecs do all their work: a busy machine must not look
    like a slow codec. The first call is not counted, because it may compile.
    """
    action()
    times = []
    for _ in range(repeats):
        start_s = time.thread_time()
        action()
        times.append(time.thread_time() - start_s)
    return min(times)


def fit(native_bytes: Sequence[int], seconds: Sequence[float]) -> StageCost:
    """Fit a stage's cost to its times, by least squares of relative errors.

    Args:
        native_bytes: Sizes, ascending and different, at least two.
        seconds: The time of each, positive.

    Raises:
        MeasurementError: A time is zero or not finite.
    """
    if not all(0 < spent_s < math.inf for spent_s in seconds):
        raise MeasurementError(f"times of {list(seconds)} s are no times")
    size = np.asarray(native_bytes, dtype=np.float64)
    spent = np.asarray(seconds, dtype=np.float64)
    # dividing by the times makes an error of 10 % count the same at each size
    slope, offset = np.linalg.lstsq(
        np.stack([size, np.ones_like(size)], axis=1) / spent[:, None], np.ones_like(size)
    )[0]
    if offset < 0 or slope <= 0:
        offset, slope = 0.0, float(np.sum(size / spent) / np.sum((size / spent) ** 2))
    return StageCost(
        floor_s=float(spent.min()), offset_s=float(offset), bytes_per_s=float(1 / slope)
    )


def device_kind() -> str:
    """Return the kind of processor the costs hold for, like ``cpu-avx512``."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    for flag, kind in (("avx512f", "avx512"), ("avx2", "avx2")):
        if flag in flags:
            return f"cpu-{kind}"
    return f"cpu-{platform.machine().lower() or 'unknown'}"
