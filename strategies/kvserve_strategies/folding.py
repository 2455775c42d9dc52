"""The linear stages before a quantiser as two matrices for each block: int8 towards the levels, float32 back."""

from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from kvserve_strategies.bundle import BasisKey, Bundle, Metric
from kvserve_strategies.bundle.basis import CENTRED
from kvserve_strategies.bundle.basis import Block as Channels
from kvserve_strategies.rounding import input_scales, rounded

LEAST_DEVIATION: Final = 2.0**-90
_ELSEWHERE: Final = 0.04
"""Deviation, over the basis's scale, that a direction of a cache is taken to have at least: small ones are other in
other texts, and those that the basis leaves out are not known."""
_TINY: Final = np.finfo(np.float32).tiny


@dataclass(frozen=True, kw_only=True, eq=False)
class Folded:
    """What `kvserve_kernels.linear.Group` needs to know of a block, at a step of 1.

    Attributes:
        mean: ``[width]`` float32.
        inv_scale: ``[width]`` float32: what centred values are multiplied by before they are rounded to int8.
        matrix: ``[components, width]`` int8: basis times metric over ``inv_scale`` and the factor.
        factor: ``[components]`` float64: levels per unit of the matrix's product.
        inverse: ``[components, width]`` float32: values of a component of the basis's scale.
    """

    mean: NDArray[np.float32]
    inv_scale: NDArray[np.float32]
    matrix: NDArray[np.int8]
    factor: NDArray[np.float64]
    inverse: NDArray[np.float32]


_kept: WeakKeyDictionary[Bundle, dict[tuple[BasisKey, int], Folded]] = WeakKeyDictionary()


def fold(bundle: Bundle, key: BasisKey, index: int) -> Folded:
    """Return the matrices of a block; made once in a bundle's life, because a large one takes half a second.

    Args:
        bundle: The calibration.
        key: The basis.
        index: Which of its groups.
    """
    blocks = _kept.setdefault(bundle, {})
    known = blocks.get((key, index))
    if known is None:
        known = blocks.setdefault((key, index), _folded(bundle, key, index))
    return known


def _folded(bundle: Bundle, key: BasisKey, index: int) -> Folded:
    basis = bundle.basis(key)
    rows, sigma = basis.groups[index]
    channels = key.blocks(bundle.layout)[index]
    mean, deviation = (_of(of, key, channels).reshape(-1) for of in (bundle.mean, bundle.deviation))
    # in float64, so that the order of summation, which differs between processors, all but never moves a rounding
    onward = back = rows.astype(np.float64)
    squares: NDArray[np.float64] = np.eye(bundle.layout.head_dim)[None]
    if key.space != CENTRED:
        root, inverse_root = (
            _of(lambda kind, side=side: bundle.metric(key.space, kind)[side], key, channels)
            .reshape(-1, *squares.shape[1:])
            .astype(np.float64)
            for side in range(len(Metric._fields))
        )
        onward, back = _by_slot(onward, root), _by_slot(back, inverse_root.transpose(0, 2, 1))
        squares = inverse_root @ inverse_root.transpose(0, 2, 1)
    onward, back, squares = (
        onward / basis.scale,
        back * basis.scale,
        squares * basis.scale**2,
    )
    scales = input_scales(onward, np.maximum(deviation.astype(np.float64), LEAST_DEVIATION))
    matrix = onward / scales
    factor = np.maximum(np.abs(matrix).max(axis=1), _TINY) / 127
    covariance = _covariance(back, sigma / np.float64(basis.scale), squares)
    covariance *= scales * scales[:, None]
    return Folded(
        mean=np.ascontiguousarray(mean),
        inv_scale=scales.astype(np.float32),
        matrix=rounded(matrix / factor[:, None], covariance),
        factor=factor,
        inverse=back.astype(np.float32),
    )


def _of(of: Any, key: BasisKey, channels: Channels) -> NDArray[Any]:
    """Return what a function has of the kinds, layers and heads of a block."""
    layers, heads = (slice(r.start, r.stop) for r in channels)
    return np.stack([of(kind)[layers, heads] for kind in key.kinds])


def _by_slot(rows: NDArray[np.float64], squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return rows ``[components, width]`` times a matrix with one square for each head on its diagonal."""
    count, dim = len(rows), squares.shape[-1]
    by_slot = rows.reshape(count, -1, dim).transpose(1, 0, 2)
    return np.ascontiguousarray((by_slot @ squares).transpose(1, 0, 2)).reshape(count, -1)


def _covariance(
    back: NDArray[np.float64], sigma: NDArray[np.float64], squares: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the covariance of centred values, ``[width, width]``.

    Args:
        back: ``[components, width]``: the values of each component.
        sigma: ``[components]``, their deviations.
        squares: ``[heads or 1, head_dim, head_dim]``: the covariance of a head if all directions had a deviation of 1.
    """
    scaled = np.sqrt(np.maximum(sigma**2 - _ELSEWHERE**2, 0))[:, None] * back
    covariance: NDArray[np.float64] = scaled.T @ scaled
    dim = squares.shape[-1]
    for slot in range(len(covariance) // dim):
        part = slice(slot * dim, (slot + 1) * dim)
        covariance[part, part] += _ELSEWHERE**2 * squares[slot % len(squares)]
    return covariance
