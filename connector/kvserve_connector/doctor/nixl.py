"""Checks of the transport ``nixl``: its package, what pods may do, and one piece that is really read."""

import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from kvserve_api.errors import SpecError
from kvserve_connector.config import NIXL, ConnectorConfig
from kvserve_connector.doctor.finding import Finding, fail, ok, warn
from kvserve_connector.staging import nixl
from kvserve_connector.versions import installed

CHECK: Final = "nixl"
LEAST_NIXL: Final = (1, 5)
"""That of the extra ``kvserve[nixl]``."""
MOST_REGISTERED_BYTES: Final = 64 << 20
"""What the probe registers at most: the pod's memory is the engine's."""
START_S: Final = 60.0
"""Seconds in which a process of its own has loaded what it needs, on a busy machine."""
DEVICES: Final = Path("/dev/infiniband")
STATUS: Final = Path("/proc/self/status")
_IPC_LOCK: Final = 14
"""Bit of the capability that lifts the limit of locked memory, see capabilities(7)."""
_COMPLAINT: Final = re.compile(r"UCX +(?:ERROR|WARN) +(.*)")
_STEERING: Final = ("UCX_TLS", "UCX_NET_DEVICES")


def check_nixl(
    config: ConnectorConfig, env: Mapping[str, str], timeout_s: float
) -> Iterator[Finding]:
    """Check what the transport needs; nothing if it is not asked for.

    Args:
        config: The connector's settings.
        env: The environment, which tells UCX what to use.
        timeout_s: Most seconds that a read may take.
    """
    if config.transport != NIXL:
        return
    try:
        package = nixl().__name__.partition(".")[0].replace("_", "-")
    except SpecError as error:
        yield fail(CHECK, str(error), 'CUDA 13: nixl-cu13. Or take "transport": "tcp".')
        return
    yield judge_nixl(package, installed(package))
    devices = sorted(path.name for path in DEVICES.glob("uverbs*"))
    yield judge_devices(devices)
    if devices:
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        yield judge_locked(soft, config.staging_bytes, exempt=may_lock(STATUS.read_text()))
    memory_bytes = min(config.staging_bytes, MOST_REGISTERED_BYTES)
    yield judge_read(*probe(memory_bytes, env, timeout_s), env)


def probe(memory_bytes: int, env: Mapping[str, str], timeout_s: float) -> tuple[int | None, str]:
    """Have a process of its own read a piece; see `kvserve_connector.doctor.probe`.

    Returns:
        How it ended, negative by a signal, None if it did not; and what it wrote.
    """
    # -P: what lies in the folder that we are called in must not be taken for a package
    command = [sys.executable, "-P", "-m", "kvserve_connector.doctor.probe"]
    try:
        done = subprocess.run(
            [*command, str(memory_bytes), str(timeout_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            timeout=START_S + timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return None, (error.output or b"").decode(errors="replace")
    return done.returncode, done.stdout.decode(errors="replace")


def judge_nixl(package: str, found: str | None) -> Finding:
    """Judge NIXL's version.

    Args:
        package: The name by which it was installed.
        found: Its version; None where only its modules are there.
    """
    if found is None:
        return warn(CHECK, f"{package} is not installed as a package", "Install it by pip.")
    numbers = tuple(map(int, re.findall(r"\d+", found)[:2]))
    if numbers >= LEAST_NIXL:
        return ok(CHECK, f"{package} {found}")
    least = ".".join(map(str, LEAST_NIXL))
    return fail(
        CHECK, f"{package} {found}", f'Use {least} or later: pip install "{package}>={least}".'
    )


def judge_devices(names: Sequence[str]) -> Finding:
    """Judge which RDMA devices this pod may open."""
    check = "rdma"
    if names:
        return ok(check, ", ".join(names))
    return warn(
        check,
        "no device: NIXL reads by TCP or shared memory, which costs more than plain TCP",
        'Give the pod one, by the device plugin\'s resource; or take "transport": "tcp".',
    )


def judge_locked(limit_bytes: int, staging_bytes: int, *, exempt: bool) -> Finding:
    """Judge whether a pod may lock the memory that an RDMA device is to read.

    Args:
        limit_bytes: Most locked bytes of a process; negative for no limit.
        staging_bytes: What NIXL is to register, for each role that this pod has.
        exempt: Whether the limit does not hold for this process.
    """
    check = "locked memory"
    if limit_bytes < 0 or exempt:
        return ok(check, "no limit")
    text = f"at most {limit_bytes} bytes, with staging_bytes {staging_bytes}"
    if limit_bytes >= 2 * staging_bytes:
        return ok(check, text)
    # what UCX registers of its own comes on top, and a pod in both roles has two of them
    found = fail if limit_bytes < staging_bytes else warn
    return found(
        check,
        text,
        "Add the capability IPC_LOCK to the container, or raise its runtime's limit (ulimit -l).",
    )


def may_lock(status: str) -> bool:
    """Tell from ``/proc/self/status`` whether a process may lock as much memory as it likes."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> _IPC_LOCK & 1)


def judge_read(code: int | None, output: str, env: Mapping[str, str]) -> Finding:
    """Judge how the probe ended.

    Args:
        code: Its exit code, negative by a signal; None if it did not end.
        output: What it, NIXL and UCX wrote.
        env: The environment, to name what steers UCX.
    """
    check = "nixl read"
    if code == 0:
        return ok(check, "a piece came from one agent to another")
    complaints = list(dict.fromkeys(_COMPLAINT.findall(output)))
    last = (output.strip().splitlines() or ["nothing was said"])[-1]
    if code is None:
        last = "it did not end"
    elif code < 0:
        last = f"signal {-code} ended it"
    given = " and ".join(f"{key}={env[key]}" for key in _STEERING if env.get(key))
    if given:
        advice = f"Correct or unset {given}: it must leave a network that leads to the other pods."
    else:
        advice = "UCX_LOG_LEVEL=info tells what UCX looks for; name networks in UCX_NET_DEVICES."
    return fail(check, "; ".join([last, *complaints]), advice)
