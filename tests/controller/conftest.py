"""A controller in this process, and one in a process of its own."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGTERM, Signals
from typing import Any, TypeAlias

import pytest
import yaml

from kvserve_api.policy import Policy
from kvserve_api.profile_set import ParetoSet
from kvserve_controller.controller import Controller
from kvserve_controller.metrics import Metrics
from kvserve_controller.program import Instant
from kvserve_controller.server import Address, grpc_server, now
from kvserve_controller.source import Entry
from samples import pareto, policy_object


@dataclass
class Served:
    """A controller in this process with real streams.

    Attributes:
        controller: The controller.
        address: Where pods connect.
        ahead_s: How far its clocks are ahead of the real ones.
    """

    controller: Controller = field(init=False)
    address: str = ""
    ahead_s: float = 0.0

    def clock(self) -> Instant:
        """Return the controller's time."""
        real = now()
        return Instant(real.mono_s + self.ahead_s, real.wall_s + self.ahead_s)

    def apply(self, set_: ParetoSet | None = None, generation: int = 1, **spec: Any) -> None:
        """Give it the policy ``default/chat``."""
        policy = Policy.from_object(policy_object(**spec))
        entry = Entry(policy=policy, pareto=set_ or pareto(), generation=generation)
        self.controller.apply({policy.key: entry})


@asynccontextmanager
async def _served(wall_s: float | None = None, ack_timeout_s: float = 1.0) -> AsyncIterator[Served]:
    served = Served()
    served.controller = Controller(
        prior_bytes_per_s=125e6,
        now=served.clock if wall_s is None else lambda: Instant(time.monotonic(), wall_s),
        metrics=Metrics(),
        ack_timeout_s=ack_timeout_s,
    )
    async with grpc_server(Address(host="127.0.0.1", port=0), served.controller) as port:
        served.address = f"127.0.0.1:{port}"
        yield served


Serve: TypeAlias = Callable[..., Any]


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """Return a controller that serves real streams, with a pod's time to answer cut to a second."""
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(_served())


@pytest.fixture
def serve() -> Serve:
    """Return what makes further controllers, which start at a given time."""
    return _served


def free_port() -> int:
    """Return a port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class ControllerProcess:
    """A controller in a process of its own, over two directories or a cluster."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.policies, self.profiles = self.folder / "policies", self.folder / "profiles"
        self.policies.mkdir(exist_ok=True)
        self.profiles.mkdir(exist_ok=True)
        self.address, self.health = (f"127.0.0.1:{free_port()}" for _ in range(2))
        self.log = self.folder / "controller.log"

    def start(self, *, wait: bool = True) -> None:
        """Start it, and wait until it is ready."""
        directories = ("--policies", str(self.policies), "--profiles", str(self.profiles))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "kvserve_controller"),
                    *("--listen", self.address, "--health", self.health),
                    *(self.arguments or directories),
                ],
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self.environment},
            )
        deadline_s = time.monotonic() + 30
        while wait and self.get("/readyz")[0] != 200:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline_s, self.log.read_text()
            time.sleep(0.05)

    def signal(self, number: Signals) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def end(self, number: Signals = SIGTERM) -> int:
        """End it and return its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(15)

    def get(self, path: str) -> tuple[int, str]:
        """Return status and text of an HTTP answer; 0 without one."""
        try:
            with urllib.request.urlopen(f"http://{self.health}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    async def status(self, key: str = "default/chat") -> Any:
        """Return the status of a policy as it is published without Kubernetes."""
        code, text = await asyncio.to_thread(self.get, "/status")
        return json.loads(text)[key] if code == 200 else {}

    def write_policy(self, **spec: Any) -> None:
        """Write the policy file."""
        (self.policies / "chat.yaml").write_text(yaml.safe_dump(policy_object(**spec)))

    def write_set(self, document: bytes | None = None) -> None:
        """Write the Pareto set."""
        (self.profiles / "chat.json").write_bytes(document or pareto().canonical())


@pytest.fixture
def controller_process(tmp_path: Path) -> Iterator[ControllerProcess]:
    """Return a controller over two directories, not started yet; it is ended after the test."""
    made = ControllerProcess(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()
