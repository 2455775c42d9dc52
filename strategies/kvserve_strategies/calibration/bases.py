"""Principal components of the KV cache, in the coordinates of a metric."""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvserve_strategies.bundle import BasisKey, Block, Group
from kvserve_strategies.calibration.statistics import SIDES

LEAST_SIGMA: Final = 0.02
"""Components below this part of the unit of steps are left out: the finest step that pays would silence them."""


def shrunk_to_layers(
    covariance: torch.Tensor, key: BasisKey, block: Block, tokens: int
) -> torch.Tensor:
    """Return a covariance with what joins different layers made weaker, the more the fewer tokens it is of.

    The covariance within a layer is of few channels and well known; that of a wide block is of as many as there are
    tokens, and part of what it sees between layers is chance (linear shrinkage: Ledoit and Wolf, "A well-conditioned
    estimator for large-dimensional covariance matrices", 2004, here towards the diagonal blocks).

    Args:
        covariance: ``[width, width]``, in the order of `statistics.columns`.
        key: Which kinds.
        block: Layers and heads.
        tokens: How many tokens it is of.
    """
    width = len(covariance)
    layers = len(block.layers)
    if layers == 1:
        return covariance
    share = 0.5 * width / (width + tokens)
    of_layer = width // (len(key.kinds) * layers)
    layer = torch.arange(width) // of_layer % layers
    same = layer[:, None] == layer[None, :]
    return torch.where(same, covariance, covariance * (1 - share))


def scaled(covariance: torch.Tensor, root: torch.Tensor, kinds: str, block: Block) -> torch.Tensor:
    """Return the covariance of a block after each head is multiplied by the metric's root.

    Args:
        covariance: ``[width, width]``, in the order of `statistics.columns`.
        root: ``[2, layers, kv_heads, head_dim, head_dim]``.
        kinds: ``k``, ``v`` or ``kv``.
        block: Layers and heads.

    Returns:
        ``[width, width]`` float32, symmetric.
    """
    layers, heads = block
    cut = root[[SIDES.index(kind) for kind in kinds]]
    matrices = cut[:, layers.start : layers.stop, heads.start : heads.stop].flatten(0, 2)
    count, dim = matrices.shape[:2]
    half = torch.einsum("nij,njw->niw", matrices, covariance.reshape(count, dim, -1))
    half = half.reshape(count * dim, -1).T.reshape(count, dim, -1)
    full = torch.einsum("nij,njw->niw", matrices, half).reshape(count * dim, -1)
    return (full + full.T) / 2


def components(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvectors and the deviations along them.

    Args:
        covariance: ``[width, width]``, symmetric.

    Returns:
        Orthonormal rows ``[width, width]`` and deviations ``[width]`` that fall, float32. Of the two directions of a
        vector that one is taken in which its largest element is positive.
    """
    variances, vectors = torch.linalg.eigh(covariance)
    rows = vectors.T.flip(0)
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return rows * largest.sign(), variances.flip(0).clamp(min=0).sqrt()


def pruned(rows: torch.Tensor, sigma: torch.Tensor, least: float) -> Group:
    """Return the components above a deviation, at least one."""
    kept = max(1, int((sigma > least).sum()))
    half: NDArray[np.float16] = rows[:kept].half().numpy().copy()
    return Group(rows=half, sigma=sigma[:kept].numpy().copy())
