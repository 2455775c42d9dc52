"""The demo's report: what it computes from what was measured."""

from dataclasses import replace
from pathlib import Path

import pytest

from demo.load import Answer
from demo.report import Phase, agreement, build, figure, quantiles, reasons


def _answer(text: str, jct_s: float = 1.0, prompt: str = "p") -> Answer:
    return Answer(prompt=prompt, text=text, ttft_s=jct_s / 2, jct_s=jct_s)


def _phase(mode: str, mbit: int | None, *answers: Answer) -> Phase:
    return Phase(
        bandwidth_mbit=mbit,
        mode=mode,
        answers=answers,
        bytes_raw=2_000_000,
        bytes_wire=1_000_000,
        profiles={"none": len(answers)},
    )


PARETO = {
    "classes": {
        "default": [
            {
                "name": "none",
                "strategy": {"schema": "s"},
                "ratio": 1.0,
                "loss_bp": 0.0,
                "loss_upper_bp": 0.0,
                "encode": {"floor_s": 0.0, "offset_s": 0.0, "bytes_per_s": 2e9},
                "decode": {"floor_s": 0.0, "offset_s": 0.0},
            }
        ]
    }
}


TRIALS = [
    {"profile": name, "ratio": ratio, "loss_bp_upper": upper_bp, "calibrated": calibrated}
    for name, ratio, upper_bp, calibrated in (
        ("none", 1.0, 0.0, False),
        ("int4", 3.5, 99.0, False),
        ("joint", 9.0, 100.0, True),
        ("kivi-2", 6.0, 900.0, False),
        ("joint-coarse", 20.0, 101.0, True),
    )
]


def test_quantiles_of_a_handful() -> None:
    """The median is the middle, the 95th percentile of five values their maximum."""
    assert quantiles([5.0, 1.0, 2.0, 3.0, 4.0]) == {"p50": 3.0, "p95": 5.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("a b c d", 1.0, id="equal"),
        pytest.param("a b x d", 0.5, id="differs-from-the-third-word"),
        pytest.param("x b c d", 0.0, id="differs-at-once"),
        pytest.param("a b", 0.5, id="ends-early"),
    ],
)
def test_agreement_counts_the_words_before_the_first_difference(text: str, expected: float) -> None:
    """A word after the first difference does not count, even if it is the same again."""
    assert agreement([_answer("a b c d")], [_answer(text)]) == expected


def test_the_speedup_compares_the_slowest_link_both_modes_ran_at() -> None:
    """Phases at other bandwidths do not enter the speed-up."""
    phases = [
        _phase("raw", 1000, _answer("a", 2.0)),
        _phase("raw", 50, _answer("a", 8.0)),
        _phase("kvserve", 1000, _answer("a", 2.0)),
        _phase("kvserve", 50, _answer("a", 4.0)),
    ]
    report = build(pareto=PARETO, trials=TRIALS, budget_bp=100, phases=phases, switches=[])
    assert report["speedup_jct"] == 2.0
    assert report["speedup_ttft"] == 2.0
    assert report["pareto"][0] | {"strategy": None} == {
        "profile": "none",
        "strategy": None,
        "calibrated": False,
        "ratio": 1.0,
        "loss_bp": 0.0,
        "loss_bp_upper": 0.0,
        "encode_mb_s": 2000.0,
        "decode_mb_s": None,
    }


def test_an_unshaped_link_is_reported_as_such(tmp_path: Path) -> None:
    """On a cluster whose links can't be shaped the bandwidth is null, and the figure can still be drawn."""
    phases = [_phase("raw", None, _answer("a", 2.0)), _phase("kvserve", None, _answer("a", 1.0))]
    report = build(pareto=PARETO, trials=TRIALS, budget_bp=100, phases=phases, switches=[])
    assert [phase["bandwidth_mbit"] for phase in report["phases"]] == [None, None]
    assert report["speedup_jct"] == 2.0
    figure(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_best_ratios_are_within_the_budget() -> None:
    """Calibrated or not, a profile above the budget does not count, and one on it does."""
    phases = [_phase("raw", 50, _answer("a")), _phase("kvserve", 50, _answer("a"))]
    report = build(pareto=PARETO, trials=TRIALS, budget_bp=100, phases=phases, switches=[])
    assert (report["best_ratio"], report["best_ratio_uncalibrated"]) == (9.0, 3.5)


def test_a_slowed_coder_is_told_and_does_not_count(tmp_path: Path) -> None:
    """The speed-up leaves such a phase out, and the report has a line with what decided it."""
    why = {
        "profile": "none",
        "candidates": [
            {"name": "joint", "encode_s": 0.3, "wire_s": 0.02, "decode_s": 0.02, "total_s": 0.34},
            {"name": "none", "encode_s": 0.01, "wire_s": 0.2, "decode_s": 0.01, "total_s": 0.22},
        ],
    }
    slowed = replace(_phase("kvserve", 50, _answer("a", 9.0)), coder_share=0.05, why=why)
    phases = [
        _phase("raw", 50, _answer("a", 2.0)),
        slowed,
        _phase("kvserve", 50, _answer("a", 1.0)),
    ]
    report = build(pareto=PARETO, trials=TRIALS, budget_bp=100, phases=phases, switches=[])
    assert report["speedup_jct"] == 2.0
    (line,) = reasons(report)
    assert line.startswith("50 Mbit/s, coder at 5%: none. Expected: none 10 ms to encode, 200 ms")
    assert "joint 300 ms to encode" in line
    figure(report, tmp_path / "figure.png")
