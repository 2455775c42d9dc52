"""What compression costs on a task: the share of items that it makes wrong, with a confidence limit.

Both caches answer the same items, so the difference is one of paired proportions. Its limit is that of Tango's score
interval (Statistics in Medicine 17, 1998), which holds for few items and for none lost, where a bootstrap says zero.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

from kvserve_api.quality import BASIS_POINTS, TaskScore


def compare(
    exact: Sequence[bool], compressed: Sequence[bool], *, confidence_percent: float
) -> TaskScore:
    """Compare the answers to the same items.

    Args:
        exact: Whether each was right with the exact cache.
        compressed: Whether each was right with the compressed one.
        confidence_percent: Level of the upper limit.
    """
    pairs = list(zip(exact, compressed, strict=True))
    lost = sum(before and not after for before, after in pairs)
    gained = sum(after and not before for before, after in pairs)
    upper = upper_difference(lost, gained, len(pairs), confidence_percent=confidence_percent)
    return TaskScore(
        items=len(pairs),
        exact=sum(exact) / len(pairs),
        compressed=sum(compressed) / len(pairs),
        loss_upper_bp=upper * BASIS_POINTS,
    )


def upper_difference(lost: int, gained: int, items: int, *, confidence_percent: float) -> float:
    """Return the upper confidence limit of a difference of paired proportions (Tango 1998, eq. 4).

    Args:
        lost: Items right before and wrong after.
        gained: Items wrong before and right after.
        items: All items, at least 1.
        confidence_percent: One-sided level, 50 to below 100.

    Returns:
        0 to 1; not below the difference itself, nor below 0.
    """
    limit = NormalDist().inv_cdf(confidence_percent / 100)
    low, high = max((lost - gained) / items, 0.0), 1.0
    # the statistic falls as the assumed difference grows; 60 halvings reach the last bit
    for _ in range(60):
        middle = (low + high) / 2
        if _statistic(lost, gained, items, middle) < -limit:
            high = middle
        else:
            low = middle
    return high


def _statistic(lost: int, gained: int, items: int, difference: float) -> float:
    """Return the score statistic of an assumed difference, with the constrained estimate of the gained share."""
    half = -lost - gained + (2 * items - lost + gained) * difference
    root = math.sqrt(half * half + 8 * items * gained * difference * (1 - difference))
    gained_share = (root - half) / (4 * items)
    variance = items * (2 * gained_share + difference * (1 - difference))
    excess = lost - gained - items * difference
    if variance > 0:
        return excess / math.sqrt(variance)
    return math.copysign(math.inf, excess) if excess else 0.0
