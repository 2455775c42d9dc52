"""Health: a silent watch and a dead loop are sick, an unreachable API server is not."""

import pytest

from kvserve_operator.health import Pulse, Vitals

WELL = {"silent_s": {"jobs": 10.0}, "unheard": [], "lease_round_s": 2.0, "api_answer_s": 2.0}


@pytest.mark.parametrize(
    ("change", "sick", "unready"),
    [
        pytest.param({}, "", "", id="well"),
        pytest.param(
            {"silent_s": {"jobs": 181.0}}, "jobs for 181 s", "jobs for 181 s", id="silent"
        ),
        pytest.param({"lease_round_s": 61.0}, "has not turned", "has not turned", id="stuck"),
        pytest.param({"unheard": ["pods"]}, "", "not heard of yet: pods", id="begins"),
        pytest.param(
            {"silent_s": {"jobs": 999.0}, "api_answer_s": 999.0},
            "",
            "has not answered for 999 s",
            id="api-server-away",
        ),
    ],
)
def test_vitals(change: dict[str, object], sick: str, unready: str) -> None:
    """A restart is asked for only where it helps; ready is only who can work."""
    vitals = Vitals(**(WELL | change))  # type: ignore[arg-type]
    assert sick in vitals.sick()
    assert bool(sick) == bool(vitals.sick())
    assert unready in vitals.unready()
    assert bool(unready) == bool(vitals.unready())


def test_pulse() -> None:
    """Each expected resource has a pulse of its own, from the time it is expected."""
    now = [0.0]
    pulse = Pulse(clock=lambda: now[0])
    assert pulse.unheard() == ["the CRD"]
    assert pulse.silent_s() == {}
    now[0] = 100.0
    pulse.expect(["jobs", "pods"])
    now[0] = 110.0
    pulse.beat("jobs")
    pulse.beat("something else")
    now[0] = 130.0
    assert pulse.unheard() == ["pods"]
    assert pulse.silent_s() == {"jobs": 20.0, "pods": 30.0}
