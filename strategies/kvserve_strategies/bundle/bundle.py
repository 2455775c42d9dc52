"""Reading a bundle: verified before use, bases only when they are asked for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvserve_api.canonical import digest_bytes
from kvserve_api.errors import ArtifactError
from kvserve_api.wire import KVLayout
from kvserve_strategies.bundle.basis import Basis, BasisKey, Group
from kvserve_strategies.bundle.contents import SIDES, Metric
from kvserve_strategies.bundle.files import CORE, basis_file
from kvserve_strategies.bundle.manifest import MANIFEST, MAX_MANIFEST_NBYTES, Manifest
from kvserve_strategies.bundle.rope import Rope
from kvserve_strategies.bundle.tensors import Form, sha256, unpack

Read: TypeAlias = Callable[[str, int], bytes]
"""Returns the file of a name, cut after so many bytes; raises FileNotFoundError if there is none."""


class Bundle:
    """A calibration bundle, or the part of one that a tensor-parallel rank needs; safe for many threads.

    Arrays are shared and read-only. Indices of heads are those of the rank.

    Attributes:
        digest: ``sha256:…`` of the manifest; a part has that of the whole.
        layout: Form of the cache, of the rank's heads only.
        heads: Which heads of the whole model these are.
    """

    def __init__(self, store: "_Store", heads: range) -> None:
        self._store = store
        self.digest = store.digest
        self.heads = heads
        whole = store.manifest.layout
        self.layout = KVLayout(
            layers=whole.layers, kv_heads=len(heads), head_dim=whole.head_dim, dtype=whole.dtype
        )

    @classmethod
    def open(cls, folder: Path, *, digest: str | None = None) -> Self:
        """Open the bundle in a folder.

        Args:
            folder: Holds the manifest and the files it lists; files of bases may be missing until they are asked for.
            digest: What the bundle must be; None for whatever is there.

        Raises:
            ArtifactError: There is no such bundle, or it is damaged.
        """

        def read(name: str, limit: int) -> bytes:
            with (folder / name).open("rb") as file:
                return file.read(limit)

        return cls.read(read, digest=digest)

    @classmethod
    def read(cls, read: Read, *, digest: str | None = None) -> Self:
        """Open a bundle whose files a function returns; see `open`."""
        store = _Store(read, digest)
        return cls(store, range(store.manifest.layout.kv_heads))

    @property
    def model_fingerprint(self) -> str:
        """Of the model it belongs to; see `kvserve_api.wire.model_fingerprint`."""
        return self._store.manifest.model_fingerprint

    @property
    def provenance(self) -> Mapping[str, Any]:
        """How it was made; for people."""
        return self._store.manifest.provenance

    @property
    def manifest(self) -> Manifest:
        """The manifest of the whole bundle."""
        return self._store.manifest

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return self._store.manifest.metrics

    @property
    def basis_keys(self) -> tuple[BasisKey, ...]:
        """The bases that these heads can use, sorted."""
        return tuple(key for key in sorted(self._store.manifest.bases) if self._fits(key))

    def rope_of(self, layer: int) -> Rope | None:
        """Return how a layer rotates its keys; None if it does not."""
        return self._store.manifest.ropes[layer]

    def mean(self, kind: str) -> NDArray[np.float32]:
        """Return the mean of each channel, keys without RoPE: ``[layers, kv_heads, head_dim]``."""
        return self._core(f"mean.{_side(kind)}")

    def deviation(self, kind: str) -> NDArray[np.float32]:
        """Return the deviation of each channel from its mean: ``[layers, kv_heads, head_dim]``."""
        return self._core(f"deviation.{_side(kind)}")

    def metric(self, name: str, kind: str) -> Metric:
        """Return a metric and its inverse, each ``[layers, kv_heads, head_dim, head_dim]``.

        Raises:
            ArtifactError: There is no such metric.
        """
        if name not in self.metrics:
            known = ", ".join(self.metrics) or "none"
            raise ArtifactError("metric", f"this bundle has no {name!r}; it has: {known}")
        side = _side(kind)
        return Metric(self._core(f"metric.{name}.{side}"), self._core(f"inverse.{name}.{side}"))

    def basis(self, key: BasisKey) -> Basis:
        """Return a basis; read, verified and kept on the first call.

        Raises:
            ArtifactError: There is none of this key for these heads, or its file is missing or damaged.
        """
        self._store.manifest.require(key)
        if not self._fits(key):
            usable = ", ".join(map(str, self.basis_keys)) or "none"
            raise ArtifactError(
                "basis",
                f"groups of {key} reach beyond heads {self.heads.start} to {self.heads.stop - 1} "
                f"of this tensor-parallel rank; usable: {usable}",
            )
        whole = self._store.basis(key)
        blocks = key.blocks(self._store.manifest.layout)
        ours = [index for index, block in enumerate(blocks) if block.heads.start in self.heads]
        return Basis(
            scale=whole.scale,
            groups=tuple(whole.groups[index] for index in ours),
            importance=tuple(whole.importance[index] for index in ours if whole.importance),
        )

    def of_heads(self, heads: range) -> Self:
        """Return the part of the bundle for some heads, as a tensor-parallel rank has them.

        Args:
            heads: Neighbouring heads of this bundle.

        Raises:
            ArtifactError: There are no such heads.
        """
        if heads.step != 1 or not 0 <= heads.start < heads.stop <= len(self.heads):
            raise ArtifactError("heads", f"must be in 0 to {len(self.heads) - 1}, got {heads}")
        return type(self)(self._store, self.heads[heads.start : heads.stop])

    def _core(self, name: str) -> NDArray[Any]:
        return self._store.core[name][:, self.heads.start : self.heads.stop]

    def _fits(self, key: BasisKey) -> bool:
        total = self._store.manifest.layout.kv_heads
        size = key.heads or total
        start, stop = self.heads.start, self.heads.stop
        return start % size == 0 and (stop % size == 0 or stop == total)


class _Store:
    """The files of a bundle, each read once."""

    def __init__(self, read: Read, digest: str | None) -> None:
        self._read = read
        self._lock = Lock()
        self._locks: dict[BasisKey, Lock] = {}
        self._bases: dict[BasisKey, Basis] = {}
        document = self._bytes(MANIFEST, MAX_MANIFEST_NBYTES + 1)
        self.digest = digest_bytes(document)
        if digest not in (None, self.digest):
            raise ArtifactError("digest", f"{digest} was asked for, this is {self.digest}")
        self.manifest = Manifest.parse(document)
        self.core = self._tensors(CORE, self.manifest.core_forms())

    def basis(self, key: BasisKey) -> Basis:
        with self._lock:
            lock = self._locks.setdefault(key, Lock())
        # two threads must not read the same hundreds of megabytes; other bases need not wait
        with lock:
            if key not in self._bases:
                self._bases[key] = self._load(key)
            return self._bases[key]

    def _load(self, key: BasisKey) -> Basis:
        entry = self.manifest.bases[key]
        tensors = self._tensors(basis_file(key), self.manifest.basis_forms(key))
        count = len(entry.components)
        return Basis(
            scale=entry.scale,
            groups=tuple(
                Group(tensors[f"rows.{index}"], tensors[f"sigma.{index}"]) for index in range(count)
            ),
            importance=tuple(
                tensors[f"importance.{index}"] for index in range(count if entry.features else 0)
            ),
        )

    def _tensors(self, name: str, forms: Mapping[str, Form]) -> dict[str, NDArray[Any]]:
        entry = self.manifest.files[name]
        data = self._bytes(name, entry.nbytes + 1)
        if len(data) != entry.nbytes:
            size = "more" if len(data) > entry.nbytes else len(data)
            raise ArtifactError(
                name, f"must have {entry.nbytes} bytes, has {size}: fetch the bundle anew"
            )
        if sha256(data) != entry.sha256:
            raise ArtifactError(name, "is not what the manifest lists: fetch the bundle anew")
        return unpack(name, data, forms)

    def _bytes(self, name: str, limit: int) -> bytes:
        try:
            return self._read(name, limit)
        except FileNotFoundError as error:
            raise ArtifactError(
                name, "is not here: fetch the bundle with this basis, or calibrate"
            ) from error
        except OSError as error:
            raise ArtifactError(name, f"can't be read: {error.strerror}") from error


def _side(kind: str) -> str:
    if kind not in SIDES:
        raise ArtifactError("kind", f"must be k or v, got {kind!r}")
    return str(kind)
