"""What the connector's tests share: one pair of real vLLM servers, and a controller beside them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from caches import own_cache
from controller_process import ControllerProcess, pareto_of_presets, with_joint
from kvserve_api.wire import KVLayout, model_fingerprint
from kvserve_strategies.artifacts import open_store
from otlp_receiver import Receiver
from random_bundles import write_sample
from real_pair import LEASE_S, TIMEOUT_S, RealPair
from vllm_servers import Plan, free_port, make_model, start


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that real servers load in seconds."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def real_pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealPair]:
    """Two vLLM servers with a controller; tests pin the profile they want."""
    folder = tmp_path_factory.mktemp("pair")
    config = json.loads((tiny_model / "config.json").read_text())
    fingerprint = model_fingerprint(config)
    layout = KVLayout(layers=4, kv_heads=2, head_dim=64, dtype="float32")
    bundle = write_sample(folder / "bundle", layout, fingerprint)
    artifacts = (folder / "artifacts").as_uri()
    open_store(artifacts).put_bundle(folder / "bundle")
    controller = ControllerProcess(folder / "controller", fingerprint)
    controller.set_set(with_joint(pareto_of_presets(fingerprint), bundle))
    controller.set_policy(control={"mode": "Pinned", "pinnedProfile": "none"})
    controller.start()
    bootstrap_port = free_port()
    extra = {
        "control_endpoint": f"127.0.0.1:{controller.port}",
        "policy": "default/chat",
        "artifacts": artifacts,
        "timeout_s": TIMEOUT_S,
        "stall_s": 4.0,
        "lease_s": LEASE_S,
        "chunk_layers": 1,
    }
    with Receiver() as receiver, pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVSERVE_CACHE_DIR", own_cache(folder / "cache"))
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        patch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "1000")
        cores = sorted(os.sched_getaffinity(0))
        servers = [
            start(
                Plan(
                    role=role,
                    core=core,
                    extra=extra
                    | {"pod": role.replace("_", "-")}
                    | ({"bootstrap_port": bootstrap_port} if role == "kv_producer" else {}),
                ),
                tiny_model,
                folder,
            )
            for role, core in (("kv_producer", cores[0]), ("kv_consumer", cores[-1]))
        ]
        try:
            for server in servers:
                server.wait_ready()
            yield RealPair(
                tiny_model, folder, servers[0], servers[1], controller, receiver, bootstrap_port
            )
        finally:
            for server in servers:
                server.stop()
            controller.kill()
