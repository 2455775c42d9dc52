"""Lists of what was stored behind a chunk."""

import pytest

from kvserve_connector.stores.index import MAX_CHILDREN, Children, add, longest, pack, parse


def marks(*numbers: int) -> tuple[str, ...]:
    """Return marks that look like real ones."""
    return tuple(f"{number:032x}" for number in numbers)


A, AB, ABC, X = marks(1), marks(1, 2), marks(1, 2, 3), marks(9)


@pytest.mark.parametrize(
    ("children", "child", "result"),
    [
        pytest.param((), AB, (AB,), id="first"),
        pytest.param((AB,), X, (X, AB), id="newest-first"),
        pytest.param((X, AB), ABC, (ABC, X), id="longer-replaces"),
        pytest.param((X, ABC), A, (X, ABC), id="shorter-is-there"),
        pytest.param((AB, X), AB, (AB, X), id="same"),
    ],
)
def test_add(children: Children, child: tuple[str, ...], result: Children) -> None:
    """A list has nothing in it that is the beginning of something else in it."""
    assert add(children, child) == result


def test_a_list_is_short() -> None:
    """The oldest go, and what is stored can be read back."""
    children: Children = ()
    for number in range(1, MAX_CHILDREN + 5):
        children = add(children, marks(number))
    assert children == tuple(marks(n) for n in range(MAX_CHILDREN + 4, 4, -1))
    assert parse(pack(children), 1) == children
    assert parse(pack((AB,)), 1) == ()


@pytest.mark.parametrize(
    ("wanted", "best"),
    [
        pytest.param(ABC, (ABC, 3), id="all"),
        pytest.param(marks(1, 2, 7), (ABC, 2), id="goes-another-way"),
        pytest.param(A, (ABC, 1), id="ends-before"),
        pytest.param(marks(9, 9), (X, 1), id="another"),
        pytest.param(marks(7), ((), 0), id="none"),
    ],
)
def test_longest(wanted: tuple[str, ...], best: tuple[tuple[str, ...], int]) -> None:
    """The one that shares most is taken, for as much as it shares."""
    assert longest((X, ABC), wanted) == best
