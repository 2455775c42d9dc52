"""What is known of strategies without the model's predictions."""

import dataclasses

import pytest

from kvserve_api.canonical import short_digest
from kvserve_api.errors import SpecError
from kvserve_api.fields import Fields
from kvserve_profiler.candidates import ALWAYS, PER_TRIAL, Candidate, gather, preset_space
from kvserve_profiler.screening import Cheap, Screening, structure_of
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


def test_a_screening_survives_the_log() -> None:
    """Ratio, time and forecasts are read back to four digits; half a pair of forecasts is refused."""
    strategy = PRESETS["fp8"]
    cheap = Cheap(ratio=1.93456, codec_s=0.012, forecast_bp=((1.23456, 2.0), (3e5, 0.0)))
    screening = Screening({short_digest(strategy.digest, 16): cheap})
    again = Screening.from_json(Fields(screening.to_json(), "screening"))
    assert again.of(strategy) == cheap
    assert cheap.forecast_bp[0] == (1.235, 2.0)
    broken = {key: values[:-1] for key, values in screening.to_json().items()}
    with pytest.raises(SpecError, match="pairs of forecasts"):
        Screening.from_json(Fields(broken, "screening"))
