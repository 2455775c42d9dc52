"""Real vLLM engines in the two namespaces of `pd_links`, a core each, and the controller that pushes their tables."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kvserve_api.profile_set import ParetoSet
from pd_links import End, Link, inside
from testcluster.process import die_with_parent, system_env

PORT: Final = 8000
"""Of each engine's HTTP server: every namespace has its own ports."""
MOST_START_S: Final = 400.0
MOST_STOP_S: Final = 8.0
CACHE_BYTES: Final = 1 << 30
"""Keys and values of 45,000 tokens of SmolLM2: requests that wait for a slow link hold theirs at both ends."""
MAX_TOKENS: Final = 2304
"""Of a prompt and its answer."""
POLICY: Final = "default/bench"
ROLES: Final = ("kv_producer", "kv_consumer")


class ServerError(Exception):
    """An engine or the controller does not do what it must."""


@dataclass
class Controller:
    """The controller's process, fed from two folders.

    Attributes:
        folder: Its policies, profiles and log.
        port: Where pods reach it, on every address of this side.
    """

    folder: Path
    port: int = field(default_factory=lambda: _free_port())
    health: str = field(default_factory=lambda: f"127.0.0.1:{_free_port()}")
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        # what an earlier run left would be taken for this one's
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("policies", "profiles"):
            (self.folder / name).mkdir(parents=True)
        self.log = self.folder / "controller.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "kvserve_controller"),
                    *("--policies", str(self.folder / "policies")),
                    *("--profiles", str(self.folder / "profiles")),
                    *("--listen", f"0.0.0.0:{self.port}", "--health", self.health),
                ],
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
            )

    def stop(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def use(self, pareto: ParetoSet, timeout_s: float = 240.0, **spec: Any) -> None:
        """Put a policy in force, and wait until both engines hold its table.

        Args:
            pareto: The profiles that it chooses from.
            timeout_s: How long to wait.
            spec: Parts of the policy's spec besides model and targets.

        Raises:
            ServerError: They did not take it.
        """
        _replace(self.folder / "profiles" / "bench.json", pareto.canonical())
        _replace(
            self.folder / "policies" / "bench.json", json.dumps(_policy(pareto, spec)).encode()
        )
        wanted = (
            pareto.digest,
            spec.get("control", {}).get("pinnedProfile"),
            spec.get("slo", {}).get("goal", "MinimizeLatency"),
        )
        self._wait(lambda: _made_of(self._compiled()) == wanted and self._synced(), timeout_s)

    def _compiled(self) -> Mapping[str, Any]:
        """Return what the controller's log says of the last table that it made; empty before the first."""
        lines = self.log.read_text().splitlines()
        records = (json.loads(line) for line in reversed(lines) if line.startswith("{"))
        return next((r["audit"] for r in records if r["message"] == "compiled"), {})

    def _synced(self) -> bool:
        """Tell whether all engines hold the table in force."""
        try:
            with urllib.request.urlopen(f"http://{self.health}/status", timeout=5) as answer:
                status = json.loads(answer.read())
        except OSError:
            return False
        targets = status.get(POLICY, {}).get("targets", [])
        synced = sum(target["synced"] for target in targets)
        return bool(synced == len(ROLES) == sum(target["connected"] for target in targets))

    def _wait(self, holds: Callable[[], bool], timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline_s:
                raise ServerError(
                    f"the engines did not take the policy in {timeout_s:g} s: {self.log}"
                )
            time.sleep(0.1)


@dataclass
class Engine:
    """A vLLM server, as a process group.

    Attributes:
        end: Its namespace.
        log: Its output.
    """

    end: End
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{self.end.there}:{PORT}"

    def wait_ready(self) -> None:
        """Wait until it answers."""
        deadline_s = time.monotonic() + MOST_START_S
        while time.monotonic() < deadline_s:
            if self.process.poll() is not None:
                raise ServerError(f"vLLM ended at start-up: {self._tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.5)
        raise ServerError(f"vLLM did not start within {MOST_START_S:g} s: {self._tail()}")

    def totals(self) -> dict[str, float]:
        """Return KVServe's counters on its metrics page, summed over engines: ``name{direction,profile}`` to value."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as page:
            return read_totals(page.read().decode())

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        """End it for good."""
        self.signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(MOST_STOP_S)
        # workers that outlive their parent, too
        self.signal(signal.SIGKILL)
        self.process.wait()

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


@dataclass
class Pair:
    """A prefill and a decode engine, their link and their controller."""

    link: Link
    prefill: Engine
    decode: Engine
    controller: Controller

    def totals(self) -> dict[str, float]:
        """Return the counters of both engines."""
        return self.prefill.totals() | {
            key: value for key, value in self.decode.totals().items() if "send" not in key
        }


def read_totals(page: str) -> dict[str, float]:
    """Return KVServe's counters of a Prometheus page.

    Args:
        page: The page's text.

    Returns:
        For each name and labels besides engine and model, like ``wire_bytes{receive,joint-3}``, the value.
    """
    found: dict[str, float] = {}
    for line in page.splitlines():
        match = re.match(r"vllm:kvserve_(\w+)_total\{(.*)\} (\S+)$", line)
        if match is None:
            continue
        labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
        marks = [v for k, v in labels.items() if k not in ("engine", "model_name")]
        key = f"{match[1]}{{{','.join(marks)}}}"
        found[key] = found.get(key, 0.0) + float(match[3])
    return found


@contextmanager
def running(
    link: Link,
    model: Path,
    artifacts: str,
    folder: Path,
    connectors: Sequence[tuple[str, Mapping[str, Any]]] | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
) -> Iterator[Pair]:
    """Start controller and engines, and end them.

    Args:
        link: Between the engines.
        model: Folder of the model.
        artifacts: URL of the store with its calibration.
        folder: For logs.
        connectors: For each engine its role and more of its connector's settings; by default one prefills and the other
            decodes.
        max_tokens: Most tokens of a prompt and its answer.
    """
    controller = Controller(folder / "controller")
    controller.start()
    engines: list[Engine] = []
    roles = connectors or [(role, {}) for role in ROLES]
    try:
        cores = sorted(os.sched_getaffinity(0))
        for end, core, (role, extra) in zip(link.ends, (cores[0], cores[-1]), roles, strict=True):
            settings = {
                "control_endpoint": f"{end.here}:{controller.port}",
                "policy": POLICY,
                "artifacts": artifacts,
                "listen_host": end.address,
                "advertise_host": end.address,
                # raw transfers of a slow link shall arrive, not be given up: that is what is measured
                "timeout_s": 900,
                "prefill_timeout_s": 900,
                "stall_s": 300,
                "lease_s": 900,
                "pod": end.name,
            } | dict(extra)
            engines.append(_start(end, role, core, settings, model, folder, max_tokens))
        for engine in engines:
            engine.wait_ready()
        prefill, decode = engines
        yield Pair(link, prefill, decode, controller)
    finally:
        for engine in engines:
            engine.signal(signal.SIGTERM)
        for engine in engines:
            engine.stop()
        controller.stop()


def _start(
    end: End,
    role: str,
    core: int,
    connector: Mapping[str, Any],
    model: Path,
    folder: Path,
    max_tokens: int,
) -> Engine:
    transfer = {
        "kv_connector": "KVServeConnector",
        "kv_connector_module_path": "kvserve_connector.connector",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": dict(connector),
    }
    return start_engine(end, core, transfer, model, folder, max_tokens=max_tokens)


def start_engine(
    end: End,
    core: int,
    transfer: Mapping[str, Any],
    model: Path,
    folder: Path,
    *,
    max_tokens: int,
    env: Mapping[str, str] | None = None,
) -> Engine:
    """Start a vLLM server on one core, without waiting for it.

    Args:
        end: The namespace it runs in.
        core: Its core.
        transfer: vLLM's ``--kv-transfer-config``.
        model: Folder of the model.
        folder: For its log.
        max_tokens: Most tokens of a prompt and its answer.
        env: More of its environment.
    """
    environment = system_env() | {
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONHASHSEED": "0",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
    }
    log = folder / f"{end.name}.log"
    command = inside(
        end,
        "taskset", "-c", str(core), sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(model), "--served-model-name", "m", "--host", "0.0.0.0", "--port", str(PORT),
        "--dtype", "bfloat16", "--max-model-len", str(max_tokens), "--enforce-eager", "--seed", "0",
        "--kv-cache-memory-bytes", str(CACHE_BYTES), "--no-enable-prefix-caching",
        "--kv-transfer-config", json.dumps(transfer),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment | dict(env or {}),
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    return Engine(end, log, process)


def _policy(pareto: ParetoSet, spec: Mapping[str, Any]) -> dict[str, Any]:
    namespace, name = POLICY.split("/")
    return {
        "apiVersion": "kvserve.io/v1alpha1",
        "kind": "KVServePolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "model": {"name": pareto.model.name},
            "targets": [
                {"role": role, "selector": {"matchLabels": {"app": role.lower()}}}
                for role in ("Prefill", "Decode")
            ],
        }
        | dict(spec),
    }


def _made_of(audit: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return of what a table was made: the set, the pinned profile and the goal."""
    goal = audit.get("rules", {}).get("default", {}).get("goal")
    return (audit.get("pareto_digest"), audit.get("pinned"), goal)


def _replace(path: Path, content: bytes) -> None:
    """Write a file by one rename: the controller never reads half of it."""
    draft = path.with_suffix(".new")
    draft.write_bytes(content)
    draft.rename(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
