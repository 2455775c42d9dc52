"""Blocks whose elements lie in tiles with pairs side by side, as matrix units like them (AMX, on CPUs).

Keys hold pairs of dimensions, values pairs of tokens. Copied pair by pair, as one element of twice the size, a block
takes less than half the time of gathering each element from its place; copied by native code, about half of that.
"""

import sys
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from kvserve_kernels.tiles import put, take

_PAIR: Final = {2: np.uint32, 4: np.uint64}
_TORCH: Final = {2: torch.int16, 4: torch.int32}
PAIR: Final = 2
_FIRST: Final = np.zeros(1, np.int64)


@dataclass(frozen=True, slots=True)
class Tiles:
    """The keys, or the values, of one layer.

    Attributes:
        pairs: ``[blocks, heads, outer, inner, groups, columns]``, any strides: pairs as single elements. Tokens are
            outer times inner, dimensions groups times columns, whichever of the two is paired counted in pairs.
        of_tokens: Whether two tokens make a pair, else two dimensions.
        dtype: Of the cache.
    """

    pairs: np.ndarray
    of_tokens: bool
    dtype: torch.dtype

    @property
    def step(self) -> int:
        """Tokens can be written in multiples of this."""
        return int(self.pairs.shape[3]) * (PAIR if self.of_tokens else 1)

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return int(self.pairs.shape[2]) * self.step

    def read(self, block_ids: torch.Tensor, skip: int, out: torch.Tensor) -> None:
        """Copy tokens of consecutive blocks.

        Args:
            block_ids: The blocks.
            skip: The first token to copy, counted from the first block's.
            out: ``[tokens, heads, dim]``, contiguous.
        """
        ids, rows = block_ids.numpy(), out.view(_TORCH[self.dtype.itemsize]).numpy()
        done = 0
        while done < len(rows):
            index, offset = divmod(skip + done, self.block_tokens)
            left = len(rows) - done
            whole = 0 if offset else left // self.block_tokens
            if whole:
                count = whole * self.block_tokens
                self._take(rows[done : done + count], ids[index : index + whole], self.pairs)
            else:
                count = self._read_part(int(ids[index]), offset, rows[done:])
            done += count

    def _read_part(self, block: int, offset: int, rows: np.ndarray) -> int:
        """Copy tokens of one block from an offset on, as many as lie side by side in it; return how many."""
        group, start = divmod(offset, self.step)
        groups = min(len(rows), self.block_tokens - offset) // self.step
        if start or not groups:
            # part of one step
            step = np.empty((self.step, *rows.shape[1:]), rows.dtype)
            self._take(step, _FIRST, self.pairs[block : block + 1, :, group : group + 1])
            count = min(len(rows), self.step - start)
            rows[:count] = step[start : start + count]
            return count
        count = groups * self.step
        self._take(rows[:count], _FIRST, self.pairs[block : block + 1, :, group : group + groups])
        return count

    def write(self, block: int, offset: int, states: torch.Tensor) -> None:
        """Write ``[tokens, heads, dim]`` into one block from a token offset on; both are multiples of `step`."""
        first, last = offset // self.step, (offset + len(states)) // self.step
        self._put(states, _FIRST, self.pairs[block : block + 1, :, first:last])

    def write_blocks(self, block_ids: torch.Tensor, states: torch.Tensor) -> None:
        """Write ``[tokens, heads, dim]`` into whole blocks, one after the other."""
        self._put(states, block_ids.numpy(), self.pairs)

    def _put(self, states: torch.Tensor, blocks: np.ndarray, pairs: np.ndarray) -> None:
        rows = states.contiguous().view(_TORCH[self.dtype.itemsize]).numpy()
        put(rows, blocks, pairs, of_tokens=self.of_tokens)

    def _take(self, rows: np.ndarray, blocks: np.ndarray, pairs: np.ndarray) -> None:
        take(rows, blocks, pairs, of_tokens=self.of_tokens)


def tiled(half: torch.Tensor, tokens: int, dim: int, order: torch.Tensor) -> Tiles | None:
    """View one half of a cache in tiles, if its order is one of tiles with pairs.

    That is, where an element lies is a sum of what its token and its dimension contribute, each by two strides.

    Args:
        half: ``[blocks, heads, tokens * dim]``.
        tokens: Tokens of a block.
        dim: Size of a head.
        order: ``[tokens * dim]`` int64: where the canonical element ``token * dim + d`` is stored.
    """
    size = half.element_size()
    if sys.byteorder != "little" or size not in _PAIR or half.stride(2) != 1:
        return None
    places = order.view(tokens, dim)
    rows, columns = _axis(places[:, 0]), _axis(places[0])
    if int(places[0, 0]) or rows is None or columns is None:
        return None
    explained = sum(
        (torch.arange(length) * stride).view([-1 if n == axis else 1 for n in range(4)])
        for axis, (length, stride) in enumerate((*rows, *columns))
    )
    if not isinstance(explained, torch.Tensor) or not torch.equal(explained.flatten(), order):
        return None
    of_tokens = rows[1] == (PAIR, 1)
    if of_tokens == (columns[1] == (PAIR, 1)):
        return None
    axes = (rows[0], (1, PAIR), *columns) if of_tokens else (*rows, columns[0], (1, PAIR))
    strides = (*half.stride()[:2], *(stride for _, stride in axes))
    if any(stride % PAIR for stride in strides) or half.storage_offset() % PAIR:
        return None
    first = half.view(_TORCH[size])[0, 0, :PAIR].numpy()
    pairs = np.lib.stride_tricks.as_strided(
        first.view(_PAIR[size]),
        shape=(*half.shape[:2], *(length for length, _ in axes)),
        strides=tuple(stride * size for stride in strides),
    )
    return Tiles(pairs, of_tokens, half.dtype)


def _axis(places: torch.Tensor) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Explain evenly spaced runs of places at even distances: length and stride of the outer axis, and of the inner."""
    steps = places.diff().tolist()
    if not steps:
        return None
    inner = next((n for n, step in enumerate(steps, 1) if step != steps[0]), len(places))
    if len(places) % inner:
        return None
    outer = len(places) // inner
    return (outer, int(places[inner]) if outer > 1 else PAIR), (inner, steps[0])
