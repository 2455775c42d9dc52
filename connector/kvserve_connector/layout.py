"""How the elements of an engine's KV cache lie in its memory.

vLLM shows every layer's cache as ``[blocks, heads, tokens of a block, 2 * head_dim]``, but what lies inside differs.
On GPUs the last dimension is key then value. On CPUs each (block, head) holds a key half and a value half, each
permuted by a rule of the instruction set in use. That rule is not assumed: the engine's own write operation is asked,
once at start-up, where it puts each element. What can't be explained is refused; nothing is guessed.
"""

from collections.abc import Callable

import torch

from kvserve_api.errors import UnsupportedError
from kvserve_connector.tiles import tiled
from kvserve_connector.views import LayerView, PermutedView, StridedView, TiledView

Writer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Writes keys and values ``[tokens, heads, dim]`` into a key half and a value half at slots ``[tokens]``, int64."""


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
