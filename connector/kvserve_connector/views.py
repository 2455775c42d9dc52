"""One layer of an engine's cache, whatever lies inside of its blocks, read and written in canonical order."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch

from kvserve_connector.tiles import Tiles
from kvserve_kernels.blocks import put, take

_WORDS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class LayerView(Protocol):
    """One layer's cache, read and written block by block in canonical order."""

    def read(
        self, block_ids: torch.Tensor, skip: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Copy tokens of consecutive blocks.

        Args:
            block_ids: The blocks.
            skip: The first token to copy, counted from the first block's.
            keys: Where to, ``[tokens, heads, dim]``, contiguous.
            values: The same.
        """
        ...

    def write(
        self, block_ids: torch.Tensor, skip: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Write ``[tokens, heads, dim]`` into consecutive blocks, from a token of the first one on; as `read`."""
        ...


@dataclass(frozen=True, slots=True)
class StridedView:
    """A layer whose keys and values are plain strided views.

    Attributes:
        keys: ``[blocks, heads, block_tokens, dim]``, any strides.
        values: The same.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def read(
        self, block_ids: torch.Tensor, skip: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """See `LayerView`."""
        for source, target in ((self.keys, keys), (self.values, values)):
            if source.device.type == "cpu":
                take(_words(target), block_ids.numpy(), _words(source), first=skip)
            else:
                _cut(source[block_ids].permute(0, 2, 1, 3), skip, target)

    def write(
        self, block_ids: torch.Tensor, skip: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """See `LayerView`."""
        for target, states in ((self.keys, keys), (self.values, values)):
            if target.device.type == "cpu":
                put(_words(states.contiguous()), block_ids.numpy(), _words(target), first=skip)
            else:
                places = torch.arange(skip, skip + len(states))
                index, token = places // target.shape[2], places % target.shape[2]
                target[block_ids[index], :, token] = states.to(target.device)


@dataclass(frozen=True, slots=True)
class PermutedView:
    """A layer whose (block, head) halves hold their elements in an order of their own.

    Attributes:
        halves: ``[blocks, heads, 2, block_tokens * dim]``: keys, then values.
        key_order: ``[block_tokens * dim]`` int64: where the canonical element ``token * dim + d`` is stored.
        value_order: The same for values.
        dim: Size of a head.
        key_places: The inverse: which canonical element is stored at each place.
        value_places: The same for values.
    """

    halves: torch.Tensor
    key_order: torch.Tensor
    value_order: torch.Tensor
    dim: int
    key_places: torch.Tensor
    value_places: torch.Tensor

    def read(
        self, block_ids: torch.Tensor, skip: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """See `LayerView`."""
        blocks = self.halves[block_ids]
        shape = (*blocks.shape[:2], -1, self.dim)
        for half, order, target in ((0, self.key_order, keys), (1, self.value_order, values)):
            _cut(_take(blocks[:, :, half], order).view(shape).permute(0, 2, 1, 3), skip, target)

    def write(
        self, block_ids: torch.Tensor, skip: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """See `LayerView`."""
        size = len(self.key_order) // self.dim
        for block, offset, part in _pieces(block_ids, skip, len(keys), size):
            self.write_part(block, offset, keys[part], values[part])

    def write_part(self, block: int, offset: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write ``[tokens, heads, dim]`` into one block from a token offset on."""
        span = slice(offset * self.dim, (offset + keys.shape[0]) * self.dim)
        for half, order, places, states in (
            (0, self.key_order, self.key_places, keys),
            (1, self.value_order, self.value_places, values),
        ):
            target, source = self.halves[block, :, half], states.transpose(0, 1).flatten(1)
            if source.shape == target.shape:
                # gathering all of a block is twice as fast as scattering into it
                target.copy_(_take(source, places))
            else:
                target[:, order[span]] = source


@dataclass(frozen=True, slots=True)
class TiledView:
    """A layer whose halves are in tiles.

    Attributes:
        keys: Its keys.
        values: Its values.
        single: The same cache, element by element, for what does not fill tiles.
    """

    keys: Tiles
    values: Tiles
    single: PermutedView

    def read(
        self, block_ids: torch.Tensor, skip: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """See `LayerView`."""
        self.keys.read(block_ids, skip, keys)
        self.values.read(block_ids, skip, values)

    def write(
        self, block_ids: torch.Tensor, skip: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """See `LayerView`."""
        size, count = self.keys.block_tokens, len(keys)
        start = min(-skip % size, count)
        stop = max(start, count - (skip + count) % size)
        if start < stop:
            first = (skip + start) // size
            ids, whole = block_ids[first : first + (stop - start) // size], slice(start, stop)
            self.keys.write_blocks(ids, keys[whole])
            self.values.write_blocks(ids, values[whole])
        for begin, end in ((0, start), (stop, count)):
            ids = block_ids[(skip + begin) // size :]
            for block, offset, part in _pieces(ids, (skip + begin) % size, end - begin, size):
                rows = slice(begin + part.start, begin + part.stop)
                self._write_part(block, offset, keys[rows], values[rows])

    def _write_part(
        self, block: int, offset: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        step = max(self.keys.step, self.values.step)
        whole = keys.shape[0] // step * step
        if offset % step or not whole:
            self.single.write_part(block, offset, keys, values)
            return
        self.keys.write(block, offset, keys[:whole])
        self.values.write(block, offset, values[:whole])
        if whole < keys.shape[0]:
            self.single.write_part(block, offset + whole, keys[whole:], values[whole:])


@dataclass(frozen=True, slots=True)
class BlockView:
    """A layer whose blocks are bytes; a block is one row of two halves, zeros after its end.

    Attributes:
        blocks: ``[blocks, …]``, any dtype and strides.
        heads: Heads of a half.
        dim: Bytes of a head.
    """

    blocks: torch.Tensor
    heads: int
    dim: int

    def read(
        self, block_ids: torch.Tensor, skip: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """See `LayerView`."""
        content = self.blocks[block_ids].contiguous().flatten(1).view(torch.uint8)
        halves = torch.zeros(len(block_ids), 2 * self.heads * self.dim, dtype=torch.uint8)
        halves[:, : content.shape[1]] = content
        rows = halves.view(len(block_ids), 2, 1, self.heads, self.dim)
        _cut(rows[:, 0], skip, keys)
        _cut(rows[:, 1], skip, values)

    def write(
        self, block_ids: torch.Tensor, skip: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """See `LayerView`."""
        for block, _, part in _pieces(block_ids, skip, len(keys), 1):
            target = self.blocks[block]
            content = torch.cat([keys[part].flatten(), values[part].flatten()])
            nbytes = target.numel() * target.element_size()
            target.copy_(content[:nbytes].view(target.dtype).view(target.shape))


def _words(states: torch.Tensor) -> np.ndarray:
    """View a tensor on the CPU as integers of the same size, because NumPy does not know all dtypes."""
    return states.view(_WORDS[states.element_size()]).numpy()


def _cut(blocks: torch.Tensor, skip: int, out: torch.Tensor) -> None:
    """Copy tokens out of ``[blocks, block_tokens, heads, dim]``, from one on."""
    out.copy_(blocks.reshape(-1, *out.shape[1:])[skip : skip + len(out)])


def _take(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the elements of the last dimension in an order; by NumPy, which is twice as fast at it as torch."""
    kind = {2: torch.int16, 4: torch.int32}[states.element_size()]
    taken = np.take(states.view(kind).numpy(), order.numpy(), axis=-1)
    return torch.from_numpy(taken).view(states.dtype)


def _pieces(
    block_ids: torch.Tensor, skip: int, count: int, block_tokens: int
) -> Iterator[tuple[int, int, slice]]:
    """Yield for each block that so many tokens lie in its id, where in it they begin, and which of them they are."""
    done = 0
    while done < count:
        index, offset = divmod(skip + done, block_tokens)
        stop = min(count, done + block_tokens - offset)
        yield int(block_ids[index]), offset, slice(done, stop)
        done = stop
