"""Paged caches and canonical tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve_api.wire import KVLayout
from kvserve_connector.layout import split_content
from kvserve_connector.paged import PagedCache

LAYERS, HEADS, DIM, BLOCKS = 3, 2, 32, 9


def strided_cache(order: tuple[int, ...], block: int) -> torch.Tensor:
    """Return ``[layers, blocks, heads, tokens, 2 * dim]`` whose memory has another order of axes."""
    shape = (LAYERS, BLOCKS, HEADS, block, 2 * DIM)
    memory = torch.zeros([shape[axis] for axis in order], dtype=torch.bfloat16)
    return memory.permute([order.index(axis) for axis in range(5)])


def paged(memory: torch.Tensor, block: int) -> PagedCache:
    """Return the cache of that memory."""
    layout = KVLayout(layers=LAYERS, kv_heads=HEADS, head_dim=DIM, dtype="bfloat16")
    return PagedCache([split_content(layer, DIM) for layer in memory], layout, block)


def random_kv(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random canonical keys and values."""
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYERS, tokens, HEADS, DIM)
    keys, values = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    return keys, values


MEMORY_ORDERS = {
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}


@pytest.mark.parametrize("order", MEMORY_ORDERS.values(), ids=MEMORY_ORDERS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read(order: tuple[int, ...], data: st.DataObject) -> None:
    """In every memory order of vLLM's, any token range comes back as it was written, and nothing else changes."""
    block = 16
    memory = strided_cache(order, block)
    cache = paged(memory, block)
    stop = data.draw(st.integers(1, 5 * block))
    start = data.draw(st.integers(0, stop - 1))
    ids = data.draw(st.permutations(range(BLOCKS)))[:5]
    keys, values = random_kv(stop - start)
    cache.write(range(LAYERS), range(start, stop), ids, keys, values)
    found = cache.read(range(LAYERS), range(start, stop), ids)
    assert torch.equal(found[0], keys)
    assert torch.equal(found[1], values)
    # all of it and only it was touched: the content's sum of squares is that of what was written
    written = keys.double().square().sum() + values.double().square().sum()
    assert torch.isclose(memory.double().square().sum(), written)


def test_content_is_key_then_value() -> None:
    """The first half of the last dimension is the key of that block, head and token."""
    memory = strided_cache(MEMORY_ORDERS["BLNHC"], 16)
    memory[1, 4, 1, 3, :DIM] = 5
    memory[1, 4, 1, 3, DIM:] = 7
    cache = paged(memory, 16)
    keys, values = cache.read(range(1, 2), range(16 + 3, 16 + 4), [0, 4])
    assert keys[0, 0, 1].tolist() == [5] * DIM
    assert values[0, 0, 1].tolist() == [7] * DIM
    assert keys[0, 0, 0].tolist() == [0] * DIM
