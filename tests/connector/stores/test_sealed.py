"""Values are taken under the key only that they were put under."""

from pathlib import Path

import pytest

from kvserve_api.errors import WireError, WireReason
from kvserve_connector.stores.sealed import SEAL_BYTES, SealedStore
from kvserve_connector.stores.store import Store
from store_kinds import KINDS, Clock

SOON = 5.0
OLD, NEW, OTHER = b"o" * 32, b"n" * 100, b"x" * 32


@pytest.fixture
def inner(tmp_path: Path) -> Store:
    """A folder."""
    return KINDS["folder"](tmp_path, Clock())


def get(store: SealedStore, key: str, max_bytes: int = 5) -> bytearray | None:
    """Read a value."""
    return store.get(key, max_bytes=max_bytes, timeout_s=SOON)


@pytest.mark.parametrize("secrets", [(), (OLD,), (NEW, OLD)], ids=len)
def test_values_come_back(secrets: tuple[bytes, ...], inner: Store) -> None:
    """A value comes back as it was put, empty ones and those of the largest size too."""
    store = SealedStore(inner, lambda: secrets)
    for key, value in (("a", b"value"), ("b", b"")):
        store.put(key, memoryview(value), timeout_s=SOON)
        assert get(store, key) == bytearray(value)
    assert store.exists(["a", "b", "c"], timeout_s=SOON) == {"a", "b"}
    store.delete("a", timeout_s=SOON)
    assert get(store, "a") is None


def test_a_secret_is_changed_in_two_steps(inner: Store) -> None:
    """What was sealed with an old secret is taken as long as that is accepted."""
    SealedStore(inner, lambda: [OLD]).put("a", b"value", timeout_s=SOON)
    assert get(SealedStore(inner, lambda: [NEW, OLD]), "a") == bytearray(b"value")
    with pytest.raises(WireError):
        get(SealedStore(inner, lambda: [NEW]), "a")


@pytest.mark.parametrize("secrets", [(), (OLD,)], ids=["open", "secret"])
@pytest.mark.parametrize("harm", ["swapped", "flipped", "cut", "short", "foreign"])
def test_wrong_values_are_not_taken(harm: str, secrets: tuple[bytes, ...], inner: Store) -> None:
    """Another key's value, a damaged one, and one that was sealed with another secret have a typed end."""
    store = SealedStore(inner, lambda: secrets)
    store.put("a", b"value", timeout_s=SOON)
    whole = inner.get("a", max_bytes=99, timeout_s=SOON)
    assert whole is not None
    assert len(whole) == 5 + SEAL_BYTES
    harmed: dict[str, bytes | bytearray] = {
        "swapped": whole,
        "flipped": bytes([whole[0] ^ 1, *whole[1:]]),
        "cut": whole[:-1],
        "short": whole[:3],
    }
    if harm == "foreign":
        SealedStore(inner, lambda: [OTHER]).put("b", b"value", timeout_s=SOON)
    else:
        inner.put("b", harmed[harm], timeout_s=SOON)
    with pytest.raises(WireError) as caught:
        get(store, "b")
    assert caught.value.reason == WireReason.CHECKSUM_MISMATCH
    assert get(store, "a") == bytearray(b"value")


def test_too_much_is_not_read(inner: Store) -> None:
    """The bound is that of the value, without its seal."""
    store = SealedStore(inner)
    store.put("a", b"value", timeout_s=SOON)
    with pytest.raises(WireError) as caught:
        get(store, "a", max_bytes=4)
    assert caught.value.reason == WireReason.TOO_LARGE
