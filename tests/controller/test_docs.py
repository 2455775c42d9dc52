"""The documentation of the controller."""

from pathlib import Path

from kvserve_api.errors import ArtifactError, PolicyError, SpecError, StrategyError
from kvserve_controller.activity import Cause
from kvserve_controller.cli import controller
from kvserve_controller.status import Reason

PAGE = (Path(__file__).parents[2] / "docs" / "controller.md").read_text()


def test_every_reason_is_documented() -> None:
    """Each reason of a condition and each cause of a switch is explained, and the page names no others."""
    errors = [error.reason for error in (ArtifactError, PolicyError, SpecError, StrategyError)]
    section = PAGE.partition("## What it publishes")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    rows = {line.split("|")[2].strip(" `") for line in lines}
    assert rows - {"reason", "---"} == {*Reason, *errors}
    assert all(f"`{cause}`" in PAGE for cause in Cause if cause is not Cause.REISSUED)


def test_every_option_is_documented() -> None:
    """Each option of the command is on the page."""
    assert [o for p in controller.params for o in p.opts if o not in PAGE] == []
