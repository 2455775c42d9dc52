"""The bundles of a pod: what is fetched, what is kept, and what is not believed."""

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kv_loopback import ENGINE, LAYOUT
from kvserve_api.errors import ArtifactError, UnavailableError, UnsupportedError
from kvserve_connector.bundles import MAX_HELD, BundleBook, wanted_by
from kvserve_strategies.artifacts import Store, open_store
from kvserve_strategies.bundle import BasisKey, Bundle
from random_bundles import joint_strategy, write_sample
from tables import candidate, table

KEYS = frozenset({BasisKey("centred", "kv", 3, 0)})
NEVER = threading.Event()
Put = Callable[[int], Bundle]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep fetched bundles apart from those of other tests."""
    monkeypatch.setenv("KVSERVE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return open_store((tmp_path / "store").as_uri())


@pytest.fixture
def put(store: Store, tmp_path: Path) -> Put:
    """Put a bundle of the loopback's model into the store."""

    def make(seed: int) -> Bundle:
        bundle = write_sample(tmp_path / str(seed), LAYOUT, ENGINE.fingerprint, seed=seed)
        store.put_bundle(tmp_path / str(seed))
        return bundle

    return make


def book(store: Store | None, patience_s: float = 20.0) -> BundleBook:
    """Return the book of the loopback's model."""
    return BundleBook(store, ENGINE.fingerprint, LAYOUT, patience_s=patience_s)


def test_a_table_wants_what_its_candidates_need() -> None:
    """Bases of all candidates of one bundle come together; what needs no bundle wants none, whatever it names."""
    first, second = "sha256:" + "1" * 64, "sha256:" + "2" * 64
    candidates = {
        "none": candidate("none"),
        "lossless": candidate("lossless", bundle=first),
        "int8-token": candidate("int8-token", strategy=joint_strategy(3), bundle=second),
        "int4-token": candidate("int4-token", strategy=joint_strategy(2), bundle=second),
    }
    wanted = wanted_by(table(*candidates, candidates=candidates))
    assert wanted == {second: KEYS | {BasisKey("centred", "kv", 2, 0)}}


def test_what_is_fetched_stays_one_object(store: Store, put: Put) -> None:
    """A second table of the same bundle gets the same object, so that what was built with it is found again."""
    digest = put(1).digest
    shelf = book(store)
    first = shelf.obtain({digest: KEYS}, NEVER)[digest]
    assert shelf.obtain({digest: KEYS}, NEVER)[digest] is first
    assert first.digest == digest
    assert shelf.find(digest) is None
    shelf.keep({digest: first})
    assert shelf.find(digest) is first
    assert shelf.obtain({digest: KEYS}, NEVER)[digest] is first


def test_the_last_bundles_are_kept(store: Store, put: Put) -> None:
    """Those in force and the last before them can be decoded with, older ones can't."""
    shelf = book(store)
    bundles = [put(seed) for seed in range(MAX_HELD + 1)]
    for bundle in bundles:
        shelf.keep({bundle.digest: bundle})
    assert shelf.ready == {bundle.digest for bundle in bundles[1:]}
    shelf.keep({})
    assert shelf.ready == {bundle.digest for bundle in bundles[1:]}
    shelf.keep({bundles[1].digest: bundles[1]})
    shelf.keep({bundles[0].digest: bundles[0]})
    assert shelf.ready == {bundles[number].digest for number in (0, 1, 3, 4)}


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_damaged_bundle_is_refused(store: Store, put: Put, tmp_path: Path, damage: str) -> None:
    """A file that is missing or altered in the store is an error, and the next table looks again."""
    digest = put(1).digest
    folder = tmp_path / "store" / digest.removeprefix("sha256:")
    (file,) = folder.glob("basis-*")
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    shelf = book(store)
    with pytest.raises(ArtifactError):
        shelf.obtain({digest: KEYS}, NEVER)
    file.write_bytes(whole)
    assert shelf.obtain({digest: KEYS}, NEVER)[digest].digest == digest


def test_a_bundle_of_another_model_is_refused(store: Store, tmp_path: Path) -> None:
    """Fingerprint and form of the cache must be the served model's."""
    other = write_sample(tmp_path / "b", LAYOUT, "sha256:" + "7" * 64)
    store.put_bundle(tmp_path / "b")
    with pytest.raises(UnsupportedError, match="another model"):
        book(store).obtain({other.digest: KEYS}, NEVER)


def test_a_store_that_hangs_holds_nobody_back() -> None:
    """A server that accepts and never answers costs the table its patience, or less if nobody wants it any more."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        store = open_store(f"http://127.0.0.1:{server.getsockname()[1]}/")
        wanted = {"sha256:" + "1" * 64: KEYS}
        started_s = time.monotonic()
        with pytest.raises(UnavailableError, match="still being fetched"):
            book(store, patience_s=0.5).obtain(wanted, NEVER)
        abandoned = threading.Event()
        abandoned.set()
        with pytest.raises(UnavailableError):
            book(store).obtain(wanted, abandoned)
        assert time.monotonic() - started_s < 5
