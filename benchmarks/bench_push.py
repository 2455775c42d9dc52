"""The push channel at scale: a thousand pods' streams on loopback against the real controller: ``make bench-push``.

The controller is ``python -m kvserve_controller`` over two directories, in a process of its own; the pods are two
more processes (`push_pods`), each pod with a connection and a stream of its own that reports a transfer a second.
Measured are

* *report*: the controller's processor time for each report, while nothing changes;
* *change*: the policy file is changed, and each time: from the offer of the new table until the last pod's
  acknowledgement, Decode pods before Prefill pods; and the controller's processor time beyond that of the reports
  meanwhile;
* *stuck*: the same while a Decode pod answers nothing;
* *reconnect*: all streams end at once; until all pods have acknowledged a table again;
* *restart*: the controller is killed and started again; from its readiness until all pods have acknowledged a table
  of the new one, and whether any pod was ever pushed a lower version than it held;
* the controller's memory after all that, and its peak.

It takes about two minutes (``QUICK=1``: one), writes ``build/bench/push.json`` and prints a table, or JSON with
``--json``.
"""

import argparse
import json
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from operator import lt
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import controller_profiles
from kvserve_connector.control import FIRST_BACKOFF_S, LAST_BACKOFF_S

OUT: Final = Path(__file__).parents[1] / "build" / "bench" / "push.json"
PROCESSES: Final = 2
BUDGETS_BP: Final = (100, 70, 10)
"""Each is another table."""
MOST_WAIT_S: Final = 60.0
SETTLE_S: Final = 2.0
"""After connecting, before the processor time of reports is measured."""
IDLE_S: Final = 6.0
"""For so long it is."""
Version = tuple[int, int]
TARGETS: Final = {
    "change_p99_s": 0.5,
    "stuck_p99_s": 0.5,
    "reconnect_s": 5.0,
    "restart_s": 5.0,
    "rss_mib": 200.0,
    "versions_lowered": 0,
}


class BenchError(Exception):
    """The benchmark can't go on."""


@dataclass
class Controller:
    """The controller's process.

    Attributes:
        folder: Its policies, profiles and log.
    """

    folder: Path
    address: str = field(default_factory=lambda: f"127.0.0.1:{_free_port()}")
    health: str = field(default_factory=lambda: f"127.0.0.1:{_free_port()}")
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        for name in ("policies", "profiles"):
            (self.folder / name).mkdir()
        (self.folder / "profiles" / "bench.json").write_bytes(controller_profiles.cpu().canonical())
        self.log = self.folder / "controller.log"

    def start(self) -> float:
        """Start it; returns when it was ready, in seconds since 1970."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "kvserve_controller"),
                    *("--policies", str(self.folder / "policies")),
                    *("--profiles", str(self.folder / "profiles")),
                    *("--listen", self.address, "--health", self.health),
                ],
                stderr=log,
            )
        deadline_s = time.monotonic() + MOST_WAIT_S
        while time.monotonic() < deadline_s:
            try:
                with urllib.request.urlopen(f"http://{self.health}/readyz", timeout=2):
                    return time.time()
            except (urllib.error.URLError, OSError):
                time.sleep(0.02)
        raise BenchError(f"the controller did not get ready; see {self.log}")

    def kill(self) -> None:
        """Kill it, as a node's failure would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def memory_mib(self) -> tuple[float, float]:
        """Return its resident memory now and at most."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        values = {line.split(":")[0]: line.split()[1] for line in status if line.startswith("Vm")}
        return int(values["VmRSS"]) / 1024, int(values["VmHWM"]) / 1024

    def cpu_s(self) -> float:
        """Return the processor time it has used."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def set_budget(self, budget_bp: int) -> None:
        """Change the policy."""
        policy = {
            "apiVersion": "kvserve.io/v1alpha1",
            "kind": "KVServePolicy",
            "metadata": {"name": "bench", "namespace": "default"},
            "spec": {
                "model": {"name": controller_profiles.MODEL},
                "targets": [
                    {"role": role, "selector": {"matchLabels": {"app": role.lower()}}}
                    for role in ("Prefill", "Decode")
                ],
                "quality": {"maxLossBasisPoints": budget_bp},
            },
        }
        # one rename, so that the controller never reads half a file
        target = self.folder / "policies" / "bench.yaml"
        target.with_suffix(".tmp").write_text(yaml.safe_dump(policy))
        target.with_suffix(".tmp").rename(target)

    def records(self, event: str) -> dict[str, dict[str, Any]]:
        """Return by version the controller's own records of an event of its tables, with ``at_s`` since 1970."""
        found: dict[str, dict[str, Any]] = {}
        for line in self.log.read_text().splitlines():
            if line.startswith("{") and (record := json.loads(line))["message"] == event:
                audit = record["audit"]
                at_s = datetime.fromisoformat(record["time"]).timestamp()
                found[audit["version"]] = audit | {"at_s": at_s}
        return found


class Pods:
    """The processes that play the pods.

    Attributes:
        answered_s: For each version that was waited for, when the last pod acknowledged it, in seconds since 1970.
    """

    def __init__(self, address: str, count: int, *, reports: bool) -> None:
        self.answered_s: dict[Version, float] = {}
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._processes: list[subprocess.Popen[bytes]] = []
        script = str(Path(__file__).with_name("push_pods.py"))
        for number in range(PROCESSES):
            process = subprocess.Popen(
                [
                    *(sys.executable, script, "--address", address),
                    *("--pods", str(count // PROCESSES), "--name", f"pod{number}"),
                    *("--backoff", str(FIRST_BACKOFF_S), str(LAST_BACKOFF_S)),
                    *("--report-every", "1" if reports else "0"),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._processes.append(process)
            assert process.stdout is not None
            threading.Thread(
                target=self._listen, args=(number, process.stdout), daemon=True
            ).start()

    def say(self, command: str, *, first_only: bool = False) -> None:
        """Send a command to all processes, or to the first."""
        for process in self._processes[: 1 if first_only else None]:
            assert process.stdin is not None
            process.stdin.write(f"{command}\n".encode())
            process.stdin.flush()

    def all_hold(self, wanted: Callable[[Version], bool]) -> dict[str, Any]:
        """Wait until all pods have acknowledged one version; return when, and which.

        Args:
            wanted: Tells whether a version is one that is waited for.
        """
        done: dict[int, dict[str, Any]] = {}
        deadline_s = time.monotonic() + MOST_WAIT_S
        while True:
            try:
                event = self._events.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                raise BenchError(f"not all pods answered within {MOST_WAIT_S:g} s") from None
            if event["event"] == "all" and wanted(tuple(event["version"])):
                done[event["process"]] = event
                versions = {tuple(one["version"]) for one in done.values()}
                if len(done) == PROCESSES and len(versions) == 1:
                    version = versions.pop()
                    self.answered_s[version] = max(one["last_s"] for one in done.values())
                    return {
                        "version": version,
                        "last_s": self.answered_s[version],
                        "lowered": sum(one["lowered"] for one in done.values()),
                    }

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.wait()

    def _listen(self, number: int, stdout: IO[bytes]) -> None:
        for line in stdout:
            self._events.put(json.loads(line) | {"process": number})


def measure(pods: int, rounds: int, *, reports: bool) -> dict[str, Any]:
    """Do all that ``make bench-push`` does."""
    with tempfile.TemporaryDirectory() as folder:
        controller = Controller(Path(folder))
        controller.set_budget(BUDGETS_BP[-1])
        controller.start()
        fleet = Pods(controller.address, pods, reports=reports)
        try:
            return _phases(controller, fleet, rounds, pods if reports else 0) | {
                "streams": pods,
                "rounds": rounds,
            }
        finally:
            fleet.close()
            controller.kill()


def _phases(controller: Controller, fleet: Pods, rounds: int, reports_per_s: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    held = fleet.all_hold(lambda _: True)["version"]
    _log("all pods hold a table")

    # what connecting left to do must not count as reports
    time.sleep(SETTLE_S)
    idle_load = _load(controller, lambda: time.sleep(IDLE_S))[0]
    if reports_per_s:
        result["report_cpu_us"] = idle_load / reports_per_s * 1e6
    versions: list[Version] = []
    load, took_s = _load(
        controller, lambda: versions.extend(_change(controller, fleet, rounds, held))
    )
    result["change_cpu_s"] = (load - idle_load) * took_s / rounds
    answered = controller.records("answered")
    # a table that was superseded before its last answer has no record
    seconds = [answered[_text(v)]["seconds"] for v in versions if _text(v) in answered]
    result |= {"changes_answered": len(seconds)} | _percentiles("change", seconds)
    held = versions[-1]
    _log(f"{rounds} changes of the policy")

    began_s = time.time()
    fleet.say("drop")
    result["reconnect_s"] = fleet.all_hold(lambda _: True)["last_s"] - began_s
    _log("all pods reconnected")

    controller.kill()
    ready_s = controller.start()
    event = fleet.all_hold(lambda version: version > held)
    result["restart_s"] = event["last_s"] - ready_s
    result["versions_lowered"] = event["lowered"]
    held = event["version"]
    _log("the controller was killed, and is back")

    fleet.say("stick", first_only=True)
    versions = _change(controller, fleet, 1 + max(4, rounds // 4), held)
    compiled = controller.records("compiled")
    seconds = [fleet.answered_s[version] - compiled[_text(version)]["at_s"] for version in versions]
    # on the first table it may still answer, and Prefill pods wait a while for it
    result["stuck_first_s"] = seconds[0]
    result |= _percentiles("stuck", seconds[1:])
    result["rss_mib"], result["rss_peak_mib"] = controller.memory_mib()
    _log("a Decode pod was stuck")
    return result


def _load(controller: Controller, work: Callable[[], object]) -> tuple[float, float]:
    """Do some work; return how many processors the controller kept busy meanwhile, and the seconds it took."""
    began_cpu_s, began_s = controller.cpu_s(), time.monotonic()
    work()
    took_s = time.monotonic() - began_s
    return (controller.cpu_s() - began_cpu_s) / took_s, took_s


def _change(controller: Controller, fleet: Pods, rounds: int, held: Version) -> list[Version]:
    """Change the policy again and again; return the versions that this led to."""
    versions = []
    for number in range(rounds):
        controller.set_budget(BUDGETS_BP[number % len(BUDGETS_BP)])
        before = held
        held = fleet.all_hold(partial(lt, before))["version"]
        versions.append(held)
        # its last answer may still be on the way to the controller
        time.sleep(0.2)
    return versions


def _percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    return {f"{name}_p{percent}_s": float(np.percentile(seconds, percent)) for percent in (50, 99)}


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _table(result: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, title=f"{result['streams']} streams, {result['rounds']} changes")
    for heading in ("measured", "value", "target", ""):
        table.add_column(heading, justify="left" if heading == "measured" else "right")
    for name, value in result.items():
        if name in ("streams", "rounds", "targets"):
            continue
        target = TARGETS.get(name)
        met = "" if target is None else "yes" if value <= target else "no"
        limit = "" if target is None else f"<= {target:g}"
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value), limit, met)
    return table


def main() -> int:
    """Measure and print; 1 if a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--no-reports", action="store_true", help="pods report no transfers")
    options = parser.parse_args()
    quick = os.environ.get("QUICK", "") not in ("", "0")
    rounds = 15 if quick else 60
    _log(f"{options.streams} streams, {rounds} changes: about {45 + 1.0 * rounds:.0f} s")
    # each stream is a connection of its own
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    try:
        result = measure(options.streams, rounds, reports=not options.no_reports)
    except BenchError as error:
        print(f"bench_push: {error}", file=sys.stderr)
        return 1
    missed = [name for name, most in TARGETS.items() if not result[name] <= most]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(result | {"targets": TARGETS}, indent=2) + "\n")
    if options.json:
        print(json.dumps(result))
    else:
        Console(width=100).print(_table(result))
    for name in missed:
        print(
            f"bench_push: {name} is {result[name]:.3f}, more than {TARGETS[name]:g}",
            file=sys.stderr,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
