"""Three objectives on axes of octaves, and the volume that a set of points dominates.

What doubles counts the same anywhere on an axis: a ratio of 4 instead of 2, a loss of 20 instead of 40 basis points, a
codec of 10 instead of 20 ms. The axes are 0 at a reference point that is worth nothing, and grow with what is better.
"""

from dataclasses import dataclass

import numpy as np

from kvserve_profiler.pool import FloatArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The point from which volumes are counted: what is worse in any objective counts nothing.

    Attributes:
        loss_bp: The quality budget, in basis points, positive.
        codec_s: Seconds of codec time that nobody would accept, positive.
        ratio: The ratio of no compression.
    """

    loss_bp: float
    codec_s: float
    ratio: float = 1.0


def loss_octaves(loss_bp: FloatArray | float) -> FloatArray:
    """Return losses on a logarithmic scale that is 0 for no loss: below 1 basis point nothing is to be gained."""
    octaves: FloatArray = np.log2(1.0 + np.asarray(loss_bp, dtype=np.float64))
    return octaves


def axes(
    ratio: FloatArray, loss_bp: FloatArray, codec_s: FloatArray, reference: Reference
) -> FloatArray:
    """Return points on axes of octaves.

    Args:
        ratio: ``[n]``.
        loss_bp: ``[n]``.
        codec_s: ``[n]``.
        reference: What is worth nothing.

    Returns:
        ``[n, 3]``: ratio, loss, codec time; the larger the better.
    """
    return np.stack(
        [
            np.log2(np.asarray(ratio) / reference.ratio),
            loss_octaves(reference.loss_bp) - loss_octaves(loss_bp),
            np.log2(reference.codec_s / np.asarray(codec_s)),
        ],
        axis=-1,
    )


def hypervolume(points: FloatArray) -> float:
    """Return the volume between the origin and the points.

    Args:
        points: ``[n, 3]``, all maximised; a point that is negative or not finite in some coordinate counts nothing.
    """
    points = np.asarray(points, dtype=np.float64).reshape(-1, 3)
    # NaN compares with nothing, so it must go before anything is compared
    points = points[np.isfinite(points).all(axis=1) & (points > 0).all(axis=1)]
    if not len(points):
        return 0.0
    points = points[np.argsort(-points[:, 1], kind="stable")]
    levels = np.append(points[:, 1], 0.0)
    box = np.array([[points[:, 0].max(), points[:, 2].max()]])
    total = box.prod()
    areas = [
        total - free_areas(points[: count + 1, [0, 2]], box)[0] for count in range(len(points))
    ]
    return float(np.sum(np.array(areas) * -np.diff(levels)))


def free_areas(front: FloatArray, corners: FloatArray) -> FloatArray:
    """Return how much of rectangles a set of points does not dominate.

    Args:
        front: ``[m, 2]``, maximised; m may be 0.
        corners: ``[n, 2]``, not negative: the upper corners of rectangles whose lower corner is the origin.

    Returns:
        ``[n]``: each rectangle's area less the part below some point of the front.
    """
    area: FloatArray = corners.prod(axis=1)
    stairs = _stairs(np.maximum(front, 0.0))
    if not len(stairs):
        return area
    widths = np.minimum(corners[:, :1], stairs[:, 0])
    widths[:, 1:] -= widths[:, :-1].copy()
    taken = (widths * np.minimum(corners[:, 1:], stairs[:, 1])).sum(axis=1)
    free: FloatArray = np.maximum(area - taken, 0.0)
    return free


def _stairs(points: FloatArray) -> FloatArray:
    """Return the non-dominated points by rising first, so falling second coordinate."""
    points = points[np.lexsort((-points[:, 1], -points[:, 0]))]
    highest = np.maximum.accumulate(points[:, 1]) if len(points) else points[:, 1]
    kept = points[np.append(True, highest[1:] > highest[:-1])[: len(points)]]
    stairs: FloatArray = kept[::-1]
    return stairs
