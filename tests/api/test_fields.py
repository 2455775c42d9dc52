"""Strict reading of untrusted objects."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve_api.canonical import canonical_json, digest, short_digest
from kvserve_api.errors import PolicyError, SpecError
from kvserve_api.fields import Fields

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children)
    ),
    max_leaves=10,
)


@pytest.mark.parametrize(
    ("read", "problem"),
    [
        pytest.param(lambda f: f.string("absent"), "doc.absent: is required", id="missing"),
        pytest.param(lambda f: f.string("n"), "doc.n: must be a string, got int", id="type"),
        pytest.param(lambda f: f.string("s", max_length=2), "at most 2 characters", id="long"),
        pytest.param(lambda f: f.string("s", choices=["a"]), "must be one of a, got", id="choice"),
        pytest.param(lambda f: f.integer("b"), "must be an integer, got True", id="bool-as-int"),
        pytest.param(lambda f: f.integer("x"), "must be an integer, got 1.5", id="float-as-int"),
        pytest.param(lambda f: f.integer("n", maximum=2), "must be at most 2, got 3", id="range"),
        pytest.param(lambda f: f.number("nan"), "must be finite, got nan", id="nan"),
        pytest.param(lambda f: f.number("x", minimum=2), "must be at least 2, got 1.5", id="low"),
        pytest.param(lambda f: f.number("b"), "must be a number, got True", id="bool-as-number"),
        pytest.param(lambda f: f.boolean("n"), "must be true or false, got 3", id="int-as-bool"),
        pytest.param(lambda f: f.child("s"), "doc.s: must be an object, got str", id="child"),
        pytest.param(lambda f: f.items("s"), "must be a list, got str", id="list"),
        pytest.param(lambda f: f.items("l", max_items=1), "must have at most 1 items", id="many"),
        pytest.param(lambda f: f.mapping("l"), "must be an object, got list", id="mapping"),
        pytest.param(
            lambda f: f.children("l")[0].integer("k"),
            r"doc.l\[0\].k: must be an integer",
            id="path",
        ),
    ],
)
def test_wrong_value_is_named(read: Any, problem: str) -> None:
    """A value of another type or range is an error that names the field and what would be right."""
    value = {"s": "text", "n": 3, "x": 1.5, "b": True, "nan": float("nan"), "l": [{"k": "v"}, {}]}
    with pytest.raises(PolicyError, match=problem):
        read(Fields(value, "doc", error=PolicyError))


def test_unknown_key_is_an_error() -> None:
    """A key nobody asked for is refused and the known ones are told."""
    fields = Fields({"known": 1, "knwon": 2})
    fields.integer("known")
    with pytest.raises(SpecError, match=r"knwon: is not known; known here: known"):
        fields.done()


def test_null_is_absent() -> None:
    """Null means the default, as in Kubernetes."""
    fields = Fields({"a": None})
    assert fields.integer("a", 7) == 7
    assert not fields.has("a")


@given(JSON)
def test_canonical_json_is_a_fixed_point(value: Any) -> None:
    """Reading canonical JSON and writing it again gives the same bytes, whatever the order of keys."""
    document = canonical_json(value)
    assert canonical_json(json.loads(document)) == document
    if isinstance(value, dict):
        assert digest(dict(reversed(value.items()))) == digest(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}])
def test_what_json_cannot_hold_has_no_digest(value: Any) -> None:
    """NaN, infinity and foreign objects are refused instead of written in a private form."""
    with pytest.raises(SpecError, match="has no canonical form"):
        canonical_json({"x": value})


def test_short_digest() -> None:
    """A short digest is the first hex digits without the algorithm."""
    assert short_digest("sha256:0123456789abcdef") == "0123456789"
