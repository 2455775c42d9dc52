"""How a rotation of each token enters a sum over tokens."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Turning:
    """Weights of channels, so that sums over tokens need not rotate: a rotation is linear.

    The sum of channel c turned back is that of ``own · x`` in c, and ``sign`` times that of ``other · x`` in its
    partner.

    Attributes:
        own: ``[tokens, heads · dim]`` float32: the cosine, 1 where nothing turns.
        other: The same shape: the sine, 0 where nothing turns.
        partner: ``[heads · dim]``: the other channel of the pair.
        sign: ``[heads · dim]`` float64: 1 for the first of a pair, -1 for the second.
    """

    own: NDArray[np.float32]
    other: NDArray[np.float32]
    partner: NDArray[np.int64]
    sign: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        cos: NDArray[np.float32],
        sin: NDArray[np.float32],
        interleaved: bool,
        heads: int,
        dim: int,
    ) -> Self:
        """Return the weights of keys.

        Args:
            cos: ``[tokens, pairs]`` of `rotate.tables`, to undo.
            sin: The same.
            interleaved: How pairs lie.
            heads: Heads of a token.
            dim: Size of a head.
        """
        pairs = cos.shape[1]
        first = np.arange(pairs) * (2 if interleaved else 1)
        second = first + (1 if interleaved else pairs)
        own = np.ones((len(cos), dim), np.float32)
        other = np.zeros((len(cos), dim), np.float32)
        partner, sign = np.arange(dim), np.ones(dim)
        for side, across in ((first, second), (second, first)):
            own[:, side], other[:, side], partner[side] = cos, sin, across
        sign[second] = -1
        by_head = np.arange(heads)[:, None] * dim
        return cls(
            own=np.tile(own, heads),
            other=np.tile(other, heads),
            partner=(by_head + partner).reshape(-1),
            sign=np.tile(sign, heads),
        )
