"""What is known of strategies without the model's predictions."""

import dataclasses

import pytest

from kvserve_profiler.candidates import ALWAYS, PER_TRIAL, Candidate, gather, preset_space
from kvserve_profiler.screening import structure_of
from kvserve_strategies.presets import PRESETS


def test_strategies_that_do_the_same_share_a_structure() -> None:
    """Steps and levels make none; stages, and how wide they work, do."""
    same = (
        ("centred-rans", "centred-rans-fine"),
        ("kivi-4", "kivi-2"),
        ("joint-3", "joint-3-fine"),
    )
    for one, other in same:
        assert structure_of(PRESETS[one]) == structure_of(PRESETS[other])
    different = (("joint-3", "joint-10"), ("joint-3", "focus-3"), ("fp8", "int8-token"))
    for one, other in different:
        assert structure_of(PRESETS[one]) != structure_of(PRESETS[other])


def test_named_candidates_come_first_and_with_their_features() -> None:
    """A preset that is a point of the space is that point; the rest of the space is sampled, the same each time."""
    presets = preset_space()
    points = [
        dataclasses.replace(one, features=(float(index), 1.0))
        for index, one in enumerate(presets[5:])
    ]
    found = gather(presets[:10], points, max_trials=1, seed=0)
    assert [one.name for one in found[:10]] == [one.name for one in presets[:10]]
    assert [one.features for one in found[4:7]] == [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
    assert len(found) == PER_TRIAL
    assert found == gather(presets[:10], points, max_trials=1, seed=0)
    assert found != gather(presets[:10], points, max_trials=1, seed=1)
    assert len({one.strategy.digest for one in found}) == len(found)
    assert len(gather(presets[:10], points, max_trials=64, seed=0)) == len(presets)


def test_what_every_set_has_are_presets() -> None:
    """They are measured first, whatever the space is."""
    assert [one.name for one in preset_space()[:2]] == list(ALWAYS)


@pytest.mark.parametrize("named", [(), (Candidate(name="x", strategy=PRESETS["fp8"]),)])
def test_without_a_space_only_the_named_are_candidates(named: tuple[Candidate, ...]) -> None:
    """Nothing is made up."""
    assert gather(named, (), max_trials=64, seed=0) == named
