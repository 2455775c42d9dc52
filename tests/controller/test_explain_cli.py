"""The command ``kvserve explain``."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from decision_tables import table
from kvserve_api.decision import decide, explained
from kvserve_api.errors import PolicyError, SpecError, UnavailableError
from kvserve_api.latency import Link
from kvserve_controller.explain_cli import BYTES_PER_S_PER_MBIT, explain, latest, lines
from samples import pareto, policy_object

MOVE = {"name": "move", "metric": "KVTransferTime", "thresholdMilliseconds": 900}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Return the arguments that name a policy and its set."""
    policy, profiles = tmp_path / "policy.yaml", tmp_path / "set.json"
    slo = {"objectives": [MOVE], "goal": "MaximizeQuality"}
    policy.write_text(yaml.safe_dump(policy_object(slo=slo)))
    profiles.write_bytes(pareto().canonical())
    return ["--policy", str(policy), "--profiles", str(profiles)]


def test_decides_without_a_controller(files: list[str]) -> None:
    """For a transfer, a link and a load it says what is chosen, and why nothing else is."""
    transfer = ["--bytes", "50000000", "--mbit", "200", "--arrivals-per-s", "1.2"]
    done = CliRunner().invoke(explain, [*files, *transfer], catch_exceptions=False)
    assert done.exit_code == 0
    rows = {
        line.replace("*", " ").split()[0]: line.split()[-1] for line in done.output.splitlines()[4:]
    }
    assert rows == {"rans": "Late", "int4": "Chosen", "int8": "Overloaded", "none": "Overloaded"}
    assert "int4: best by the goal MaximizeQuality; deadline 0.900 s" in done.output
    (value,) = json.loads(CliRunner().invoke(explain, [*files, *transfer, "--json"]).output)
    assert value["wanted"] == "int4"
    slow = CliRunner().invoke(explain, [*files, "--bytes", "50000000", "--mbit", "1"])
    assert "no candidate meets the deadline, this one misses it least" in slow.output


def test_the_rest_of_a_transfer_says_what_came_before() -> None:
    """Of a choice midway it is told what had coded until then, for which link, and how late it was."""
    link = Link(bytes_per_s=20 * BYTES_PER_S_PER_MBIT)
    made = table()
    decision = decide(made, "default", native_bytes=50_000_000, link=link)._replace(
        incumbent="none", spent_s=0.25, before_bytes_per_s=1000 * BYTES_PER_S_PER_MBIT
    )
    told = lines(explained(made, decision))
    assert told[2] == (
        "  the rest of a transfer that none had coded, chosen for 1000.0 Mbit/s; 0.250 s of its deadline had passed"
    )
    first = lines(explained(made, decision._replace(before_bytes_per_s=0.0)))
    assert first == [line for line in told if line != told[2]]


def test_what_is_missing_is_said(files: list[str], tmp_path: Path) -> None:
    """Without a controller a transfer must be described; a file without a policy is none."""
    done = CliRunner().invoke(explain, files)
    assert done.exit_code == 2
    assert "--bytes and --mbit" in done.output
    empty = tmp_path / "empty.yaml"
    empty.write_text("kind: Deployment")
    done = CliRunner().invoke(
        explain, ["--policy", str(empty), *files[2:], "--bytes", "1", "--mbit", "1"]
    )
    assert isinstance(done.exception, PolicyError)


def test_controller_that_is_not_there() -> None:
    """A controller that does not answer is another error than an address that is none."""
    with pytest.raises(UnavailableError):
        latest("http://127.0.0.1:9", "default/chat", 1)
    with pytest.raises(SpecError, match="must look like"):
        latest("127.0.0.1:8081", "default/chat", 1)
