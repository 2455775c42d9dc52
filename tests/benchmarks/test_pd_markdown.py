"""The docs' tables are written from a run's document."""

from typing import Any

import pytest

import pd_markdown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.8249, ".82"),
        (1.0, "1.00"),
        (9.876, "9.88"),
        (72.14, "72.1"),
        (119.3, "119.3"),
        (0.0, ".00"),
    ],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    """Hundredths below ten and tenths above, without a zero before the point."""
    assert pd_markdown.number(value) == text


def row(condition: str, policy: str, **changes: Any) -> dict[str, Any]:
    """Return a row with what the docs show of it."""
    seconds = {"p50": 1.5, "p95": 30.0, "mean": 2.25}
    return {
        "condition": condition,
        "bandwidth_mbit": 13.94,
        "policy": policy,
        "requests": 12,
        "jct_s": seconds,
        "ttft_s": seconds,
        "bytes_wire": 237_400_000,
        "loss_bp": 44.6,
        "attained": 0.75,
        "errors": 0,
        "recomputed": 0,
    } | changes


def test_a_link_is_named_once() -> None:
    """The next policies of a condition have an empty first cell, and no transfer keeps no objective."""
    runs = [row("paper's regime", "raw"), row("paper's regime", "alone")]
    assert pd_markdown.run_lines({"runs": runs, "objective_s": 2.0}) == [
        "| link | policy | requests | JCT p50 | p95 | mean | TTFT p50 | MB on the link | loss, bp | within 2 s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| paper's regime, 13.9 Mbit/s | `raw` | 12 | 1.50 | 30.0 | 2.25 | 1.50 | 237 | 45 | 75 % |",
        "|  | `alone` | 12 | 1.50 | 30.0 | 2.25 | 1.50 | 237 | 45 |  |",
    ]


def test_errors_have_a_column_where_there_are_any() -> None:
    """Failed and recomputed requests are shown."""
    runs = [row("moving", "raw", errors=1, recomputed=2), row("moving", "kvserve")]
    lines = pd_markdown.run_lines({"runs": runs, "objective_s": 2.0})
    assert [line.split("|")[-2].strip() for line in lines] == [
        "wrong",
        "---",
        "1 errors, 2 recomputed",
        "",
    ]


@pytest.mark.parametrize(
    ("claim", "line"),
    [
        pytest.param(
            {"value": 1.1, "low": 0.934, "high": 1.26, "target": "<= 1.02", "verdict": "unclear"},
            "| it | 1.10 | .93 to 1.26 | ≤ 1.02 | **unclear** |",
            id="interval",
        ),
        pytest.param(
            {"value": None, "low": 0.5, "high": None, "target": ">= 0.8", "verdict": "unclear"},
            "| it | ∞ | .50 to ∞ | ≥ .8 | **unclear** |",
            id="infinite",
        ),
        pytest.param(
            {"value": 14.0, "low": None, "high": None, "target": "> 9.13", "verdict": "holds"},
            "| it | 14.0 |  | > 9.13 | kept |",
            id="no-interval",
        ),
    ],
)
def test_a_claim_has_its_interval_and_verdict(claim: dict[str, Any], line: str) -> None:
    """As the docs say it, in their words and signs."""
    assert pd_markdown.claim_lines({"claims": [{"claim": "it"} | claim]})[2:] == [line]
