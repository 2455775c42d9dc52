"""The set of profiles that no other beats in all of: ratio up, quality loss down, codec time down.

Loss means its upper confidence limit, because that is what budgets are compared with.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from kvserve_api.profile_set import NONE, Profile


def objectives(profile: Profile, native_bytes: int) -> tuple[float, float, float]:
    """Return what to minimise of a profile: minus ratio, loss in basis points, codec seconds.

    Args:
        profile: The profile.
        native_bytes: Size of the transfer whose codec time counts.
    """
    codec_s = profile.encode.seconds(native_bytes) + profile.decode.seconds(native_bytes)
    return (-profile.ratio, profile.loss_upper_bp, codec_s)


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Tell whether one is at least as good in everything and better in something; all are minimised."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def non_dominated(points: Mapping[str, Sequence[float]]) -> set[str]:
    """Return the names of the points that no other dominates.

    A point with NaN or infinity is dropped before anything is compared: nothing compares with NaN, so it would
    otherwise stay for ever.
    """
    finite = {name: p for name, p in points.items() if all(math.isfinite(x) for x in p)}
    return {
        name
        for name, point in finite.items()
        if not any(dominates(other, point) for other in finite.values())
    }


def front(profiles: Iterable[Profile], native_bytes: int) -> tuple[Profile, ...]:
    """Return the non-dominated profiles and ``none``, by falling ratio.

    Args:
        profiles: Profiles of one workload class, with unique names.
        native_bytes: Size of the transfer whose codec time counts.
    """
    candidates = list(profiles)
    kept = non_dominated({p.name: objectives(p, native_bytes) for p in candidates}) | {NONE}
    return tuple(
        sorted((p for p in candidates if p.name in kept), key=lambda p: (-p.ratio, p.name))
    )
