"""What pieces of a prompt are called, and which of them make a hit."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_loopback import FORM, LAYOUT
from kvserve_connector.groups import Opaque
from kvserve_connector.stores.keys import (
    Hit,
    Rate,
    find,
    keys_of,
    layer_groups,
    names_of,
    space_of,
)
from kvserve_strategies import PRESETS, Pipeline

SPACE = space_of(FORM, "model@1", 4)
RAW, LOSSLESS, FINE, COARSE = (
    Rate.of(Pipeline.of(PRESETS[name]))
    for name in ("none", "lossless", "centred-rans-fine", "centred-rans-coarse")
)
GROUPS = {rate: layer_groups(7, 5) for rate in (RAW, LOSSLESS, FINE, COARSE)}


@given(
    tokens=st.lists(st.integers(0, 10), max_size=30),
    other=st.lists(st.integers(0, 10), max_size=30),
)
def test_names_agree_as_far_as_prompts_do(tokens: list[int], other: list[int]) -> None:
    """Two prompts share exactly the names of the steps with which both begin; those at a chunk's end are chunks'."""
    ours, theirs = names_of(tokens, 4, step=2), names_of(other, 4, step=2)
    assert len(ours.marks) == len(tokens) // 2
    assert len(set(ours.marks)) == len(ours.marks)
    for number, (a, b) in enumerate(zip(ours.marks, theirs.marks, strict=False), start=1):
        assert (a == b) == (tokens[: 2 * number] == other[: 2 * number])
    assert ours.chunks == ours.marks[1::2] == names_of(tokens, 4, step=4).marks
    inside = [ours.marks_of(chunk) for chunk in range(len(ours.chunks) + 1)]
    assert [mark for marks in inside for mark in marks] == list(ours.marks)
    assert [ours.parent(chunk) for chunk in range(len(ours.chunks) + 1)] == [
        ours.root,
        *ours.chunks,
    ]


def test_names_depend_on_all_that_decides_the_kv() -> None:
    """An adapter, an image or another order of them leads to other names, and so do parts joined otherwise."""
    extras = [(), ("a",), ("b",), ("a", "b"), ("b", "a"), ("ab",)]
    named = [names_of(range(8), 4, each, step=2) for each in extras]
    assert len({names.marks for names in named}) == len({n.root for n in named}) == len(extras)


def test_a_space_is_of_one_model() -> None:
    """Other weights, another model, layout or chunk length never meet; opaque caches have no space."""
    part = FORM.parts[0]
    forms = (
        FORM,
        replace(FORM, fingerprint="sha256:" + "1" * 64),
        replace(FORM, parts=(replace(part, layout=replace(LAYOUT, head_dim=32)),)),
    )
    spaces = {space_of(form, "model@1", 4) for form in forms}
    assert len(spaces | {space_of(FORM, "model@2", 4), space_of(FORM, "model@1", 8)}) == 5
    for form, weights in ((replace(FORM, opaque=Opaque.MLA), "model@1"), (FORM, "")):
        with pytest.raises(ValueError, match="named weights"):
            space_of(form, weights, 4)


def test_families_hold_several_rates() -> None:
    """Strategies that differ by their steps only are rates of one family."""
    assert FINE.family == COARSE.family
    assert FINE.strategy != COARSE.strategy
    assert RAW.family != LOSSLESS.family


def test_paths_fit_every_store() -> None:
    """A key's path is short, and of harmless characters."""
    (first, last) = keys_of(SPACE, names_of(range(4), 4, step=4).chunks[0], [FINE], GROUPS[FINE])
    assert first.path.endswith("/0-5")
    assert last.path.endswith("/5-7")
    assert len(first.path) < 200
    assert first.path.replace("/", "").replace("-", "").isalnum()


@pytest.mark.parametrize(
    ("layers", "most", "multiple", "groups"),
    [
        pytest.param(7, 5, 1, [(0, 5), (5, 7)], id="plain"),
        pytest.param(7, 5, 3, [(0, 3), (3, 6), (6, 7)], id="joint"),
        pytest.param(30, 5, 10, [(0, 10), (10, 20), (20, 30)], id="wide"),
        pytest.param(3, 8, 2, [(0, 3)], id="all"),
    ],
)
def test_layer_groups(layers: int, most: int, multiple: int, groups: list[tuple[int, int]]) -> None:
    """Groups begin where strategies may begin, and hold no more than was asked for unless the strategy does."""
    assert [(g.start, g.stop) for g in layer_groups(layers, most, multiple)] == groups


PREFIXES = names_of(range(12), 4, step=4).chunks


def paths(*held: tuple[int, Rate]) -> set[str]:
    """Return the paths of whole chunks at rates."""
    return {
        key.path
        for chunk, rate in held
        for key in keys_of(SPACE, PREFIXES[chunk], [rate], GROUPS[rate])
    }


@pytest.mark.parametrize(
    ("present", "rates"),
    [
        pytest.param(set(), (), id="nothing"),
        pytest.param(paths((0, FINE), (1, FINE), (2, FINE)), (FINE,) * 3, id="all"),
        pytest.param(paths((0, FINE), (1, COARSE), (2, FINE)), (FINE, COARSE, FINE), id="mixed"),
        pytest.param(paths((0, COARSE), (0, FINE)), (FINE,), id="preferred"),
        pytest.param(paths((1, FINE), (2, FINE)), (), id="no-start"),
        pytest.param(paths((0, FINE), (2, FINE)), (FINE,), id="gap"),
        pytest.param(paths((0, LOSSLESS)), (), id="another-family"),
        pytest.param(set(sorted(paths((0, FINE)))[1:]), (), id="layers-missing"),
        pytest.param(
            set(sorted(paths((0, FINE)))[1:]) | paths((0, COARSE)), (COARSE,), id="other-rate-whole"
        ),
    ],
)
def test_hits(present: set[str], rates: tuple[Rate, ...]) -> None:
    """A hit is the longest start of which every chunk is whole at a rate that may be used, the preferred first."""
    hit = find(SPACE, PREFIXES, [FINE, COARSE], GROUPS, present, 4)
    assert hit == Hit(rates=rates, chunk_tokens=4)
    assert hit.tokens == 4 * len(rates)
