"""The artifact store: whole bundles or none, whatever the store, the network and other processes do."""

import contextlib
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest

from bundles import KEYS, write_small_bundle
from kvserve_api.errors import (
    ArtifactError,
    KVServeError,
    SpecError,
    UnavailableError,
    UnsupportedError,
)
from kvserve_strategies.artifacts import Patience, Store, open_store
from kvserve_strategies.bundle import Bundle
from kvserve_strategies.bundle.manifest import MAX_MANIFEST_NBYTES

HASTY = Patience(connect_s=2, read_s=1, request_s=5, retries=1, retry_s=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle."""
    path = tmp_path_factory.mktemp("made") / "bundle"
    write_small_bundle(path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("KVSERVE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bundles"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store in a folder that does not exist yet."""
    return open_store((tmp_path / "store with space").as_uri())


def digest_of(folder: Path) -> str:
    """Return a bundle's digest."""
    return Bundle.open(folder).digest


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Server(http.server.ThreadingHTTPServer):
    """A web server for a folder, which can fail in many ways.

    Attributes:
        folder: What it serves.
        fail: How it fails; empty for not at all.
        asked: Paths that were asked for.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.fail = ""
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Reads and writes files, as a web server and as S3 with paths for buckets do."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _path(self) -> Path:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        return self.server.folder / path.lstrip("/")

    def _answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body if self.command != "HEAD" else b"")

    def do_GET(self) -> None:
        """Send a file."""
        path, fail = self._path(), self.server.fail
        if fail == "500":
            return self._answer(500)
        if fail == "403":
            return self._answer(403)
        if not path.is_file():
            return self._answer(404)
        data = path.read_bytes()
        headers = {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "ETag": '"1"'}
        if fail == "cut":
            self.close_connection = True
            return self._answer(
                200, data[: len(data) // 2], headers | {"Content-Length": str(len(data))}
            )
        if fail == "hang":
            time.sleep(2.5)
        if fail == "endless":
            headers = {"Content-Length": str(2**40), **headers}
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x" * 0x100000)
            self.close_connection = True
            return None
        return self._answer(200, data, headers)

    def do_HEAD(self) -> None:
        """Send what GET would, but for the file."""
        self.do_GET()

    def do_PUT(self) -> None:
        """Keep a file."""
        path = self._path()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(200, headers={"ETag": '"1"'})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A running web server."""
    (tmp_path / "web").mkdir()
    with Server(tmp_path / "web") as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def published(server: Server, folder: Path) -> str:
    """Copy a bundle to where a server reads, and return its digest."""
    digest = digest_of(folder)
    shutil.copytree(folder, server.folder / "kv" / digest[7:])
    return digest


def test_a_file_store_gives_back_what_was_put(store: Store, folder: Path, cache: Path) -> None:
    """Every file, in the cache, under the digest."""
    digest = store.put_bundle(folder)
    assert digest == digest_of(folder)
    bundle = store.get_bundle(digest)
    assert bundle.digest == digest
    assert files_of(cache / digest[7:]) == files_of(folder)
    for key in KEYS:
        assert bundle.basis(key).scale == Bundle.open(folder).basis(key).scale


def test_a_memory_store_gives_back_what_was_put(folder: Path, cache: Path) -> None:
    """Within one object."""
    memory = open_store("memory:///")
    digest = memory.put_bundle(folder)
    memory.get_bundle(digest)
    assert files_of(cache / digest[7:]) == files_of(folder)
    with pytest.raises(ArtifactError, match="there is no bundle"):
        open_store("memory:///").get_bundle("sha256:" + "0" * 64)


def test_a_web_server_is_a_store_to_read_from(server: Server, folder: Path, cache: Path) -> None:
    """Putting is refused, getting works below any path."""
    digest = published(server, folder)
    web = open_store(f"{server.url}/kv")
    web.get_bundle(digest)
    assert files_of(cache / digest[7:]) == files_of(folder)
    with pytest.raises(UnsupportedError, match="read-only"):
        web.put_bundle(folder)


def test_an_s3_store_gives_back_what_was_put(
    server: Server, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Endpoint and credentials come from the usual variables; the manifest is written last."""
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "a secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = open_store("s3://bucket/some/prefix")
    digest = bucket.put_bundle(folder)
    assert files_of(server.folder / "bucket/some/prefix" / digest[7:]) == files_of(folder)
    puts = [path for path in server.asked if path.startswith("PUT")]
    assert puts[-1].endswith("/manifest.json")
    bucket.get_bundle(digest)
    assert files_of(cache / digest[7:]) == files_of(folder)


def test_putting_twice_writes_once(server: Server, store: Store, folder: Path) -> None:
    """A bundle that is there is left alone."""
    digest = store.put_bundle(folder)
    files = {
        path: path.stat().st_mtime_ns for path in Path(store_path(store)).rglob("*.safetensors")
    }
    assert store.put_bundle(folder) == digest
    assert {path: path.stat().st_mtime_ns for path in files} == files


def store_path(store: Store) -> Path:
    """Return the folder of a file store."""
    return Path(urllib.parse.unquote(urllib.parse.urlsplit(store.url).path))


def test_a_bundle_that_was_put_half_is_not_there(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is put again; nothing of the first attempt gets in the way."""
    real = obstore.put
    done: list[str] = []

    def dies_after_three(*args: Any) -> Any:
        if len(done) == 3:
            raise OSError("killed")
        done.append(args[1])
        return real(*args)

    monkeypatch.setattr(obstore, "put", dies_after_three)
    with pytest.raises(UnavailableError, match="killed"):
        store.put_bundle(folder)
    digest = digest_of(folder)
    with pytest.raises(ArtifactError, match="there is no bundle"):
        store.get_bundle(digest)
    monkeypatch.undo()
    (store_path(store) / done[0]).write_bytes(b"half")
    store.put_bundle(folder)
    assert files_of(store_path(store) / digest[7:]) == files_of(folder)


def test_putting_again_mends_what_is_missing(store: Store, folder: Path, cache: Path) -> None:
    """A file that was lost, or cut, in the store."""
    digest = store.put_bundle(folder)
    inside = store_path(store) / digest[7:]
    (inside / "core.safetensors").unlink()
    (inside / f"basis-{KEYS[0]}.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match=r"is missing in file:.* put the bundle anew"):
        store.get_bundle(digest)
    store.put_bundle(folder)
    assert files_of(inside) == files_of(folder)


def test_a_damaged_bundle_is_not_put(store: Store, folder: Path, tmp_path: Path) -> None:
    """Nobody else has to find out."""
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    path = damaged / f"basis-{KEYS[0]}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="missing or damaged"):
        store.put_bundle(damaged)
    with pytest.raises(ArtifactError, match=r"manifest\.json: is not here"):
        store.put_bundle(tmp_path / "nowhere")


def test_only_the_needed_bases_are_fetched(server: Server, folder: Path, cache: Path) -> None:
    """Others come when they are needed, and nothing comes twice."""
    digest = published(server, folder)
    web = open_store(f"{server.url}/kv")
    first, second, third = KEYS[:3]
    bundle = web.get_bundle(digest, [first])
    base = f"GET /kv/{digest[7:]}"
    expected = ["manifest.json", "core.safetensors", f"basis-{first}.safetensors"]
    assert server.asked == [f"{base}/{name}" for name in expected]
    assert bundle.basis(first).scale > 0
    with pytest.raises(ArtifactError, match="is not here: fetch the bundle with this basis"):
        bundle.basis(third)
    server.asked.clear()
    web.get_bundle(digest, [first, second])
    assert server.asked == [f"{base}/basis-{second}.safetensors"]
    server.asked.clear()
    web.get_bundle(digest, [])
    assert server.asked == []
    with pytest.raises(ArtifactError, match="this bundle has no"):
        web.get_bundle(digest, [type(first)("even", "k", 4, 1)])


@pytest.mark.parametrize(
    "name", ["manifest.json", "core.safetensors", f"basis-{KEYS[0]}.safetensors"]
)
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_cache_is_mended(
    store: Store, folder: Path, cache: Path, name: str, damage: str
) -> None:
    """What is damaged is fetched anew."""
    digest = store.put_bundle(folder)
    store.get_bundle(digest)
    path = cache / digest[7:] / name
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage != "gone":
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flipped" else data[:-3])
    store.get_bundle(digest).basis(KEYS[0])
    assert files_of(cache / digest[7:]) == files_of(folder)


@pytest.mark.parametrize(
    "name", ["manifest.json", "core.safetensors", f"basis-{KEYS[0]}.safetensors"]
)
def test_a_store_that_holds_something_else_is_not_believed(
    store: Store, folder: Path, cache: Path, name: str
) -> None:
    """Another content, more or less of it: nothing of it gets into the cache."""
    digest = store.put_bundle(folder)
    path = store_path(store) / digest[7:] / name
    data = path.read_bytes()
    for wrong in (b"", data[:-1], data + b"\0", data[:-1] + bytes([data[-1] ^ 1])):
        path.write_bytes(wrong)
        with pytest.raises(ArtifactError):
            store.get_bundle(digest)
        assert name not in files_of(cache / digest[7:])
    path.unlink()
    with pytest.raises(ArtifactError, match=r"there is no bundle|is missing in file:"):
        store.get_bundle(digest)


def test_a_bundle_that_is_nowhere_leaves_nothing_behind(
    store: Store, folder: Path, cache: Path
) -> None:
    """Digests come from tables: asking for any number of them must not fill the disk."""
    store.put_bundle(folder)
    with pytest.raises(ArtifactError, match="there is no bundle"):
        store.get_bundle("sha256:" + "7" * 64)
    assert not cache.exists()


def test_an_endless_answer_is_cut_off(server: Server, folder: Path, cache: Path) -> None:
    """After what a manifest may have, whatever length the server states."""
    digest = published(server, folder)
    server.fail = "endless"
    with pytest.raises(ArtifactError, match=f"has more than {MAX_MANIFEST_NBYTES} bytes"):
        open_store(f"{server.url}/kv", HASTY).get_bundle(digest)
    assert files_of(cache / digest[7:]) == {}


@pytest.mark.parametrize("fail", ["500", "hang", "cut"])
def test_a_server_that_fails_is_worth_a_retry(server: Server, folder: Path, fail: str) -> None:
    """Once it works, so does getting."""
    digest = published(server, folder)
    web = open_store(f"{server.url}/kv", HASTY)
    server.fail = fail
    with pytest.raises(UnavailableError, match=r"artifact store http.* does not answer") as caught:
        web.get_bundle(digest)
    assert "\n" not in str(caught.value)
    server.fail = ""
    web.get_bundle(digest)


def test_a_server_that_is_not_there_is_worth_a_retry() -> None:
    """Nothing listens on the port."""
    with pytest.raises(UnavailableError, match="does not answer"):
        open_store("http://127.0.0.1:9/kv", HASTY).get_bundle("sha256:" + "1" * 64)


def test_a_volume_that_is_not_mounted_is_worth_a_retry(store: Store, folder: Path) -> None:
    """The same object finds it once it is."""
    digest = digest_of(folder)
    with pytest.raises(UnavailableError, match="does not answer"):
        store.get_bundle(digest)
    shutil.copytree(folder, store_path(store) / digest[7:])
    store.get_bundle(digest)


def test_a_refusal_is_a_mistake_of_ours(server: Server, folder: Path) -> None:
    """No retry helps against missing credentials."""
    digest = published(server, folder)
    server.fail = "403"
    with pytest.raises(SpecError, match="check its credentials"):
        open_store(f"{server.url}/kv", HASTY).get_bundle(digest)


@pytest.mark.parametrize("root", ["/proc/nowhere", "relative", "file"])
def test_a_cache_that_can_not_be_written_is_no_obstacle(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    """The bundle is kept in memory, with the bases that were asked for."""
    digest = store.put_bundle(folder)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KVSERVE_CACHE_DIR", str(tmp_path / "file") if root == "file" else root)
    bundle = store.get_bundle(digest, [KEYS[1]])
    shutil.rmtree(store_path(store))
    assert bundle.digest == digest
    assert bundle.basis(KEYS[1]).scale == Bundle.open(folder).basis(KEYS[1]).scale


def test_what_killed_processes_left_is_removed(store: Store, folder: Path, cache: Path) -> None:
    """But not what another process may be writing now."""
    digest = store.put_bundle(folder)
    store.get_bundle(digest, [])
    old, new = (cache / digest[7:] / f".part-{age}" for age in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half a file")
    os.utime(old, (1, 1))
    store.get_bundle(digest, [])
    assert not old.exists()
    assert new.exists()


FETCH = """
import sys
from kvserve_strategies.artifacts import open_store

sys.stdin.readline()
bundle = open_store(sys.argv[1]).get_bundle(sys.argv[2])
print(sum(bundle.basis(key).scale for key in bundle.basis_keys))
"""


@pytest.mark.slow
def test_many_processes_may_fetch_at_once(store: Store, folder: Path, cache: Path) -> None:
    """Each gets the bundle, and the cache is whole."""
    digest = store.put_bundle(folder)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FETCH, store.url, digest],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    bundle = Bundle.open(folder)
    expected = sum(bundle.basis(key).scale for key in bundle.basis_keys)
    assert [float(output) for output in outputs] == [expected] * 4
    assert files_of(cache / digest[7:]) == files_of(folder)


def test_many_threads_may_fetch_at_once(store: Store, folder: Path, cache: Path) -> None:
    """With one store object."""
    digest = store.put_bundle(folder)
    errors: list[BaseException] = []

    def fetch() -> None:
        try:
            store.get_bundle(digest).basis(KEYS[0])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert files_of(cache / digest[7:]) == files_of(folder)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "must begin with one of file://"),
        ("ftp://host/x", "must begin with one of"),
        ("/a/folder", "must begin with one of"),
        ("file://host/x", "must be file:///folder"),
        ("file:relative", "must be file:///folder"),
        ("s3:///key", "names no bucket"),
        ("http://", "names no bucket or host"),
        ("https://someone:secret@host/x", "credentials belong into the environment"),
        ("s3://bucket/x?key=1", "must be a plain URL"),
        ("http://[::1", "is no URL"),
    ],
)
def test_urls_that_are_no_store(url: str, problem: str) -> None:
    """The error says what would be right, and never repeats a password."""
    with pytest.raises(SpecError, match=problem) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "../../etc", "sha256:" + "A" * 64, "sha256:" + "0" * 63 + "/"]
)
def test_what_is_no_digest(store: Store, digest: str) -> None:
    """It becomes a path, so nothing else may pass."""
    with pytest.raises(SpecError, match="64 hex digits"):
        store.get_bundle(digest)


def test_errors_are_of_ours(store: Store, folder: Path) -> None:
    """A file where a folder should be is no crash."""
    store_path(store).parent.mkdir(exist_ok=True)
    store_path(store).write_text("a file")
    calls: list[Callable[[], object]] = [
        lambda: store.put_bundle(folder),
        lambda: store.get_bundle(digest_of(folder)),
    ]
    for call in calls:
        with pytest.raises(KVServeError):
            call()


def test_digests_are_of_bytes(folder: Path) -> None:
    """The name of a bundle in a store is the SHA-256 of its manifest."""
    data = (folder / "manifest.json").read_bytes()
    assert digest_of(folder) == "sha256:" + hashlib.sha256(data).hexdigest()
