"""Paged caches and canonical tensors."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve_api.errors import UnsupportedError
from kvserve_api.wire import KVLayout
from kvserve_connector.cache import _cpu_writer
from kvserve_connector.layout import (
    LayerView,
    PagedCache,
    PermutedView,
    StridedView,
    TiledView,
    Writer,
    learn_orders,
    split_content,
    split_halves,
)

LAYERS, HEADS, DIM, BLOCKS = 3, 2, 32, 9


def strided_cache(order: tuple[int, ...], block: int) -> torch.Tensor:
    """Return ``[layers, blocks, heads, tokens, 2 * dim]`` whose memory has another order of axes."""
    shape = (LAYERS, BLOCKS, HEADS, block, 2 * DIM)
    memory = torch.zeros([shape[axis] for axis in order], dtype=torch.bfloat16)
    return memory.permute([order.index(axis) for axis in range(5)])


def paged(views: list[LayerView], block: int, dtype: str = "bfloat16") -> PagedCache:
    """Return the cache of views."""
    layout = KVLayout(layers=len(views), kv_heads=HEADS, head_dim=DIM, dtype=dtype)
    return PagedCache(views, layout, block)


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
    cache = paged([split_content(layer, DIM) for layer in memory], block)
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
    cache = paged([split_content(layer, DIM) for layer in memory], 16)
    keys, values = cache.read(range(1, 2), range(16 + 3, 16 + 4), [0, 4])
    assert keys[0, 0, 1].tolist() == [5] * DIM
    assert values[0, 0, 1].tolist() == [7] * DIM
    assert keys[0, 0, 0].tolist() == [0] * DIM


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("isa", "block", "form"),
    [
        pytest.param("vec", 128, StridedView, id="vec"),
        pytest.param("vec16", 16, StridedView, id="vec16"),
        pytest.param("amx", 64, TiledView, id="amx"),
    ],
)
def test_cpu_layouts_agree_with_vllm(
    isa: str, block: int, form: type[object], dtype: torch.dtype
) -> None:
    """What vLLM's own operation writes is read right, and what we write is what it would have written."""
    writer = _cpu_writer(isa)
    orders = learn_orders(writer, block, DIM, dtype)
    tokens, ids = 2 * block + 5, [4, 1, 6]
    generator = torch.Generator().manual_seed(1)
    keys, values = (
        torch.randn((tokens, HEADS, DIM), generator=generator).to(dtype) for _ in range(2)
    )
    theirs = torch.zeros(BLOCKS, HEADS, block, 2 * DIM, dtype=dtype)
    halves = theirs.view(BLOCKS, HEADS, 2 * block, DIM)
    slots = torch.tensor([ids[t // block] * block + t % block for t in range(tokens)])
    key_half, value_half = halves.chunk(2, dim=2)
    writer(keys, values, key_half, value_half, slots)

    name = str(dtype).removeprefix("torch.")
    view = split_halves(theirs, DIM, *orders)
    # pairs of four bytes each are not what matrix units take
    plain = isa == "amx" and dtype == torch.float32
    assert isinstance(view, PermutedView if plain else form)
    found = paged([view], block, name).read(range(1), range(3, tokens), ids)
    assert torch.equal(found[0][0], keys[3:])
    assert torch.equal(found[1][0], values[3:])

    ours = torch.zeros_like(theirs)
    target = paged([split_halves(ours, DIM, *orders)], block, name)
    target.write(range(1), range(tokens), ids, keys[None], values[None])
    assert torch.equal(ours, theirs)


def _halving(keys: torch.Tensor, _v: object, to: torch.Tensor, *_: object) -> None:
    to[1, 0, : len(keys)] = keys[:, 0] / 2


def _elsewhere(keys: torch.Tensor, _v: object, to: torch.Tensor, *_: object) -> None:
    to[0, 0, : len(keys)] = keys[:, 0]


@pytest.mark.parametrize("writer", [_halving, _elsewhere])
def test_unexplained_layouts_are_refused(writer: Callable[..., None]) -> None:
    """A write operation that scales, or writes another block, is an error, not a guess."""
    refused: Writer = writer
    with pytest.raises(UnsupportedError, match="cache's write operation"):
        learn_orders(refused, 16, DIM, torch.float32)


def test_scattered_blocks_are_refused() -> None:
    """A CPU cache that is not contiguous inside a block can't be viewed in halves."""
    order = torch.arange(16 * DIM)
    cache = torch.zeros(2, HEADS, 2 * DIM, 16).transpose(-1, -2)
    with pytest.raises(UnsupportedError, match="not contiguous"):
        split_halves(cache, DIM, order, order)
