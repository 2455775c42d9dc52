"""The doctor's checks of NIXL: judgements of values, and pieces that are really read."""

import json
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvserve_api.credentials import CredentialFiles
from kvserve_connector.config import ConnectorConfig
from kvserve_connector.doctor import probe
from kvserve_connector.doctor.cli import doctor
from kvserve_connector.doctor.finding import Finding, Level
from kvserve_connector.doctor.nixl import (
    LEAST_NIXL,
    check_nixl,
    judge_devices,
    judge_locked,
    judge_nixl,
    judge_read,
    may_lock,
)

STAGING = 64 << 20
REFUSAL = (
    "[17] ucp_context.c:1508 UCX  WARN  transport 'rc' is not available\n"
    "[17] ucp_context.c:1770 UCX  ERROR no usable transports/devices\n"
    "[17] ucp_context.c:1770 UCX  ERROR no usable transports/devices\n"
    "does not work here: NIXL_ERR_BACKEND\n"
)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A secret, without which NIXL is refused."""
    path = tmp_path / "secret"
    path.write_text("a secret that is long enough to be one")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    ("finding", "level"),
    [
        (judge_nixl("nixl-cu12", "1.5.1"), Level.OK),
        (judge_nixl("nixl-cu13", "2.0"), Level.OK),
        (judge_nixl("nixl-cu12", "1.4.9"), Level.FAIL),
        (judge_nixl("nixl-cu12", "0.10.0"), Level.FAIL),
        (judge_nixl("nixl-cu12", None), Level.WARN),
        (judge_devices(["uverbs0"]), Level.OK),
        (judge_devices([]), Level.WARN),
        (judge_locked(-1, STAGING, exempt=False), Level.OK),
        (judge_locked(65_536, STAGING, exempt=True), Level.OK),
        (judge_locked(2 * STAGING, STAGING, exempt=False), Level.OK),
        (judge_locked(STAGING, STAGING, exempt=False), Level.WARN),
        (judge_locked(65_536, STAGING, exempt=False), Level.FAIL),
        (judge_read(0, REFUSAL, {}), Level.OK),
        (judge_read(1, REFUSAL, {}), Level.FAIL),
        (judge_read(None, "", {}), Level.FAIL),
    ],
)
def test_values_are_judged(finding: Finding, level: Level) -> None:
    """Versions, devices, limits and ends are fine, doubtful or wrong; what is not fine says what to do."""
    assert finding.level == level
    assert bool(finding.advice) == (level != Level.OK)


def test_the_least_version_is_that_of_the_extra() -> None:
    """What the doctor asks for is what ``kvserve[nixl]`` installs."""
    (wanted,) = [each for each in requires("kvserve") or () if each.startswith("nixl")]
    assert wanted.startswith(f"nixl-cu12>={'.'.join(map(str, LEAST_NIXL))};")


def test_a_read_that_fails_says_what_ucx_said() -> None:
    """The reasons are those of UCX, each once, and advice names what steers it; or how the process ended."""
    found = judge_read(1, REFUSAL, {"UCX_TLS": "rc"})
    assert found.text == (
        "does not work here: NIXL_ERR_BACKEND; "
        "transport 'rc' is not available; no usable transports/devices"
    )
    assert "UCX_TLS=rc" in found.advice
    assert "UCX_NET_DEVICES" in judge_read(1, REFUSAL, {"UCX_TLS": ""}).advice
    assert judge_read(-11, "", {}).text == "signal 11 ended it"
    assert judge_read(None, "", {}).text == "it did not end"


def test_the_capability_is_read_among_others() -> None:
    """Bit 14 of the effective capabilities lifts the limit, whatever else is there."""
    assert may_lock("Name:\tx\nCapPrm:\t0\nCapEff:\t0000000000004000\nCapBnd:\t0\n")
    assert may_lock("CapEff:\t000001ffffffffff\n")
    assert not may_lock("CapPrm:\t0000000000004000\nCapEff:\t00000000a80425fb\n")
    assert not may_lock("")


def test_nothing_is_checked_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With TCP it does not matter whether NIXL is there."""
    _hide(monkeypatch)
    assert list(check_nixl(ConnectorConfig(), {}, 1.0)) == []


def test_a_missing_package_is_what_to_install(
    secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without NIXL the one finding says which package brings it."""
    _hide(monkeypatch)
    (found,) = check_nixl(_config(secret), {}, 1.0)
    assert found.level == Level.FAIL
    assert 'pip install "kvserve[nixl]"' in found.text
    assert "nixl-cu13" in found.advice


def test_a_piece_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where NIXL works, two agents are made and a piece goes from one to the other."""
    monkeypatch.setattr(sys, "argv", ["probe", str(2 << 20), "10"])
    probe.main()


@pytest.mark.slow
def test_a_network_that_is_not_there_fails(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command tells that UCX has no transport of the name it was given, and ends with 1."""
    monkeypatch.setenv("UCX_TLS", "ud_absent")
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    config = json.dumps({"transport": "nixl", "secret_file": str(secret)})
    done = CliRunner().invoke(doctor, ["--json", "--timeout", "1", "--config", config])
    findings = {each["check"]: each for each in json.loads(done.stdout)["findings"]}
    assert done.exit_code == 1
    assert findings["nixl"]["level"] == Level.OK
    assert findings["nixl read"]["level"] == Level.FAIL
    assert "transport 'ud_absent' is not available" in findings["nixl read"]["text"]
    assert "UCX_TLS=ud_absent" in findings["nixl read"]["advice"]


def _config(secret: Path) -> ConnectorConfig:
    return ConnectorConfig(transport="nixl", credentials=CredentialFiles(secret_file=secret))


def _hide(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nixl_cu12", "nixl_cu13"):
        for module in (name, f"{name}._api"):
            monkeypatch.setitem(sys.modules, module, None)
