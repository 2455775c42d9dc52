"""``kvserve doctor`` against the real controller, transfer server, store and collector."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from click.testing import CliRunner

from controller_process import ControllerProcess
from kv_loopback import ENGINE, LAYOUT, pair
from kvserve_api.credentials import CredentialFiles
from kvserve_connector.doctor.cli import doctor
from kvserve_strategies.artifacts import open_store
from members import Members
from otlp_receiver import Receiver
from random_bundles import write_sample

Examine: TypeAlias = Callable[..., tuple[dict[str, list[dict[str, str]]], int]]


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    """The deployment."""
    return Members(tmp_path_factory.mktemp("members"))


def options(files: CredentialFiles) -> dict[str, str]:
    """Return credential files as the connector's settings."""
    return {key: str(path) for key, path in asdict(files).items() if path is not None}


@pytest.fixture(scope="module")
def controller(
    members: Members, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControllerProcess]:
    """A controller that asks for secret and certificate."""
    files = options(members.with_tls(secret=True)).items()
    arguments = [word for key, path in files for word in (f"--{key.replace('_', '-')}", path)]
    made = ControllerProcess(
        tmp_path_factory.mktemp("controller"), ENGINE.fingerprint, arguments=tuple(arguments)
    )
    made.set_policy()
    made.start()
    yield made
    made.kill()


@pytest.fixture
def examine(controller: ControllerProcess, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """Run the command; returns its findings by check, and its exit code."""
    monkeypatch.delenv("KVSERVE_ARTIFACTS", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)

    def run(config: dict[str, Any], *arguments: str) -> tuple[dict[str, Any], int]:
        endpoint = {"control_endpoint": f"127.0.0.1:{controller.port}"}
        done = CliRunner().invoke(
            doctor,
            [
                *("--json", "--timeout", "3", "--config", json.dumps(endpoint | config)),
                *("--status", f"http://127.0.0.1:{controller.health_port}", *arguments),
            ],
        )
        found: dict[str, list[dict[str, str]]] = {}
        for finding in json.loads(done.stdout)["findings"]:
            found.setdefault(finding["check"], []).append(finding)
        return found, done.exit_code

    return run


def test_all_is_well(
    examine: Examine, members: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything in place each check says what it found, and the exit code is 0."""
    monkeypatch.setenv("KVSERVE_CACHE_DIR", str(tmp_path / "cache"))
    bundle = write_sample(tmp_path / "bundle", LAYOUT, ENGINE.fingerprint)
    store = (tmp_path / "store").as_uri()
    open_store(store).put_bundle(tmp_path / "bundle")
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64})
    )
    files = members.with_tls(secret=True)
    with pair(credentials=files) as both, Receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        found, code = examine(
            options(files) | {"artifacts": store, "policy": "default/chat"},
            *("--bundle", bundle.digest, "--model", str(tmp_path)),
            *("--peer", f"127.0.0.1:{both.server.port}"),
        )
    assert code == 0, found
    assert not [each for all_ in found.values() for each in all_ if each["level"] == "FAIL"]
    assert "TLS, proven by a secret" in found["controller"][0]["text"]
    assert "table " in found["policy"][0]["text"]
    assert found["clock"][0]["level"] == "OK"
    assert found["artifact store"][0]["text"].startswith(f"{bundle.digest} is whole")
    assert "answers: TLS" in found["peer"][0]["text"]
    assert "takes traces" in found["telemetry"][0]["text"]
    assert found["certificate"][0]["level"] == "OK"
    assert found["kv layout"][0]["text"].startswith("2 layers of 2 heads of 32")
    assert {"python", "kvserve", "vllm", "kernels", "open files", "settings"} <= set(found)


def test_the_doctor_disturbs_nobody(
    examine: Examine, members: Members, controller: ControllerProcess
) -> None:
    """The controller counts no pod for it."""
    examine(options(members.with_tls(secret=True)))
    targets = controller.status()["default/chat"]["targets"]
    assert [target["connected"] for target in targets] == [0, 0]


@pytest.mark.parametrize(
    ("who", "text"),
    [
        ("secret only", "Unavailable"),
        ("certificate only", "proof of a secret is wanted"),
        ("another secret", "does not prove to hold our secret"),
        ("another authority", "no TLS with the controller"),
    ],
)
def test_a_stranger_is_told_so(
    examine: Examine, members: Members, tmp_path: Path, who: str, text: str
) -> None:
    """Credentials that don't fit fail at the controller and at a peer, each with what to compare."""
    others = Members(tmp_path / "others", secret="o" * 40)
    mine, theirs = members.with_tls(secret=True), others.with_tls(secret=True)
    files = {
        "secret only": members.with_secret(),
        "certificate only": members.with_tls(),
        "another secret": CredentialFiles(
            **{**asdict(mine), "secret_file": tmp_path / "others" / "secret"}
        ),
        "another authority": theirs,
    }[who]
    with pair(credentials=mine) as both:
        found, code = examine(options(files), "--peer", f"127.0.0.1:{both.server.port}")
    assert code == 1
    assert text in found["controller"][0]["text"]
    assert found["controller"][0]["advice"]
    assert found["peer"][0]["level"] == "FAIL"
    assert found["peer"][0]["advice"] == "Compare secrets, certificates and peers on both pods."


def test_what_is_missing_fails(
    examine: Examine, members: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing bundle, a store that is away, a late certificate and a silent peer fail, a collector warns."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    (tmp_path / "store").mkdir()
    late = members.with_tls("late", secret=True)
    members.issue("late", valid_s=-60)
    config = options(late) | {"artifacts": (tmp_path / "store").as_uri()}
    found, code = examine(config, "--bundle", "sha256:" + "1" * 64, "--peer", "127.0.0.1:1")
    assert code == 1
    assert found["artifact store"][0]["level"] == "FAIL"
    assert "CERTIFICATE" in found["certificate"][0]["text"].upper()
    assert "PeerLost" in found["peer"][0]["text"]
    assert found["telemetry"][0]["level"] == "WARN"
    assert found["controller"][0]["level"] == "FAIL"
    found, _ = examine(config)
    assert "answers; give --bundle" in found["artifact store"][0]["text"]
    found, _ = examine(config | {"artifacts": (tmp_path / "away").as_uri()})
    assert "Unavailable" in found["artifact store"][0]["text"]


def test_wrong_settings_end_it(examine: Examine) -> None:
    """Settings with which vLLM would not start fail by their name; what needs them is not tried."""
    found, code = examine({"lease_s": -1})
    assert code == 1
    assert "lease_s" in found["settings"][0]["text"]
    assert "controller" not in found
    done = CliRunner().invoke(doctor, ["--config", "{broken"])
    assert done.exit_code == 1
    assert "FAIL  settings: --config: is not JSON" in done.stdout
