"""The report: what it shows, that it needs nothing else, and that no name breaks it."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from kvserve_api.latency import StageCost
from kvserve_api.profile_set import ModelIdentity, ParetoSet, Profile
from kvserve_api.quality import QualityBudget
from kvserve_profiler.quality import Quality
from kvserve_profiler.report import Section, convergence, render
from kvserve_profiler.screening import Cheap, Screening
from kvserve_profiler.trials import Measurement, Phase, Trial, TrialLog
from kvserve_strategies.presets import PRESETS

TEXT = "sha256:ab"
LOSSES_BP = {
    "none": (1.0, 0.0),
    "fp8": (1.94, 12.0),
    "kivi-4": (3.5, 50.0),
    "kivi-2": (6.4, 2500.0),
}
COST = StageCost(floor_s=1e-4, offset_s=0.0, bytes_per_s=1e9)
SECTIONS = [Section(name="default", text=TEXT, budget=QualityBudget(max_loss_bp=100))]


def trial(name: str, ratio: float, loss_bp: float, phase: Phase = Phase.SEARCH) -> Trial:
    """Return a trial with one window."""
    quality = Quality(
        ratio=ratio, kl=loss_bp / 1e4, loss_bp=loss_bp, loss_upper_bp=1.3 * loss_bp, agreement=0.9,
        tokens=128, windows_bp=(loss_bp,),
    )  # fmt: skip
    measurement = Measurement(qualities={TEXT: quality}, lossless=False, native_bytes=10**7)
    return Trial(
        name=name, strategy=PRESETS[name], phase=phase, duration_s=1.0, measurement=measurement
    )


def log(*names: str, error: str = "") -> TrialLog:
    """Return a log of the search."""
    short = {name: PRESETS[name].digest.removeprefix("sha256:")[:16] for name in LOSSES_BP}
    screening = Screening(
        {short[name]: Cheap(ratio=ratio, codec_s=0.01) for name, (ratio, _) in LOSSES_BP.items()}
    )
    trials = [trial(name, *LOSSES_BP[name]) for name in names]
    if error:
        trials.append(Trial(name="odd", strategy=PRESETS["int8-token"], duration_s=1, error=error))
    return TrialLog(basis={}, screening=screening, trials=tuple(trials))


def result(model: str) -> ParetoSet:
    """Return a set of two profiles."""
    profiles = tuple(
        Profile(
            name=name, strategy=PRESETS[name], ratio=LOSSES_BP[name][0], loss_bp=LOSSES_BP[name][1],
            loss_upper_bp=1.3 * LOSSES_BP[name][1], encode=COST, decode=COST, lossless=name == "none",
        )
        for name in ("kivi-4", "none")
    )  # fmt: skip
    return ParetoSet(
        model=ModelIdentity(name=model, revision="", fingerprint="sha256:" + "0" * 64),
        device="cpu-avx2",
        classes={"default": profiles},
        provenance={"codec_time_bytes": 10**7, "windows": {"default": "held out"}},
    )


class Page(HTMLParser):
    """Reads a page: its elements, its text outside of scripts, and what it loads."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what is open."""
        self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href"):
                self.loads.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        """Close it."""
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        """Tell text from script."""
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        else:
            self.text += data


def traces(page: Page) -> dict[str, list[dict[str, Any]]]:
    """Return what each plot draws."""
    found = {}
    for script in page.scripts:
        if match := re.search(
            r'Plotly\.newPlot\(\s*"([^"]+)",\s*(\[.*?\}\]),\s*\{', script, re.DOTALL
        ):
            found[match[1]] = json.loads(match[2])
    return found


def test_the_page_shows_the_set_and_needs_nothing_else() -> None:
    """Three plots with the values of the run, a table, and not one address to load from."""
    source = render(result("test/tiny"), log("none", "kivi-4", "kivi-2"), SECTIONS)
    page = Page(source)
    assert page.loads == []
    drawn = traces(page)
    assert list(drawn) == ["front-0", "profiles-0", "convergence-0"]
    assert set(drawn) <= set(page.ids)
    tried, kept = drawn["front-0"]
    assert tried["text"] == ["none", "kivi-4", "kivi-2"]
    assert kept["text"] == ["kivi-4", "none"]
    assert drawn["profiles-0"][0]["type"] == "parcoords"
    assert "at most, bp" in page.text
    assert "65.0" in page.text
    assert len(source) < 6_000_000


def test_the_page_is_a_function_of_the_run() -> None:
    """Rendered twice, byte by byte the same."""
    pages = {render(result("m"), log("none", "kivi-4"), SECTIONS) for _ in range(2)}
    assert len(pages) == 1


def test_no_name_breaks_the_page() -> None:
    """Markup in names and errors is text."""
    evil = "</script><img src=x onerror=alert(1)>"
    page = Page(
        render(
            result(evil),
            log("none", error=evil),
            [Section(name="default", text=TEXT, budget=QualityBudget(max_loss_bp=1))],
        )
    )
    assert page.loads == []
    assert page.text.count(evil) == 3  # title, heading, error


def test_the_volume_grows_with_what_is_useful() -> None:
    """A strategy over the budget or slower than all adds nothing, a failed one neither; a useful one does."""
    volumes = convergence(log("none", "kivi-4", "kivi-2", "fp8", error="NaN"), TEXT, 100.0)
    assert volumes[0] == 0.0
    assert volumes[1] > 0
    assert volumes[2] == volumes[1]
    assert volumes[3] > volumes[2]
    assert volumes[4] == volumes[3]
    assert convergence(TrialLog(basis={}), TEXT, 100.0) == []


@pytest.mark.parametrize("budget_bp", [0.0, 100.0])
def test_a_budget_of_nothing_has_a_page_too(budget_bp: float) -> None:
    """No logarithm of zero."""
    page = Page(
        render(
            result("m"),
            log("none"),
            [Section(name="default", text=TEXT, budget=QualityBudget(max_loss_bp=budget_bp))],
        )
    )
    assert "Quality budget" in page.text
