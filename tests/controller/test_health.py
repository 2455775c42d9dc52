"""Probes, access to an API server, and the command line."""

import base64
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from kvserve_api.errors import SpecError
from kvserve_controller.cli import controller
from kvserve_controller.health import MOST_SILENCE_S, MOST_TICK_S, Health
from kvserve_controller.kubeconfig import Access
from kvserve_controller.server import Address


def health(**changes: Any) -> Health:
    """Return the health of a controller that is well at second 1000."""
    arguments: dict[str, Any] = {
        "ticked_s": 1000.0,
        "source_s": lambda: 1000.0,
        "synced": lambda: True,
    }
    return Health(**(arguments | {"listening": True} | changes))


def test_liveness_means_something() -> None:
    """A controller whose loop is stuck, or whose source is stalled, is dead; one that waits is not."""
    assert health().dead(1000.0 + MOST_TICK_S) == ""
    assert "loop has not turned for 16 s" in health().dead(1001.0 + MOST_TICK_S)
    silent = health(source_s=lambda: 999.0 - MOST_SILENCE_S)
    assert "silent for 181 s" in silent.dead(1000.0)
    assert health(synced=lambda: False).dead(1000.0) == ""


def test_readiness_means_something() -> None:
    """Pods are sent to a controller that has read its policies and listens, to no other."""
    assert health().unready() == ""
    assert health(synced=lambda: False).unready() == "the policies are not read yet"
    assert health(listening=False).unready() == "not listening"


def kubeconfig(folder: Path, user: dict[str, Any], **cluster: Any) -> Path:
    """Write a kubeconfig."""
    document = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": "http://10.0.0.1:1/"} | cluster}],
        "users": [{"name": "u", "user": user}],
    }
    path = folder / "config"
    path.write_text(yaml.safe_dump(document))
    return path


def test_token_file_is_read_for_each_request(tmp_path: Path) -> None:
    """A token that is renewed is used as it is now."""
    token = tmp_path / "token"
    access = Access.from_file(kubeconfig(tmp_path, {"tokenFile": "token"}))
    for value in ("one", "two"):
        token.write_text(f"{value}\n")
        assert access.headers() == {"Authorization": f"Bearer {value}"}
    assert (access.url, access.tls) == ("http://10.0.0.1:1", None)


@pytest.mark.parametrize(
    ("user", "cluster", "problem"),
    [
        pytest.param({"exec": {"command": "x"}}, {}, "exec: is not supported", id="exec"),
        pytest.param({}, {"server": None}, "server: is required", id="no-server"),
        pytest.param(
            {},
            {"server": "https://x", "insecure-skip-tls-verify": True},
            "insecure-skip-tls-verify: is not supported: name the CA",
            id="insecure",
        ),
        pytest.param(
            {},
            {"server": "https://x", "certificate-authority-data": "%%"},
            "certificate-authority: can't be read",
            id="bad-base64",
        ),
        pytest.param(
            {},
            {
                "server": "https://x",
                "certificate-authority-data": base64.b64encode(b"no PEM").decode(),
            },
            "unusable certificate",
            id="bad-ca",
        ),
    ],
)
def test_unusable_kubeconfig_says_why(
    tmp_path: Path, user: dict[str, Any], cluster: dict[str, Any], problem: str
) -> None:
    """A kubeconfig that can't be used is a typed error that names the key."""
    with pytest.raises(SpecError, match=problem):
        Access.from_file(kubeconfig(tmp_path, user, **cluster))


@pytest.mark.parametrize("text", ["", "no yaml: [", "- a", "current-context: gone"])
def test_other_files_are_no_kubeconfig(tmp_path: Path, text: str) -> None:
    """Any other file is a typed error, too."""
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(SpecError):
        Access.from_file(path)
    with pytest.raises(SpecError, match="KUBECONFIG: can't be read"):
        Access.from_file(tmp_path / "absent")


@pytest.mark.parametrize("text", ["", "7443", ":7443", "host:", "host:x", "host:70000"])
def test_address_has_host_and_port(text: str) -> None:
    """What is no address is refused."""
    with pytest.raises(SpecError, match=r"must look like 0\.0\.0\.0:7443"):
        Address.parse(text)
    assert str(Address.parse("[::1]:7443")) == "[::1]:7443"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "give either --kubernetes, or --policies and --profiles"),
        (["--kubernetes", "--policies", "/"], "give either --kubernetes, or --policies"),
        (["--policies", "/"], "--policies and --profiles go together"),
        (["--policies", "/", "--profiles", "/", "--namespace", "x"], "needs --kubernetes"),
        (["--policies", "/absent", "--profiles", "/"], "does not exist"),
        (["--kubernetes", "--listen", "x"], "must look like 0.0.0.0:7443"),
        (["--kubernetes", "--prior-mbit", "0"], "--prior-mbit"),
        (["--kubernetes", "--prior-mbit", "nan"], "--prior-mbit"),
    ],
)
def test_wrong_options_are_a_usage_error(arguments: list[str], problem: str) -> None:
    """A wrong command line ends with code 2 and what to do, before anything starts."""
    result = CliRunner().invoke(controller, arguments)
    assert result.exit_code == 2
    assert problem in result.output
