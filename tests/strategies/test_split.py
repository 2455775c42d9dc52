"""Split rules: every cell is coded exactly once, by the first part that selects it."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.strategies.laws import bits, sample

from kvserve_api.errors import StrategyError
from kvserve_api.strategy import (
    Kind,
    Part,
    StageConfig,
    StrategyConfig,
    select_indices,
    select_tokens,
)
from kvserve_strategies import Pipeline, Place
from kvserve_strategies.split import Extent, Rectangle, cut

RAW = (StageConfig(id="code.raw.v1"),)
EIGHT = (
    StageConfig(id="quantise.token.v1", params={"levels": 256, "group": 0}),
    StageConfig(id="code.pack.v1"),
)
TWO = (
    StageConfig(id="quantise.token.v1", params={"levels": 4, "group": 0}),
    StageConfig(id="code.pack.v1"),
)
ALL = [Part(kind=Kind.KEYS, chain=TWO), Part(kind=Kind.VALUES, chain=TWO)]
SLICES = st.sampled_from(["", "0", "1:", ":2", "-1", "0,2", "1:3,-1:", "5:", ":"])
PARTS = st.builds(
    Part,
    kind=st.sampled_from([Kind.KEYS, Kind.VALUES, "kv"]),
    chain=st.just(EIGHT),
    layers=SLICES,
    heads=SLICES,
    tokens=st.sampled_from(["", ":1", ":4", ":100", "-1:", "-3:", "-100:"]),
).filter(lambda part: not part.selects_all)


@pytest.mark.parametrize(
    ("text", "size", "chosen"),
    [
        ("", 3, {0, 1, 2}),
        (":", 2, {0, 1}),
        ("0:2,-2:", 6, {0, 1, 4, 5}),
        ("0:2,-2:", 3, {0, 1, 2}),
        ("7", 3, set()),
        ("-7", 3, set()),
        ("-1", 3, {2}),
        ("1,0", 3, {0, 1}),
        ("2:1", 3, set()),
    ],
)
def test_slices(text: str, size: int, chosen: set[int]) -> None:
    """Selectors mean what Python's slices mean; what is out of range selects nothing."""
    assert select_indices(text, size) == chosen


@pytest.mark.parametrize(
    ("text", "tokens", "chosen"),
    [
        ("", range(3, 9), range(3, 9)),
        (":4", range(10), range(4)),
        (":4", range(2, 10), range(2, 4)),
        (":4", range(4, 10), range(4, 4)),
        (":40", range(2, 10), range(2, 10)),
        ("-4:", range(10), range(6, 10)),
        ("-4:", range(2, 5), range(2, 5)),
    ],
)
def test_tokens(text: str, tokens: range, chosen: range) -> None:
    """First tokens count from the request's start, last ones from the piece's end."""
    assert select_tokens(text, tokens) == chosen


def owner(parts: tuple[Part, ...], kind: Kind, cell: tuple[int, int, int], extent: Extent) -> int:
    """Return which part codes a cell, decided cell by cell: the definition that `cut` must meet."""
    layer, token, head = cell
    taken: set[Kind] = set()
    for number, part in enumerate(parts):
        selected = (
            layer in select_indices(part.layers, extent.model_layers)
            and head in select_indices(part.heads, extent.heads)
            and token in select_tokens(part.tokens, extent.tokens)
        )
        if selected and not taken & set(part.kinds):
            if kind in part.kinds:
                return number
            taken.update(part.kinds)
    raise AssertionError("a cell is left over")


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(PARTS, max_size=4),
    layers=st.tuples(st.integers(0, 2), st.integers(1, 3)),
    heads=st.integers(1, 3),
    tokens=st.tuples(st.integers(0, 6), st.integers(1, 9)),
)
def test_every_cell_once(
    parts: list[Part], layers: tuple[int, int], heads: int, tokens: tuple[int, int]
) -> None:
    """The rectangles of a piece are disjoint, cover it, and give each cell to the first part that selects it."""
    config = StrategyConfig(parts=(*parts, *ALL))
    extent = Extent(
        layers=range(layers[0], sum(layers)),
        model_layers=5,
        heads=heads,
        tokens=range(tokens[0], sum(tokens)),
    )
    seen: dict[tuple[Kind, int, int, int], int] = {}
    for area in cut(config.parts, extent):
        for kind in area.kinds:
            for layer in area.layers:
                for token in area.tokens:
                    for head in area.heads:
                        assert (kind, layer, token, head) not in seen
                        seen[kind, layer, token, head] = area.part
    assert len(seen) == 2 * len(extent.layers) * len(extent.tokens) * heads
    for (kind, layer, token, head), part in seen.items():
        assert part == owner(config.parts, kind, (layer, token, head), extent)


def test_rectangles() -> None:
    """Sinks, special layers and the rest are cut as one would by hand."""
    parts = (
        Part(kind="kv", tokens=":4", chain=RAW),
        Part(kind=Kind.VALUES, layers="0", chain=EIGHT),
        *ALL,
    )
    extent = Extent(layers=range(3), model_layers=3, heads=2, tokens=range(10))
    both = (Kind.KEYS, Kind.VALUES)
    heads = (0, 1)
    assert cut(parts, extent) == (
        Rectangle(part=0, kinds=both, layers=(0, 1, 2), heads=heads, tokens=range(4)),
        Rectangle(part=1, kinds=both[1:], layers=(0,), heads=heads, tokens=range(4, 10)),
        Rectangle(part=2, kinds=both[:1], layers=(0, 1, 2), heads=heads, tokens=range(4, 10)),
        Rectangle(part=3, kinds=both[1:], layers=(1, 2), heads=heads, tokens=range(4, 10)),
    )


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(PARTS, max_size=3), seed=st.integers(0, 99), first=st.integers(0, 5))
def test_round_trip(parts: list[Part], seed: int, first: int) -> None:
    """Each cell comes back as its own part codes it: raw exactly, coarse levels as the chain alone gives them."""
    raw = [
        Part(kind=p.kind, layers=p.layers, heads=p.heads, tokens=p.tokens, chain=RAW) for p in parts
    ]
    config = StrategyConfig(parts=(*raw, *ALL))
    shape = (3, 9, 3, 8)
    keys, values = (sample("gauss", seed + i, shape, torch.bfloat16) for i in range(2))
    at = Place(first_layer=1, model_layers=5, first_token=first)
    pipeline = Pipeline.of(config)
    payload = pipeline.encode(keys, values, at=at)
    decoded = pipeline.decode(payload, shape=shape, dtype=keys.dtype, at=at)
    extent = Extent(layers=range(1, 4), model_layers=5, heads=3, tokens=range(first, first + 9))
    coarse = Pipeline.of(StrategyConfig(parts=tuple(ALL)))
    rest = coarse.decode(coarse.encode(keys, values), shape=shape, dtype=keys.dtype)
    exact = {kind: np.zeros(shape[:3], bool) for kind in Kind}
    for area in cut(config.parts, extent):
        if area.part < len(raw):
            layers = [layer - 1 for layer in area.layers]
            tokens = [token - first for token in area.tokens]
            for kind in area.kinds:
                exact[kind][np.ix_(layers, tokens, area.heads)] = True
    for kind, native, mine, other in zip(Kind, (keys, values), decoded, rest, strict=True):
        wanted = np.where(exact[kind][..., None], bits(native), bits(other))
        np.testing.assert_array_equal(bits(mine), wanted)


def strategy(*parts: dict[str, Any]) -> StrategyConfig:
    """Read a strategy of raw parts."""
    chain = [{"id": "code.raw.v1"}]
    document = {"schema": "kvserve.io/strategy/v1", "parts": [{"chain": chain} | p for p in parts]}
    return StrategyConfig.from_json(json.loads(json.dumps(document)))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        pytest.param([{"kind": "k"}], "select all of v", id="no values"),
        pytest.param([{"kind": "kv", "tokens": ":4"}], "select all of k and of v", id="sinks only"),
        pytest.param(
            [{"kind": "k", "tokens": ":4"}, {"kind": "kv"}],
            "select all of k and of v",
            id="half taken",
        ),
        pytest.param(
            [{"kind": "kv"}, {"kind": "k"}], r"parts\[1\]: is never reached", id="after all"
        ),
        pytest.param(
            [{"kind": "k"}, {"kind": "kv"}, {"kind": "v"}], "never reached", id="joint late"
        ),
        pytest.param([{"kind": "kv", "layers": "a"}], "slices like", id="no slice"),
        pytest.param([{"kind": "kv", "layers": "0:4:2"}], "slices like", id="a stride"),
        pytest.param([{"kind": "kv", "heads": "0,"}], "slices like", id="empty slice"),
        pytest.param([{"kind": "kv", "tokens": "4:"}], "must be like ':4'", id="middle"),
        pytest.param([{"kind": "kv", "tokens": ":0"}], "must be like ':4'", id="no tokens"),
        pytest.param([{"kind": "kv", "tokens": ":70000"}], "at most 65535", id="too many tokens"),
        pytest.param([{"kind": "q"}], "must be one of k, v, kv", id="kind"),
        pytest.param([{"kind": "kv", "layer": "0"}], "layer: is not known", id="typo"),
        pytest.param([{"kind": "kv", "chain": []}], "at least one stage", id="empty chain"),
        pytest.param([], "must be 1 to 16", id="no part"),
    ],
)
def test_what_can_not_work(parts: list[dict[str, Any]], message: str) -> None:
    """Splits that leave cells over, or have parts that are never reached, do not construct."""
    with pytest.raises(StrategyError, match=message):
        strategy(*parts)


def test_identity() -> None:
    """Order of plain keys and values does not count, order of parts with selectors does; selectors survive JSON."""
    assert (
        strategy({"kind": "k"}, {"kind": "v"}).digest
        == strategy({"kind": "v"}, {"kind": "k"}).digest
    )
    sinks, layer = {"kind": "kv", "tokens": ":4"}, {"kind": "kv", "layers": "0"}
    one = strategy(sinks, layer, {"kind": "kv"})
    other = strategy(layer, sinks, {"kind": "kv"})
    assert one.digest != other.digest
    assert StrategyConfig.from_json(one.to_json()) == one
    assert [where for where, _ in one.chains()] == ["kv tokens :4", "kv layers 0", "kv"]
