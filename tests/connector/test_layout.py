"""How caches of CPUs lie in memory: as vLLM writes them, or refused."""

from collections.abc import Callable

import pytest
import torch

from kvserve_api.errors import UnsupportedError
from kvserve_api.wire import KVLayout
from kvserve_connector.cache import _cpu_writer
from kvserve_connector.layout import Writer, learn_orders, split_halves
from kvserve_connector.paged import PagedCache
from kvserve_connector.views import LayerView, PermutedView, StridedView, TiledView

HEADS, DIM, BLOCKS = 2, 32, 9


def paged(views: list[LayerView], block: int, dtype: str = "bfloat16") -> PagedCache:
    """Return the cache of views."""
    layout = KVLayout(layers=len(views), kv_heads=HEADS, head_dim=DIM, dtype=dtype)
    return PagedCache(views, layout, block)


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
    source = paged([view], block, name)
    # all, from within, a whole block, across an edge, ends of a tile, one token
    for start, stop in (
        (0, tokens),
        (3, tokens),
        (block, 2 * block),
        (block - 1, block + 1),
        (5, tokens - 2),
        (17, 18),
    ):
        found = source.read(range(1), range(start, stop), ids)
        assert torch.equal(found[0][0], keys[start:stop])
        assert torch.equal(found[1][0], values[start:stop])

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
