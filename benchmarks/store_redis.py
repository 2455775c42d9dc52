"""The Redis that `store_bench` starts."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from pd_links import End
from pd_servers import ServerError
from testcluster.process import die_with_parent

PORT: Final = 6399


class RedisServer:
    """A Redis that keeps nothing on disk, on every address of this side."""

    def __init__(self) -> None:
        # Debian's redis-tools holds the server under another name: it looks at the name it is called by
        program = shutil.which("redis-server") or shutil.which("redis-check-rdb")
        if program is None:
            raise ServerError("no Redis here: install redis-tools or redis-server")
        self.process = subprocess.Popen(
            ["redis-server", "--port", str(PORT), "--save", "", "--protected-mode", "no"],
            executable=program,
            stdout=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )

    def stop(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


@contextmanager
def served(url: str | None) -> Iterator[Callable[[End], str]]:
    """Yield what tells each end the store's URL: of a Redis of our own, unless there is another."""
    if url is not None:
        yield lambda _: url
        return
    server = RedisServer()
    try:
        yield lambda end: f"redis://{end.here}:{PORT}/0"
    finally:
        server.stop()
