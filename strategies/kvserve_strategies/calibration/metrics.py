"""Metrics: what an error in a head of a key or value costs, as quadratic forms, and their square roots."""

from typing import Final

import numpy as np
import torch

from kvserve_strategies.bundle import Rope
from kvserve_strategies.calibration.ropes import turn

_LEAST: Final = 1e-3
"""Eigenvalues of a metric are at least this part of their mean, so that its root has an inverse."""
_DISTANCES: Final = 40


def roots(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the symmetric square root of each matrix, and its inverse.

    Args:
        metric: ``[..., n, n]``, symmetric and positive semi-definite; eigenvalues below a thousandth of their mean are
            raised to that, and a matrix of zeros becomes a small one.

    Returns:
        Two tensors of that shape, float32.
    """
    values, vectors = torch.linalg.eigh(metric.double())
    mean = values.mean(dim=-1, keepdim=True)
    # a head that nothing reads: any positive metric will do, and a small one costs it no bits
    floor = torch.maximum(mean * _LEAST, mean.max() * 1e-12).clamp(min=torch.finfo().tiny)
    values = torch.maximum(values, floor)[..., None, :]
    root = (vectors * values.sqrt()) @ vectors.mT
    inverse = (vectors / values.sqrt()) @ vectors.mT
    return root.float(), inverse.float()


def shrunk(metric: torch.Tensor, share: float) -> torch.Tensor:
    """Mix each matrix with the multiple of the identity that has its trace.

    Args:
        metric: ``[..., n, n]``.
        share: Of the identity, 0 to 1.
    """
    eye = torch.eye(metric.shape[-1], dtype=metric.dtype)
    mean = metric.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    return (1 - share) * metric + share * mean * eye


def query_moments(queries: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Return the mean outer product of the queries that read each key head.

    Args:
        queries: ``[tokens, heads, head_dim]`` before rotation.
        kv_heads: Key heads.

    Returns:
        ``[kv_heads, head_dim, head_dim]`` float32.
    """
    tokens, _, dim = queries.shape
    by_head = queries.float().reshape(tokens, kv_heads, -1, dim)
    grouped = by_head.permute(1, 0, 2, 3).reshape(kv_heads, -1, dim)
    return grouped.mT @ grouped / grouped.shape[1]


def query_metric(moments: torch.Tensor, rope: Rope | None, span: int) -> torch.Tensor:
    """Return what an error of a key before rotation costs in logits, over all distances.

    An error e of a key moves the logit of a query q at distance d by ``(R_d q) . e``, where R_d rotates the query to
    the key's position; its square, in the mean, is ``e' M e`` with M the mean of ``R_d C R_d'`` over distances.

    Args:
        moments: ``[kv_heads, head_dim, head_dim]`` C, of `query_moments`.
        rope: How the layer rotates.
        span: Distances reach to this many tokens, equally many in every octave.

    Returns:
        The same shape, float32.
    """
    if rope is None:
        return moments
    distances = np.unique(np.geomspace(1, max(span - 1, 1), _DISTANCES).astype(np.int64))
    # columns of C, then of its transpose, are turned like a head of each token
    turned = [
        _turn_rows(_turn_rows(moments, rope, int(distance)).mT, rope, int(distance))
        for distance in distances
    ]
    mean = torch.stack(turned).mean(dim=0)
    return (mean + mean.mT) / 2


def sensitivities(fisher: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """Return what a unit of error, white in a metric's coordinates, costs in each layer.

    Args:
        fisher: ``[layers, kv_heads, n, n]`` the true cost.
        metric: The same shape.

    Returns:
        ``[layers]``: the mean of ``trace(A^-1 F A^-1) / n`` over heads, where A is the metric's root.
    """
    _, inverse = roots(metric)
    cost = torch.einsum("lhij,lhjk,lhki->lh", inverse, fisher, inverse) / metric.shape[-1]
    return cost.mean(dim=1)


def _turn_rows(matrices: torch.Tensor, rope: Rope, distance: int) -> torch.Tensor:
    """Rotate every row of each matrix as if it stood so far on."""
    rows = matrices.permute(1, 0, 2)
    return turn(rows, rope, [distance] * len(rows), back=False).permute(1, 0, 2)
