"""Versions and decision tables."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve_api.errors import SpecError
from kvserve_api.policy import Goal, Mode
from kvserve_api.table import (
    MAX_CANDIDATES,
    Candidate,
    ClassRule,
    DecisionTable,
    OnControllerLoss,
    Version,
)
from samples import INT4, RAW

versions = st.builds(Version, epoch=st.integers(0, 1 << 40), counter=st.integers(0, 1 << 40))


def candidates() -> dict[str, Candidate]:
    """Return two candidates."""
    return {
        p.name: Candidate(
            name=p.name,
            strategy=p.strategy,
            ratio=p.ratio,
            loss_upper_bp=p.loss_upper_bp,
            encode=p.encode,
            decode=p.decode,
        )
        for p in (RAW, INT4)
    }


TABLE = DecisionTable(
    version=Version(epoch=1, counter=1),
    policy="default/chat",
    mode=Mode.ACTIVE,
    candidates=candidates(),
    rules={"default": ClassRule(goal=Goal.MINIMIZE_LATENCY, candidates=("int4", "none"))},
    pinned=None,
    fallback="none",
    ttl_s=60.0,
    on_controller_loss=OnControllerLoss.HOLD_LAST_GOOD,
    prior_bytes_per_s=125e6,
)


@given(versions, versions)
def test_versions_are_ordered(a: Version, b: Version) -> None:
    """A later epoch beats any counter, and the order survives text."""
    assert (a < b) == ((a.epoch, a.counter) < (b.epoch, b.counter))
    assert Version.parse(str(a)) == a


@pytest.mark.parametrize("text", ["", "1", "1.", ".2", "a.b", "-1.2", "1.2.3", "1 .2"])
def test_version_refuses_other_text(text: str) -> None:
    """Only epoch.counter is a version."""
    with pytest.raises(SpecError, match="must look like"):
        Version.parse(text)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        pytest.param({"rules": {}}, "rules", id="no-default-rule"),
        pytest.param({"ttl_s": math.nan}, "ttl_s", id="ttl"),
        pytest.param({"prior_bytes_per_s": 0.0}, "prior_bytes_per_s", id="prior"),
        pytest.param({"fallback": "gone"}, "candidates", id="fallback"),
        pytest.param({"mode": Mode.PINNED}, "pinned", id="pinned-without-name"),
        pytest.param({"pinned": "int4"}, "pinned", id="name-without-pinned"),
        pytest.param({"mode": Mode.PINNED, "pinned": "gone"}, "candidates", id="pinned-unknown"),
        pytest.param(
            {"candidates": {"int4": TABLE.candidates["int4"]}}, "candidates", id="no-none"
        ),
    ],
)
def test_inconsistent_table_does_not_construct(change: dict[str, object], field: str) -> None:
    """A table that could not decide some transfer is refused."""
    with pytest.raises(SpecError) as caught:
        replace(TABLE, **change)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_rule_bounds() -> None:
    """A rule has one to eight candidates and a positive deadline."""
    many = tuple(str(n) for n in range(MAX_CANDIDATES + 1))
    for names, deadline_s in (((), 1.0), (many, 1.0), (("a",), 0.0), (("a",), math.nan)):
        with pytest.raises(SpecError):
            ClassRule(goal=Goal.MINIMIZE_BYTES, candidates=names, deadline_s=deadline_s)


def test_unknown_class_uses_default() -> None:
    """A request of an unknown class is decided by the default rule."""
    assert TABLE.rule("nobody") is TABLE.rules["default"]
