"""Between an engine's paged KV cache and canonical tensors ``[layers, tokens, kv_heads, head_dim]``.

vLLM shows every layer's cache as ``[blocks, heads, tokens of a block, 2 * head_dim]``, but what lies inside differs.
On GPUs the last dimension is key then value. On CPUs each (block, head) holds a key half and a value half, each
permuted by a rule of the instruction set in use. That rule is not assumed: the engine's own write operation is asked,
once at start-up, where it puts each element. What can't be explained is refused; nothing is guessed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kvserve_api.errors import UnsupportedError
from kvserve_api.wire import KVLayout
from kvserve_connector.tiles import Tiles, tiled

Writer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Writes keys and values ``[tokens, heads, dim]`` into a key half and a value half at slots ``[tokens]``, int64."""


class LayerView(Protocol):
    """One layer's cache, read and written block by block in canonical order."""

    def read(self, block_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values ``[blocks, block_tokens, heads, dim]`` of whole blocks."""
        ...

    def write(self, block: int, offset: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write ``[tokens, heads, dim]`` into one block from a token offset on."""
        ...

    def write_blocks(
        self, block_ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Write ``[tokens, heads, dim]`` into whole blocks, one after the other."""
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

    def read(self, block_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `LayerView`."""
        return self.keys[block_ids].permute(0, 2, 1, 3), self.values[block_ids].permute(0, 2, 1, 3)

    def write(self, block: int, offset: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See `LayerView`."""
        end = offset + keys.shape[0]
        self.keys[block, :, offset:end].copy_(keys.transpose(0, 1))
        self.values[block, :, offset:end].copy_(values.transpose(0, 1))

    def write_blocks(
        self, block_ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """See `LayerView`."""
        for target, states in ((self.keys, keys), (self.values, values)):
            blocks = states.view(len(block_ids), -1, *states.shape[1:])
            target[block_ids] = blocks.permute(0, 2, 1, 3)


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

    def read(self, block_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `LayerView`."""
        blocks = self.halves[block_ids]
        shape = (*blocks.shape[:2], -1, self.dim)
        keys, values = (
            _take(blocks[:, :, half], order).view(shape).permute(0, 2, 1, 3)
            for half, order in enumerate((self.key_order, self.value_order))
        )
        return keys, values

    def write(self, block: int, offset: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See `LayerView`."""
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

    def write_blocks(
        self, block_ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """See `LayerView`."""
        _one_by_one(self, block_ids, keys, values)


def _take(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the elements of the last dimension in an order; by NumPy, which is twice as fast at it as torch."""
    kind = {2: torch.int16, 4: torch.int32}[states.element_size()]
    taken = np.take(states.view(kind).numpy(), order.numpy(), axis=-1)
    return torch.from_numpy(taken).view(states.dtype)


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

    def read(self, block_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `LayerView`."""
        return self.keys.read(block_ids), self.values.read(block_ids)

    def write(self, block: int, offset: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See `LayerView`."""
        step = max(self.keys.step, self.values.step)
        whole = keys.shape[0] // step * step
        if offset % step or not whole:
            self.single.write(block, offset, keys, values)
            return
        self.keys.write(block, offset, keys[:whole])
        self.values.write(block, offset, values[:whole])
        if whole < keys.shape[0]:
            self.single.write(block, offset + whole, keys[whole:], values[whole:])

    def write_blocks(
        self, block_ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """See `LayerView`."""
        self.keys.write_blocks(block_ids, keys)
        self.values.write_blocks(block_ids, values)


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

    def read(self, block_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `LayerView`."""
        content = self.blocks[block_ids].contiguous().flatten(1).view(torch.uint8)
        halves = torch.zeros(len(block_ids), 2 * self.heads * self.dim, dtype=torch.uint8)
        halves[:, : content.shape[1]] = content
        rows = halves.view(len(block_ids), 2, 1, self.heads, self.dim)
        return rows[:, 0], rows[:, 1]

    def write(self, block: int, offset: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See `LayerView`."""
        target = self.blocks[block]
        content = torch.cat([keys.flatten(), values.flatten()])
        nbytes = target.numel() * target.element_size()
        target.copy_(content[:nbytes].view(target.dtype).view(target.shape))

    def write_blocks(
        self, block_ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """See `LayerView`."""
        _one_by_one(self, block_ids, keys, values)


def _one_by_one(
    view: LayerView, block_ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    for block, *states in zip(
        block_ids.tolist(),
        keys.chunk(len(block_ids)),
        values.chunk(len(block_ids)),
        strict=True,
    ):
        view.write(block, 0, *states)


class PagedCache:
    """Layers of an engine's paged cache with one layout, in canonical order; its tokens may be other rows of blocks.

    Reading and writing are safe from any thread as long as nobody else writes the same blocks.
    """

    def __init__(self, layers: Sequence[LayerView], layout: KVLayout, block_tokens: int) -> None:
        self.layout = layout
        self.block_tokens = block_tokens
        self._layers = layers
        self._dtype: torch.dtype = getattr(torch, layout.dtype)

    def read(
        self, layers: range, tokens: range, block_ids: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy keys and values out of the cache.

        Args:
            layers: Consecutive layers.
            tokens: Consecutive tokens of the request.
            block_ids: The request's blocks, from its first token on.

        Returns:
            Keys and values, each ``[layers, tokens, heads, dim]``, contiguous, on the CPU.
        """
        first, skip = divmod(tokens.start, self.block_tokens)
        last = -(-tokens.stop // self.block_tokens)
        ids = torch.tensor(block_ids[first:last], dtype=torch.int64)
        heads, dim = self.layout.kv_heads, self.layout.head_dim
        shape = (len(layers), len(tokens), heads, dim)
        keys = torch.empty(shape, dtype=self._dtype)
        values = torch.empty(shape, dtype=self._dtype)
        for row, layer in enumerate(layers):
            for out, blocks in zip((keys, values), self._layers[layer].read(ids), strict=True):
                out[row].copy_(blocks.reshape(-1, heads, dim)[skip : skip + len(tokens)])
        return keys, values

    def write(
        self,
        layers: range,
        tokens: range,
        block_ids: Sequence[int],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Copy canonical keys and values into the cache; the arguments are those of `read`."""
        step = self.block_tokens
        first, last = -(-tokens.start // step), tokens.stop // step
        whole = range(first * step, last * step)
        ids = torch.tensor(block_ids[first:last], dtype=torch.int64)
        # what does not fill a block: before the whole ones and behind, or all inside of one
        ends = (
            (range(tokens.start, whole.start), range(whole.stop, tokens.stop))
            if whole
            else (tokens,)
        )
        for row, layer in enumerate(layers):
            view = self._layers[layer]
            if whole:
                part = slice(whole.start - tokens.start, whole.stop - tokens.start)
                view.write_blocks(ids, keys[row, part], values[row, part])
            for end in ends:
                start = end.start
                while start < end.stop:
                    block, offset = divmod(start, step)
                    stop = min(end.stop, (block + 1) * step)
                    part = slice(start - tokens.start, stop - tokens.start)
                    view.write(block_ids[block], offset, keys[row, part], values[row, part])
                    start = stop


def split_content(cache: torch.Tensor, dim: int) -> StridedView:
    """View a cache whose last dimension is key then value, as on GPUs; any strides.

    Args:
        cache: ``[blocks, heads, block_tokens, 2 * dim]``.
        dim: Size of a head.
    """
    return StridedView(cache[..., :dim], cache[..., dim:])


def split_halves(
    cache: torch.Tensor, dim: int, key_order: torch.Tensor, value_order: torch.Tensor
) -> LayerView:
    """View a cache whose (block, head) holds a half of keys, then a half of values, as on CPUs.

    Args:
        cache: ``[blocks, heads, block_tokens, 2 * dim]``, contiguous in the last two dimensions.
        dim: Size of a head.
        key_order: See `PermutedView`; as `learn_orders` returns it.
        value_order: The same.

    Raises:
        UnsupportedError: The cache is not contiguous inside a (block, head).
    """
    blocks, heads, tokens, content = cache.shape
    if cache.stride(3) != 1 or cache.stride(2) != content:
        raise UnsupportedError(
            "the KV cache is not contiguous inside a block: can't be transferred"
        )
    halves = cache.view(blocks, heads, 2, tokens * dim)
    views = (
        _strided(halves[:, :, 0], tokens, dim, key_order),
        _strided(halves[:, :, 1], tokens, dim, value_order),
    )
    if views[0] is not None and views[1] is not None:
        return StridedView(views[0], views[1])
    places = torch.argsort(key_order), torch.argsort(value_order)
    single = PermutedView(halves, key_order, value_order, dim, *places)
    keys = tiled(halves[:, :, 0], tokens, dim, key_order)
    values = tiled(halves[:, :, 1], tokens, dim, value_order)
    return single if keys is None or values is None else TiledView(keys, values, single)


def learn_orders(
    writer: Writer, block_tokens: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find out where an engine's write operation puts each element of a block.

    Each element's index is written, digit by digit in base 128 because bfloat16 holds no more exactly, into a scratch
    cache of two blocks and one head, and read back.

    Args:
        writer: The engine's operation; it gets the key half and the value half of the scratch cache.
        block_tokens: Tokens in a block.
        dim: Size of a head.
        dtype: Type of the cache.

    Returns:
        For keys and for values ``[block_tokens * dim]`` int64: where element ``token * dim + d`` is stored.

    Raises:
        UnsupportedError: The operation does not merely permute, or touches another block.
    """
    size = block_tokens * dim
    index = torch.arange(size)
    slots = torch.arange(block_tokens) + block_tokens
    stored = torch.zeros(2, size, dtype=torch.int64)
    scale = 1
    while scale < size:
        digit = (index // scale % 128).view(block_tokens, 1, dim).to(dtype)
        scratch = torch.zeros(2, 1, 2, size, dtype=dtype)
        halves = scratch.view(2, 1, 2 * block_tokens, dim)
        key_half, value_half = halves.chunk(2, dim=2)
        writer(digit, digit.clone(), key_half, value_half, slots)
        if scratch[0].any():
            raise UnsupportedError("the cache's write operation reaches outside of its block")
        stored += scratch[1, 0].to(torch.int64) * scale
        scale *= 128
    orders = torch.argsort(stored, dim=1)
    if not torch.equal(torch.gather(stored, 1, orders), index.expand(2, -1)):
        raise UnsupportedError("the cache's write operation does more than permute: unknown layout")
    return orders[0].contiguous(), orders[1].contiguous()


def _strided(half: torch.Tensor, tokens: int, dim: int, order: torch.Tensor) -> torch.Tensor | None:
    """Return ``[blocks, heads, tokens, dim]`` if the order is the natural or the transposed one."""
    natural = torch.arange(tokens * dim)
    if torch.equal(order, natural):
        return half.view(*half.shape[:2], tokens, dim)
    if torch.equal(order, natural.view(dim, tokens).T.reshape(-1)):
        return half.view(*half.shape[:2], dim, tokens).transpose(-1, -2)
    return None
