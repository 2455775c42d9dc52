"""A producer in a process of its own, that can be frozen and killed: real cache, real TCP, no engine around it."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv_loopback import pair

LEASES = 8
TOKENS = 80
CHUNK_S = 0.2
BLOCKS = (3, 9, 5, 20, 11)


@dataclass
class ProducerProcess:
    """A producer that holds ``LEASES`` prefills of ``TOKENS`` tokens, named ``r0``, ``r1`` and so on."""

    process: "subprocess.Popen[str]"
    port: int

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)


@contextmanager
def producer_process() -> Iterator[ProducerProcess]:
    """Start one."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield ProducerProcess(process, int(process.stdout.readline()))
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    """Serve until the process is killed, or who started it has gone."""
    with pair(stall_s=30.0, timeout_s=60.0, lease_s=600.0) as both:
        read = both.source.read

        def read_slowly(*arguments: Any) -> Any:
            # a chunk after the other, so that there is a middle of a transfer
            time.sleep(CHUNK_S)
            return read(*arguments)

        both.source.read = read_slowly  # type: ignore[assignment,method-assign]
        for index in range(LEASES):
            both.lease(f"r{index}", TOKENS, BLOCKS)
        print(both.server.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
