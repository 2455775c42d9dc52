"""Starting processes that end with their parent, and waiting for things with a deadline."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from testcluster.errors import ClusterError

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends.

    For ``preexec_fn``: the parent starts children from its only thread.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that they can be waited for."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def wait_for_children() -> None:
    """Wait until this process has no children, its own or adopted."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def system_env() -> dict[str, str]:
    """Return this process's environment with the folders of system programs on PATH."""
    return {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}


def run(*command: str, stdin: str | None = None) -> str:
    """Run a command and return what it prints.

    Raises:
        ClusterError: It failed; the message holds what it said.
    """
    try:
        done = subprocess.run(
            command,
            input=stdin,
            env=system_env(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"`{' '.join(command)}`: {error}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise ClusterError(f"`{' '.join(command)}` failed with {done.returncode}: {said}")
    return done.stdout


class Components:
    """The long-running programs of one instance, each with a log file.

    Attributes:
        log_dir: Folder of the logs: ``<name>.log``.
        pids: Process id of each by name.
    """

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self.pids: dict[str, int] = {}
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []

    def start(
        self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None
    ) -> None:
        """Start a program; it is killed when this process ends, however it ends."""
        with (self.log_dir / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self.pids[name] = process.pid
        self._processes.append((name, process))

    def wait(self, what: str, ready: Callable[[], bool], timeout_s: float) -> None:
        """Wait until something holds, as long as all programs run.

        Raises:
            ClusterError: A program ended, or the time is over; with the last lines of the logs.
        """
        deadline_s = time.monotonic() + timeout_s
        while not ready():
            for name, process in self._processes:
                if process.poll() is not None:
                    raise ClusterError(
                        f"{name} ended with {process.returncode} while waiting for {what}; its"
                        f" last lines:\n{tail(self.log_dir / f'{name}.log')}"
                    )
            if time.monotonic() > deadline_s:
                logs = "\n".join(
                    f"--- {name}\n{tail(self.log_dir / f'{name}.log', lines=5)}"
                    for name, _ in self._processes
                )
                raise ClusterError(f"{what}: not after {timeout_s:.0f} s; last lines:\n{logs}")
            time.sleep(0.05)


def tail(path: Path, lines: int = 15) -> str:
    """Return the last lines of a text file, or nothing if there is none."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
