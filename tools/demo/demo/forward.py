"""`kubectl port-forward` as a context manager: works on any cluster, needs no address of a node."""

import contextlib
import re
import subprocess
import threading
from collections.abc import Iterator

from testcluster.cluster import Cluster

_READY = re.compile(r"Forwarding from 127\.0\.0\.1:(\d+)")


@contextlib.contextmanager
def forward(cluster: Cluster, target: str, port: int, *, namespace: str) -> Iterator[str]:
    """Forward a free local port to a port of a pod, Deployment or Service.

    Args:
        cluster: Where it is.
        target: Like ``service/chat-router``.
        port: The port there.
        namespace: The target's namespace.

    Yields:
        The base URL, like ``http://127.0.0.1:41234``.

    Raises:
        RuntimeError: kubectl ended before it was ready.
    """
    command = ["kubectl", "port-forward", "-n", namespace, target, f":{port}"]
    process = subprocess.Popen(
        command, env=cluster.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    # kubectl stops when nobody reads what it prints for each connection
    reader = threading.Thread(target=process.stdout.read, daemon=True)
    try:
        line = process.stdout.readline()
        match = _READY.search(line)
        if match is None:
            raise RuntimeError(f"kubectl port-forward {target} failed: {line.strip()}")
        reader.start()
        yield f"http://127.0.0.1:{match[1]}"
    finally:
        process.terminate()
        process.wait(timeout=10)
        if reader.ident is not None:
            reader.join()
        process.stdout.close()
