"""The trial log: what a killed run finds again."""

import dataclasses

import pytest

from kvserve_api.errors import ArtifactError
from kvserve_api.latency import StageCost
from kvserve_api.quality import TaskScore
from kvserve_profiler.quality import Quality
from kvserve_profiler.screening import Cheap, Screening
from kvserve_profiler.trials import Measurement, Phase, Trial, TrialLog
from kvserve_strategies.presets import PRESETS

QUALITY = Quality(
    ratio=3.5,
    kl=0.01,
    loss_bp=100.5,
    loss_upper_bp=140.25,
    agreement=0.9,
    tokens=512,
    windows_bp=(90.0, 111.0),
)
SEEN = Measurement(qualities={"sha256:ab": QUALITY}, lossless=False, native_bytes=17_694_720)
MEASUREMENT = Measurement(
    qualities={"sha256:ab": QUALITY},
    encode=StageCost(floor_s=0.001, offset_s=0.0005, bytes_per_s=1.5e9),
    decode=StageCost(),
    lossless=False,
    native_bytes=17_694_720,
)
LOG = TrialLog(
    basis={"seed": 0, "device": "cpu-avx2"},
    screening=Screening({"00": Cheap(ratio=3.56789, codec_s=0.012345), "01": None}),
    trials=(
        Trial(name="none", strategy=PRESETS["none"], duration_s=1.23456, measurement=SEEN),
        Trial(name="fp8", strategy=PRESETS["fp8"], duration_s=0.5, error="ValuesError: NaN"),
        Trial(
            name="none",
            strategy=PRESETS["none"],
            phase=Phase.CONFIRM,
            duration_s=2,
            measurement=dataclasses.replace(MEASUREMENT, seen=("sha256:ab",)),
        ),
        Trial(
            name="fp8",
            strategy=PRESETS["fp8"],
            phase=Phase.TASK,
            duration_s=3,
            task="sha256:cd/64",
            score=TaskScore(items=64, exact=0.75, compressed=0.5, loss_upper_bp=3500.5),
        ),
    ),
)


def test_a_log_is_found_again() -> None:
    """Text and back gives the same trials, also failed ones, bit by bit."""
    text = "".join(LOG.lines())
    again = dataclasses.replace(LOG, screening=None, trials=()).resume(text)
    assert again == LOG
    assert again.lines() == LOG.lines()


def test_a_kill_at_any_byte_loses_only_the_line_it_cuts() -> None:
    """A log cut anywhere gives exactly the trials whose lines are whole."""
    text = "".join(LOG.lines())
    empty = dataclasses.replace(LOG, screening=None, trials=())
    for cut in range(0, len(text) + 1, 7):
        whole = text[:cut].count("\n")
        again = empty.resume(text[:cut])
        assert again.trials == LOG.trials[: max(0, whole - 2)]
        assert again.screening == (LOG.screening if whole > 1 else None)


def test_trials_of_another_run_are_refused() -> None:
    """The error says what is different and what to do."""
    other = TrialLog(basis={"seed": 1, "device": "cpu-avx2"})
    with pytest.raises(ArtifactError, match=r"different: seed.*remove it"):
        other.resume("".join(LOG.lines()))


@pytest.mark.parametrize(
    "text",
    [
        "not json\n",
        "[]\n",
        '{"schema":"kvserve.io/trials/v1","basis":{}}\n',
        "".join(LOG.lines()[:1]) + '{"name":"x"}\n',
        "".join(LOG.lines()[:2]) + "x" * 100 + "\n",
        "[" * 100_000 + "\n",
    ],
    ids=["no-json", "no-object", "schema", "no-trial", "garbage", "deep"],
)
def test_what_is_no_log_is_refused(text: str) -> None:
    """Altered lines are a typed error, never trials."""
    with pytest.raises(ArtifactError):
        TrialLog(basis=LOG.basis).resume(text)


def test_a_trial_has_a_measurement_or_an_error() -> None:
    """Neither or both is refused."""
    with pytest.raises(ArtifactError):
        Trial(name="none", strategy=PRESETS["none"], duration_s=1)
    with pytest.raises(ArtifactError):
        Trial(
            name="none",
            strategy=PRESETS["none"],
            duration_s=1,
            measurement=MEASUREMENT,
            error="x",
        )
