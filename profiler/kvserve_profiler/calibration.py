"""The calibration of a run: a bundle that was made for it before is found again, else it is made, and stored at once.

It is stored before anything is measured with it, so that a pod that takes over from a killed one finds it by the digest
in the trial log, and so that whoever reads the finished set finds the bundles it names.
"""

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from kvserve_api.errors import ArtifactError, UnavailableError, UnsupportedError
from kvserve_api.names import ENV_ARTIFACTS, ENV_CALIBRATION_TOKENS
from kvserve_profiler.model import Source
from kvserve_profiler.task import BUNDLE_KEY, Task
from kvserve_profiler.trials import basis_of
from kvserve_strategies import Pipeline
from kvserve_strategies.artifacts import Store
from kvserve_strategies.bundle import BasisKey, Bundle
from kvserve_strategies.calibration.cli import DEFAULT_TOKENS

if TYPE_CHECKING:
    from kvserve_strategies.calibration.run import Order

Tell: TypeAlias = Callable[[str], None]
"""Takes what is being done, for people."""
TELL_EVERY_S: Final = 5.0
LEFT_OUT: Final = "profiling.space leaves out what needs a calibration"
FILES: Final = ("*.json", "*.safetensors", "*.model", "*.txt")
"""What of a model on the hub is loaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """How the tasks of a run get their calibration.

    Attributes:
        store: Where bundles are kept; None to measure only strategies that need none.
        tokens: How many tokens to read; None for as many as the recipe takes, 0 to calibrate nothing.
    """

    store: Store | None
    tokens: int | None = None

    def plan(self, task: Task) -> Task:
        """Return the task with what its bundle will be made with, or without the strategies that need one."""
        keys = _keys(task)
        if not any(candidate.calibrated for candidate in task.space):
            return task if task.inputs.space.whole else task.without_bundle(LEFT_OUT)
        if self.store is None:
            return task.without_bundle(f"there is no artifact store, {ENV_ARTIFACTS} is empty")
        if self.tokens == 0:
            return task.without_bundle(f"{ENV_CALIBRATION_TOKENS} is 0")
        return task.calibrated_by(
            {
                "tokens": self.tokens or DEFAULT_TOKENS,
                "bases": list(map(str, keys)),
                "seed": task.settings.seed,
            }
        )

    def make(self, task: Task, earlier: str, tell: Tell) -> Task:
        """Return a planned task with its bundle.

        Args:
            task: The task, from `plan`.
            earlier: The trial log of an earlier, killed run of it; empty for none.
            tell: Takes the progress.

        Raises:
            SpecError: The store refuses us, or the model can't be loaded.
            UnavailableError: The store, or the hub, does not answer.
        """
        if not task.calibration or self.store is None:
            return task
        try:
            order = _order(task)
            bundle = self._find(self.store, order, basis_of(earlier).get(BUNDLE_KEY))
            if bundle is None:
                digest = _make(order, self.store, tell)
                bundle = self.store.get_bundle(digest, order.keys)
        except UnsupportedError as error:
            return task.without_bundle(str(error))
        return task.with_bundle(bundle)

    @staticmethod
    def _find(store: Store, order: "Order", digest: object) -> Bundle | None:
        """Return the bundle of a digest if it is what the order would make."""
        if not isinstance(digest, str):
            return None
        try:
            bundle = store.get_bundle(digest, order.keys)
        except ArtifactError:
            # taken away or damaged since: it is made again
            return None
        from kvserve_strategies.calibration.run import provenance_of

        made_alike = provenance_of(order).items() <= bundle.provenance.items()
        return bundle if made_alike else None


def _keys(task: Task) -> tuple[BasisKey, ...]:
    """Return the bases that the task's strategies need, sorted."""
    needed = {
        key
        for candidate in task.space
        if candidate.calibrated
        for key in Pipeline.of(candidate.strategy).basis_keys
    }
    return tuple(sorted(needed))


def _order(task: Task) -> "Order":
    # transformers takes seconds to import: what calibrates nothing does without
    from kvserve_strategies.calibration.run import Order

    return Order(
        model=_folder(task.source),
        tokens=task.calibration["tokens"],
        keys=_keys(task),
        seed=task.settings.seed,
        threads=task.settings.threads,
    )


def _make(order: "Order", store: Store, tell: Tell) -> str:
    """Calibrate the model, store the bundle and return its digest."""
    from kvserve_strategies.calibration.run import calibrate_model

    tell("calibrating")
    with tempfile.TemporaryDirectory(prefix="kvserve-calibration-") as scratch:
        folder = Path(scratch) / "bundle"
        digest = calibrate_model(order, folder, _Teller(tell)).digest
        store.put_bundle(folder)
    # the model goes before the bench loads its own
    gc.collect()
    return digest


class _Teller:
    """Tells the stages of a calibration, and now and then how far it is."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._stage = ""
        self._told_s = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if stage == self._stage and now_s < self._told_s + TELL_EVERY_S:
            return
        self._stage, self._told_s = stage, now_s
        self._tell(f"calibrating: {stage}" + (f" {done}/{total}" if total > 1 else ""))


def _folder(source: Source) -> Path:
    """Return the folder of a model, fetched from the hub if need be.

    Raises:
        UnavailableError: The hub does not answer.
    """
    folder = Path(source.location)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            source.location, revision=source.revision or None, allow_patterns=list(FILES)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UnavailableError(f"can't fetch {source.location} from the hub: {error}") from error
    return Path(found)
