"""Real servers of KV stores: Redis from the system's packages, S3 built from its Go module; each started once."""

import functools
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import redis

from testcluster.build import Target, build_target, find_go, locked, say_to_stderr
from testcluster.paths import cache_dir
from testcluster.process import die_with_parent
from vllm_servers import free_port

S3_VERSION = "v1.2.0"
S3_TARGET = Target(
    name="gofakes3", module=f"github.com/johannesboyne/gofakes3/cmd/gofakes3@{S3_VERSION}"
)
BUCKET = "kv"
PASSWORD = "open sesame"
_START_S = 20.0
_started: list["subprocess.Popen[bytes]"] = []
"""They end with the tests."""


def start_redis(*options: str, password: str | None = None) -> int:
    """Start a Redis server that keeps nothing on disk; return its port."""
    port = free_port()
    if password is not None:
        options = (*options, "--requirepass", password)
    # Debian's redis-tools holds the server under another name: it looks at the name it is called by
    program = shutil.which("redis-server") or shutil.which("redis-check-rdb")
    assert program is not None, "install redis-tools"
    arguments = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", *options]
    process = subprocess.Popen(
        arguments, executable=program, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent
    )
    client = redis.Redis(port=port, password=password)
    _wait(process, lambda: _serving_pid(client) == process.pid)
    return port


@functools.cache
def redis_port() -> int:
    """Return the port of a Redis server with a thousand databases."""
    return start_redis("--databases", "1000")


@functools.cache
def s3_endpoint() -> str:
    """Return the URL of an S3 server with the bucket `BUCKET`."""
    port = free_port()
    process = subprocess.Popen(
        [
            _s3_program(),
            "-backend",
            "memory",
            "-initialbucket",
            BUCKET,
            "-host",
            f"127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    )
    endpoint = f"http://127.0.0.1:{port}"
    _wait(process, lambda: _serves(endpoint))
    return endpoint


def _s3_program() -> Path:
    folder = cache_dir() / f"gofakes3-{S3_VERSION}"
    program = folder / S3_TARGET.name
    with locked(
        cache_dir() / "s3.lock", lambda: say_to_stderr("another process builds S3: waiting")
    ):
        if not program.exists():
            work = folder.with_suffix(".partial")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            build_target(S3_TARGET, find_go(), work, say_to_stderr)
            shutil.rmtree(folder, ignore_errors=True)
            work.rename(folder)
    return program


def _wait(process: "subprocess.Popen[bytes]", ready: Callable[[], bool]) -> None:
    _started.append(process)
    deadline_s = time.monotonic() + _START_S
    while not ready():
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < deadline_s, "the server does not answer"
        time.sleep(0.02)


def _serving_pid(client: redis.Redis) -> int | None:
    """Return whose the answers are: another's server may have taken the port in between."""
    try:
        info: Any = client.info("server")
    except redis.RedisError:
        return None
    return int(info["process_id"])


def _serves(endpoint: str) -> bool:
    try:
        with urlopen(endpoint, timeout=1):
            return True
    except HTTPError:
        return True
    except (URLError, OSError):
        return False
