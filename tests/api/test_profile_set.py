"""The Pareto set as a document."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve_api.canonical import digest_bytes
from kvserve_api.errors import ArtifactError, SpecError
from kvserve_api.profile_set import MAX_BYTES, ModelIdentity, ParetoSet
from samples import INT4, RAW, pareto


def test_round_trip() -> None:
    """A set reads back equal, and its digest is that of its document."""
    first = pareto(code=(INT4, RAW))
    document = first.canonical()
    again = ParetoSet.parse(document)
    assert again == first
    assert again.digest == digest_bytes(document)


def test_class_without_profiles_of_its_own() -> None:
    """A class that was not measured has the profiles of the default class."""
    assert pareto().profiles("other") == pareto().classes["default"]


def changed(*path: Any, value: Any) -> bytes:
    """Return a set's document with one value replaced; by ``...``: removed."""
    document = json.loads(pareto().canonical())
    item = document
    for key in path[:-1]:
        item = item[key]
    if value is ...:
        del item[path[-1]]
    else:
        item[path[-1]] = value
    return json.dumps(document).encode()


FIRST = ("classes", "default", 0)


@pytest.mark.parametrize(
    ("document", "field"),
    [
        pytest.param(b"{", "document", id="not-json"),
        pytest.param(b"[" * 100_000, "document", id="deep"),
        pytest.param(b" " * (MAX_BYTES + 1), "document", id="large"),
        pytest.param(changed("schema", value="kvserve.io/pareto/v9"), "schema", id="schema"),
        pytest.param(changed("classes", "default", value=...), "classes", id="no-default"),
        pytest.param(changed("classes", "default", 3, value=...), "classes.default", id="no-none"),
        pytest.param(changed(*FIRST, "ratio", value=0), "ratio", id="ratio"),
        pytest.param(changed(*FIRST, "ratio", value="6"), "ratio", id="type"),
        pytest.param(changed(*FIRST, "loss_upper_bp", value=1), "loss_upper_bp", id="limit"),
        pytest.param(changed(*FIRST, "strategy_digest", value="x"), "strategy_digest", id="digest"),
        pytest.param(changed(*FIRST, "name", value="Not A Label"), "name", id="name"),
        pytest.param(changed(*FIRST, "name", value="int4"), "classes.default", id="name-twice"),
        pytest.param(changed(*FIRST, "encode", "bytes_per_s", value=-1), "bytes_per_s", id="speed"),
        pytest.param(changed(*FIRST, "surprise", value=1), "surprise", id="unknown-key"),
        pytest.param(changed("extra", value=1), "extra", id="unknown-top-key"),
        pytest.param(changed("device", value=...), "device", id="missing"),
    ],
)
def test_bad_document_names_the_field(document: bytes, field: str) -> None:
    """What can't be trusted is refused with the field."""
    with pytest.raises(SpecError) as caught:
        ParetoSet.parse(document)
    assert field in caught.value.field


@given(st.data())
def test_any_cut_or_flipped_document_is_an_error_or_a_set(data: st.DataObject) -> None:
    """Damage to a document never leads to an error of another kind."""
    document = bytearray(pareto().canonical())
    place = data.draw(st.integers(0, len(document) - 1))
    if data.draw(st.booleans()):
        del document[place:]
    else:
        document[place] ^= data.draw(st.integers(1, 255))
    try:
        read = ParetoSet.parse(bytes(document))
    except SpecError:
        return
    assert "none" in [profile.name for profile in read.profiles("default")]


def test_too_large_a_set_is_refused_not_cut() -> None:
    """A set beyond the limit can't be written."""
    large = ParetoSet(
        model=ModelIdentity(name="m", revision="", fingerprint=""),
        device="cpu",
        classes={"default": (RAW,)},
        provenance={"log": "x" * MAX_BYTES},
    )
    with pytest.raises(ArtifactError, match="keep fewer profiles"):
        large.canonical()
