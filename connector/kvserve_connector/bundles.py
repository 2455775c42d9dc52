"""The calibration bundles of this pod: fetched before a table that needs them is in force, found by digest after.

A bundle comes from the artifact store, never from a peer and never on a peer's word: what a blob names is looked up
among the bundles of the table in force and of the last ones before it, and nothing else is tried. Fetching happens in
threads of its own, which may hang for as long as a network volume does without holding anything else back.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Final, TypeAlias

from kvserve_api.errors import ArtifactError, SpecError, UnavailableError, UnsupportedError
from kvserve_api.table import DecisionTable
from kvserve_api.wire import KVLayout
from kvserve_connector.config import PATH, ConnectorConfig
from kvserve_connector.ready import Carries, carries_all
from kvserve_strategies import Pipeline
from kvserve_strategies.artifacts import Store, open_store
from kvserve_strategies.bundle import BasisKey, Bundle

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 20.0
"""How long a table waits for its bundles before it is refused for now; less than the controller waits for an answer.
What is being fetched goes on: the table comes again, and finds it."""
FIRST_BACKOFF_S: Final = 0.5
LAST_BACKOFF_S: Final = 5.0
MAX_HELD: Final = 4
"""Bundles kept in memory: those in force, then the last ones before them, for transfers that are still under way."""
_LOOK_S: Final = 0.05

Wanted: TypeAlias = Mapping[str, frozenset[BasisKey]]
"""For each bundle, by digest, the bases that are needed of it."""


def open_artifacts(config: ConnectorConfig) -> Store | None:
    """Return the store that a pod was told of; None if it was told of none.

    Raises:
        SpecError: The URL is one that no store has.
    """
    if config.artifacts is None:
        return None
    try:
        return open_store(config.artifacts)
    except SpecError as error:
        raise SpecError(f"{PATH}.artifacts", error.problem) from error


def wanted_by(table: DecisionTable, carries: Carries = carries_all) -> Wanted:
    """Return the bundles that a table's candidates need, and which bases of each.

    Args:
        table: The table.
        carries: Tells which candidates matter here.

    Raises:
        StrategyError: A strategy can't work here.
    """
    wanted: dict[str, frozenset[BasisKey]] = {}
    for candidate in table.candidates.values():
        pipeline = Pipeline.of(candidate.strategy)
        if candidate.bundle is not None and pipeline.calibrated and carries(pipeline):
            keys = pipeline.basis_keys
            wanted[candidate.bundle] = wanted.get(candidate.bundle, frozenset()).union(keys)
    return wanted


class BundleBook:
    """Fetches and holds bundles; safe from any thread.

    Args:
        store: Where they come from; None if this pod was told of no store.
        fingerprint: Of the model that this pod serves.
        layout: Of its cache; None if it is one that no bundle is of.
        patience_s: How long `obtain` tries.
        now_s: A clock that never goes back.
    """

    def __init__(
        self,
        store: Store | None,
        fingerprint: str,
        layout: KVLayout | None,
        *,
        patience_s: float = PATIENCE_S,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._layout = layout
        self._patience_s = patience_s
        self._now_s = now_s
        self._lock = threading.Lock()
        self._fetches: dict[str, tuple[frozenset[BasisKey], Future[Bundle]]] = {}
        # replaced whole, so that reading it takes no lock
        self._held: Mapping[str, Bundle] = {}
        self._ready: frozenset[str] = frozenset()

    @property
    def ready(self) -> frozenset[str]:
        """Digests of the bundles with which blobs can be decoded now."""
        return self._ready

    def find(self, digest: str) -> Bundle | None:
        """Return a bundle of the table in force or of the last ones before it; never fetches."""
        return self._held.get(digest)

    def keep(self, bundles: Mapping[str, Bundle]) -> None:
        """Take note of the bundles of the table that is coming into force; the oldest of the others go."""
        with self._lock:
            before = {k: v for k, v in self._held.items() if k not in bundles}
            spare = max(0, MAX_HELD - len(bundles))
            recent = dict(list(before.items())[-spare:]) if spare else {}
            self._held = recent | dict(bundles)
            self._ready = frozenset(self._held)
            done = [d for d, (_, future) in self._fetches.items() if future.done()]
            for digest in done:
                if digest not in self._held:
                    del self._fetches[digest]

    def obtain(self, wanted: Wanted, abandoned: threading.Event) -> dict[str, Bundle]:
        """Return the bundles of a table, waiting for what has to be fetched.

        Args:
            wanted: What the table needs.
            abandoned: Set when nobody wants the table any more.

        Raises:
            UnsupportedError: This pod knows no store, or a bundle is of another model.
            ArtifactError: A bundle is not in the store, or damaged.
            UnavailableError: The store does not answer, or not in time; the table may come again.
        """
        if wanted and self._store is None:
            raise UnsupportedError(
                f"calibration bundle {min(wanted)} is needed, and this pod was told of no artifact"
                " store: set artifacts in kv_connector_extra_config, or KVSERVE_ARTIFACTS"
            )
        deadline_s = self._now_s() + self._patience_s
        return {
            digest: self._checked(self._await(digest, keys, deadline_s, abandoned))
            for digest, keys in sorted(wanted.items())
        }

    def _await(
        self,
        digest: str,
        keys: frozenset[BasisKey],
        deadline_s: float,
        abandoned: threading.Event,
    ) -> Bundle:
        backoff_s = FIRST_BACKOFF_S
        while True:
            future = self._fetch(digest, keys)
            while not future.done():
                if self._now_s() > deadline_s or abandoned.wait(_LOOK_S):
                    raise UnavailableError(f"calibration bundle {digest} is still being fetched")
            try:
                return future.result()
            except UnavailableError as error:
                logger.info("calibration bundle %s can't be fetched now: %s", digest, error)
                self._forget(digest, future)
                if self._now_s() + backoff_s > deadline_s or abandoned.wait(backoff_s):
                    raise
                backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)
            except BaseException:
                self._forget(digest, future)
                raise

    def _fetch(self, digest: str, keys: frozenset[BasisKey]) -> Future[Bundle]:
        """Return the fetch of a bundle that is under way or done, or begin one.

        One bundle stays one object as long as no table needs more of it: what was built with it need not be built anew.
        """
        with self._lock:
            known, future = self._fetches.get(digest, (frozenset(), None))
            if future is None or not keys <= known:
                future = Future()
                self._fetches[digest] = (keys | known, future)
                # not of a pool: one that hangs must not keep the process from ending
                threading.Thread(
                    target=self._run,
                    args=(future, digest, keys | known),
                    name="kvserve-bundle",
                    daemon=True,
                ).start()
            return future

    def _run(self, future: Future[Bundle], digest: str, keys: frozenset[BasisKey]) -> None:
        assert self._store is not None
        try:
            future.set_result(self._store.get_bundle(digest, keys))
        except BaseException as error:
            future.set_exception(error)

    def _forget(self, digest: str, future: Future[Bundle]) -> None:
        with self._lock:
            if self._fetches.get(digest, (None, None))[1] is future:
                del self._fetches[digest]

    def _checked(self, bundle: Bundle) -> Bundle:
        """Refuse a bundle of another model; another dtype of the cache is none."""
        if bundle.model_fingerprint != self._fingerprint:
            raise UnsupportedError(
                f"calibration bundle {bundle.digest} is of another model:"
                f" {bundle.model_fingerprint}, served is {self._fingerprint}"
            )
        if self._layout is None:
            raise UnsupportedError(
                "this engine's KV cache is carried as whole blocks: no bundle is of it"
            )
        for name in ("layers", "kv_heads", "head_dim"):
            theirs, ours = getattr(bundle.layout, name), getattr(self._layout, name)
            if theirs != ours:
                raise ArtifactError(
                    f"bundle.layout.{name}",
                    f"is {theirs} in {bundle.digest}, but {ours} here: calibrate this model",
                )
        return bundle
