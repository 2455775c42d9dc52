"""What a pod's connector is told, and how it refuses what it was not meant to be told."""

from pathlib import Path
from typing import Any

import pytest

from kvserve_api.errors import SpecError
from kvserve_connector.bundles import open_artifacts
from kvserve_connector.config import DEFAULT_PORT, ConnectorConfig, read_labels
from kvserve_connector.stores.config import StoreConfig


def read(extra: dict[str, Any], **env: str) -> ConnectorConfig:
    """Read settings."""
    return ConnectorConfig.read(extra, env, "10.9.9.9")


def test_defaults() -> None:
    """Nothing needs to be said; the pod's own facts come from the downward API's variables."""
    config = read({}, POD_NAME="prefill-0", POD_NAMESPACE="prod", POD_IP="10.0.0.7")
    assert config.control_endpoint is None
    assert (config.pod, config.namespace) == ("prefill-0", "prod")
    assert config.advertise_host == "10.0.0.7"
    assert config.listen_port == DEFAULT_PORT
    assert read({}).advertise_host == "10.9.9.9"
    assert read({"advertise_host": "a.b"}, POD_IP="10.0.0.7").advertise_host == "a.b"


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        pytest.param({"control_endpont": "a:1"}, "control_endpont", id="unknown-key"),
        pytest.param({"control_endpoint": "controller"}, "control_endpoint", id="no-port"),
        pytest.param({"control_endpoint": "a:99999"}, "control_endpoint", id="port"),
        pytest.param({"policy": "chat"}, "policy", id="policy-without-namespace"),
        pytest.param({"listen_port": "7790"}, "listen_port", id="port-as-text"),
        pytest.param({"listen_port": 70_000}, "listen_port", id="port-too-high"),
        pytest.param({"lease_s": 0}, "lease_s", id="no-lease"),
        pytest.param({"timeout_s": float("nan")}, "timeout_s", id="nan"),
        pytest.param({"timeout_s": 1.0, "stall_s": 2.0}, "stall_s", id="stall-above-timeout"),
        pytest.param({"chunk_layers": 0}, "chunk_layers", id="no-layers"),
        pytest.param({"probe_share": 0.6}, "probe_share", id="probes-most-of-the-time"),
        pytest.param({"labels_file": "/does/not/exist"}, "labels_file", id="labels-missing"),
        pytest.param({"store": "file:///kv"}, "store", id="store-as-text"),
        pytest.param({"store": {}}, "store.url", id="store-without-url"),
        pytest.param({"store": {"url": "file:///kv", "ttl": 9}}, "store.ttl", id="store-unknown"),
        pytest.param({"store": {"url": "a:", "ttl_s": 0}}, "store.ttl_s", id="store-no-life"),
        pytest.param({"store": {"url": "a:", "profile": "x"}}, "store.profile", id="no-preset"),
        pytest.param(
            {"store": {"url": "a:", "profile": "joint-3"}}, "store.profile", id="preset-calibrated"
        ),
        pytest.param(
            {"store": {"url": "a:", "chunk_tokens": 100}}, "store.chunk_tokens", id="chunk-steps"
        ),
    ],
)
def test_wrong_settings_name_their_field(extra: dict[str, Any], field: str) -> None:
    """Each wrong setting is an error that names it."""
    with pytest.raises(SpecError) as caught:
        read(extra)
    assert caught.value.field == f"kv_connector_extra_config.{field}"


def test_workers_have_ports_of_their_own() -> None:
    """A tensor-parallel worker listens beside its siblings, and is a pod of its own to the controller."""
    config = read({"listen_port": 7790}, POD_NAME="prefill-0")
    assert config.of_rank(0) is config
    assert (config.of_rank(2).listen_port, config.of_rank(2).pod) == (7792, "prefill-0-2")
    assert read({"listen_port": 0}).of_rank(1).listen_port == 0


def test_the_store_is_the_settings_or_the_environments() -> None:
    """The setting wins over KVSERVE_ARTIFACTS; without either there is none."""
    assert read({}).artifacts is None
    assert read({}, KVSERVE_ARTIFACTS="").artifacts is None
    assert read({}, KVSERVE_ARTIFACTS="file:///a").artifacts == "file:///a"
    assert read({"artifacts": "s3://b/c"}, KVSERVE_ARTIFACTS="file:///a").artifacts == "s3://b/c"


def test_a_store_that_is_none_is_refused() -> None:
    """A URL that no store has is an error that names the setting."""
    with pytest.raises(SpecError) as caught:
        open_artifacts(read({"artifacts": "ftp://a"}))
    assert caught.value.field == "kv_connector_extra_config.artifacts"
    assert open_artifacts(read({})) is None


def test_labels_as_the_downward_api_writes_them(tmp_path: Path) -> None:
    """Labels are read with their quotes and escapes."""
    path = tmp_path / "labels"
    path.write_text('app="chat-prefill"\nkvserve.io/policy="chat"\nnote="a \\"b\\""')
    assert read_labels(path) == {
        "app": "chat-prefill",
        "kvserve.io/policy": "chat",
        "note": 'a "b"',
    }
    assert read({"labels_file": str(path)}).labels["app"] == "chat-prefill"


def test_other_labels_files_are_refused(tmp_path: Path) -> None:
    """A file of another form is an error that quotes the line."""
    path = tmp_path / "labels"
    path.write_text("app: chat")
    with pytest.raises(SpecError, match="app: chat"):
        read_labels(path)


def test_a_store_is_told_in_an_object() -> None:
    """Only its URL is needed."""
    assert read({}).store is None
    store = read({"store": {"url": "redis://kv:6379/0", "profile": "lossless"}}).store
    assert store == StoreConfig(url="redis://kv:6379/0", profile="lossless")
