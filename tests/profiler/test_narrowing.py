"""What a policy leaves of the strategy space."""

import pytest

from kvserve_api.errors import SpecError
from kvserve_api.space_limits import FAMILIES, Allow, SpaceLimits, StrategySelector
from kvserve_api.wire import KVLayout
from kvserve_profiler.candidates import preset_space
from kvserve_profiler.narrowing import check, family_of, narrow
from kvserve_profiler.space_families import planned_bases, space_of

LAYOUT = KVLayout(layers=6, kv_heads=2, head_dim=64, dtype="bfloat16")
PRESETS = preset_space()
NAMES = {c.name for c in PRESETS}


def left(**limits: object) -> set[str]:
    """Return the presets that limits leave."""
    return {c.name for c in narrow(SpaceLimits(**limits), PRESETS)}  # type: ignore[arg-type]


def test_the_families_are_those_of_the_space() -> None:
    """What a policy may name is what there is, and the names of its points begin with it."""
    space = space_of(LAYOUT, planned_bases())
    assert {family.name for family in space.families} == {*FAMILIES, "raw"}
    for point in space.points()[::97]:
        assert family_of(space.name_of(point)) == point.family


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        pytest.param({}, {"none", "joint-10", "kivi-2"}, set(), id="whole"),
        pytest.param(
            {"allow": Allow.UNCALIBRATED},
            {"none", "fp8", "kivi-2"},
            {"joint-10", "focus-3", "kvtc"},
            id="uncalibrated",
        ),
        pytest.param(
            {"allow": Allow.LOSSLESS}, {"none", "lossless", "splitzip"}, {"fp8"}, id="lossless"
        ),
        pytest.param(
            {"include": StrategySelector(families=("joint",), names=("fp8",))},
            {"none", "joint-10", "fp8"},
            {"lossless", "focus-3", "kivi-2"},
            id="include",
        ),
        pytest.param(
            {"exclude": StrategySelector(names=("joint-10",), stages=("code.rans.v1",))},
            {"none", "joint-3", "kivi-2"},
            {"joint-10", "centred-rans"},
            id="exclude",
        ),
        pytest.param(
            {
                "include": StrategySelector(families=("fp8",)),
                "exclude": StrategySelector(families=("fp8",)),
            },
            {"none"},
            NAMES - {"none"},
            id="nothing",
        ),
    ],
)
def test_limits(limits: dict[str, object], inside: set[str], outside: set[str]) -> None:
    """What is chosen and allowed is left, and the raw profile always."""
    found = left(**limits)
    assert inside <= found
    assert not outside & found


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (
            StrategySelector(stages=("code.zip.v1",)),
            r"stages: 'code.zip.v1' is unknown; known: .*code.rans.v1",
        ),
        (StrategySelector(names=("jiont-10",)), "names: 'jiont-10' is no preset"),
    ],
)
def test_a_typo_is_refused(selector: StrategySelector, message: str) -> None:
    """What names nothing would leave in what was to be left out."""
    for limits in (SpaceLimits(include=selector), SpaceLimits(exclude=selector)):
        with pytest.raises(SpecError, match=message):
            check(limits)
