"""The real controller as a process, fed from two directories."""

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvserve_api.latency import StageCost
from kvserve_api.profile_set import ModelIdentity, ParetoSet, Profile
from kvserve_strategies import PRESETS, Pipeline
from kvserve_strategies.bundle import Bundle
from random_bundles import joint_strategy
from samples import MODEL, policy_object
from vllm_servers import free_port

RATIOS = {"none": 1.0, "lossless": 1.2, "int8-token": 3.7, "int4-token": 7.0}


def pareto_of_presets(fingerprint: str) -> ParetoSet:
    """Return a set of real strategies with plausible figures for float32 KV."""
    profiles = tuple(
        Profile(
            name=name,
            strategy=PRESETS[name],
            ratio=ratio,
            loss_bp=0.0 if Pipeline.of(PRESETS[name]).lossless else 10.0 * ratio,
            loss_upper_bp=0.0 if Pipeline.of(PRESETS[name]).lossless else 11.0 * ratio,
            encode=StageCost(bytes_per_s=1e9),
            decode=StageCost(bytes_per_s=1e9),
            lossless=Pipeline.of(PRESETS[name]).lossless,
        )
        for name, ratio in sorted(RATIOS.items(), key=lambda item: -item[1])
    )
    identity = ModelIdentity(name=MODEL, revision="", fingerprint=fingerprint)
    return ParetoSet(model=identity, device="cpu", classes={"default": profiles})


def with_joint(pareto: ParetoSet, bundle: Bundle) -> ParetoSet:
    """Return the set with a calibrated profile, ``joint``, for a bundle of `random_bundles`."""
    joint = Profile(
        name="joint",
        strategy=joint_strategy(),
        ratio=2.0,
        loss_bp=1.0,
        loss_upper_bp=2.0,
        encode=StageCost(bytes_per_s=1e8),
        decode=StageCost(bytes_per_s=1e8),
        lossless=False,
        bundle=bundle.digest,
    )
    return replace(pareto, classes={"default": (*pareto.classes["default"], joint)})


@dataclass
class ControllerProcess:
    """A controller that can be stopped, frozen and started again at the same address.

    Attributes:
        folder: Where its directories and its log are.
        fingerprint: Of the model that its profiles were measured on.
        arguments: Further options.
        generation: Of the policy, a number for each time it was written.
    """

    folder: Path
    fingerprint: str
    port: int = field(default_factory=free_port)
    health_port: int = field(default_factory=free_port)
    arguments: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    generation: int = 0

    def __post_init__(self) -> None:
        for name in ("policies", "profiles"):
            (self.folder / name).mkdir(parents=True)
        self.set_set(pareto_of_presets(self.fingerprint))

    def set_set(self, pareto: ParetoSet) -> None:
        """Write the Pareto set."""
        (self.folder / "profiles" / "chat.json").write_bytes(pareto.canonical())

    def set_policy(self, **spec: Any) -> None:
        """Write the policy; keywords replace parts of its spec."""
        target = self.folder / "policies" / "chat.json"
        draft = target.with_suffix(".new")
        self.generation += 1
        policy = policy_object("chat", **spec)
        policy["metadata"]["generation"] = self.generation
        draft.write_text(json.dumps(policy))
        draft.rename(target)

    def start(self) -> None:
        """Start it, and wait until it listens."""
        with (self.folder / "controller.log").open("ab") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "kvserve_controller",
                    "--policies", str(self.folder / "policies"),
                    "--profiles", str(self.folder / "profiles"),
                    "--listen", f"127.0.0.1:{self.port}", "--health", f"127.0.0.1:{self.health_port}",
                    *self.arguments,
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.wait(lambda: self._get("/readyz") is not None)

    def kill(self) -> None:
        """End it without a chance to say goodbye."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait(10)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def status(self) -> Any:
        """Return the status it publishes of every policy."""
        return json.loads(self._get("/status") or "{}")

    def wait(self, holds: Callable[[], bool], timeout_s: float = 30) -> None:
        """Wait until something holds."""
        deadline_s = time.monotonic() + timeout_s
        while not holds():
            log = (self.folder / "controller.log").read_text(errors="replace")
            assert time.monotonic() < deadline_s, (
                f"the controller did not get there:\n{log[-4000:]}"
            )
            time.sleep(0.1)

    def _get(self, path: str) -> bytes | None:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.health_port}{path}", timeout=2
            ) as answer:
                body: bytes = answer.read()
                return body
        except OSError:
            return None


def only(pareto: ParetoSet, *names: str) -> ParetoSet:
    """Return the set with some of its profiles."""
    kept = tuple(p for p in pareto.classes["default"] if p.name in names)
    return replace(pareto, classes={"default": kept})
