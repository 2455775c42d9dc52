"""One calibration from beginning to end: a model's folder and texts in, a bundle out."""

import importlib.metadata
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from kvserve_api.errors import SpecError
from kvserve_api.wire import model_fingerprint
from kvserve_strategies.bundle import BasisKey, Bundle, write_bundle
from kvserve_strategies.bundle.manifest import Manifest
from kvserve_strategies.bundle.writer import require_free
from kvserve_strategies.calibration.models import TransformersModel, check_cache, read_config
from kvserve_strategies.calibration.recipe import RECIPE, calibrate
from kvserve_strategies.calibration.settings import DEFAULT_KEYS, FISHER, Settings
from kvserve_strategies.calibration.texts import Text, builtin_texts, choose_windows
from kvserve_strategies.calibration.weights import weights_digest
from kvserve_strategies.calibration.windows import Report

DEFAULT_TOKENS: Final = 32_768
SPACE: Final = FISHER
"""Where bases are made that are named by their width only."""
_TOOLS: Final = ("kvserve", "torch", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What to calibrate, and how.

    Attributes:
        model: Folder of the model.
        texts: What to read; each has the same weight.
        tokens: How much to read, at most.
        keys: The bases to make. One that is wider than the model spans all of it.
        seed: Of everything random.
        threads: Threads of torch; more or less of them add up in another order.
    """

    model: Path
    texts: tuple[Text, ...] = field(default_factory=builtin_texts)
    tokens: int = DEFAULT_TOKENS
    keys: tuple[BasisKey, ...] = DEFAULT_KEYS
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        for name, minimum in (("tokens", 64), ("seed", 0), ("threads", 1)):
            if getattr(self, name) < minimum:
                raise SpecError(name, f"must be at least {minimum}, got {getattr(self, name)}")
        if not self.texts:
            raise SpecError("texts", "must be at least one")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of an order.

    Attributes:
        digest: Of the bundle.
        manifest: Its manifest.
        notes: What is not as usual, for people.
        seconds: How long it took.
    """

    digest: str
    manifest: Manifest
    notes: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return it as an object."""
        return {
            "digest": self.digest,
            "nbytes": self.manifest.nbytes,
            "files": {name: entry.nbytes for name, entry in sorted(self.manifest.files.items())},
            "bases": {str(k): list(e.components) for k, e in sorted(self.manifest.bases.items())},
            "provenance": dict(self.manifest.provenance),
            "seconds": round(self.seconds, 1),
        }


def calibrate_model(order: Order, out: Path, report: Report = lambda *_: None) -> Outcome:
    """Calibrate a model and write the bundle.

    Args:
        order: What to do.
        out: Folder of the bundle; new or empty.
        report: Is told how far it is.

    Raises:
        SpecError: An input is wrong, or the folder is in use.
        UnsupportedError: The model can't be calibrated.
    """
    start_s = time.monotonic()
    require_free(out)
    torch.set_num_threads(order.threads)
    report("loading the model", 0, 1)
    model = TransformersModel(order.model)
    settings = _settings(order, model.config)
    report("loading the model", 1, 1)
    report("reading the text", 0, 1)
    windows = choose_windows(
        order.texts,
        model.tokenise,
        window_tokens=settings.window_tokens,
        count=-(-order.tokens // settings.window_tokens),
        lead=model.lead,
        seed=order.seed,
    )
    report("reading the text", 1, 1)
    contents = calibrate(model, windows, settings, report)
    tokens, notes = sum(map(len, windows)), list(model.notes)
    if tokens < order.tokens:
        notes.append(f"the text has {tokens} of the {order.tokens} tokens that were to be read")
    provenance = provenance_of(order) | {"read_tokens": tokens, "notes": notes}
    report("writing the bundle", 0, 1)
    digest = write_bundle(out, replace(contents, provenance=provenance))
    report("writing the bundle", 1, 1)
    return Outcome(
        digest=digest,
        manifest=Bundle.open(out).manifest,
        notes=tuple(notes),
        seconds=time.monotonic() - start_s,
    )


def provenance_of(order: Order) -> dict[str, Any]:
    """Return what a bundle's provenance would say of an order, without loading weights; more is added by the work.

    Raises:
        SpecError: There is no model.
        UnsupportedError: The model can't be calibrated.
    """
    config = read_config(order.model)
    check_cache(config)
    return {
        "recipe": RECIPE,
        "settings": _settings(order, config).to_json(),
        "model": {
            "type": str(config.model_type),
            "fingerprint": model_fingerprint(config.to_dict()),
            "weights": weights_digest(order.model),
        },
        "texts": [text.digest for text in order.texts],
        "tokens": order.tokens,
        "seed": order.seed,
        "threads": order.threads,
        "tools": {name: importlib.metadata.version(name) for name in _TOOLS},
        "machine": platform.machine(),
    }


def parse_widths(text: str) -> tuple[BasisKey, ...]:
    """Return the bases of a list like ``1x1,3,query.k.1x0``.

    Raises:
        SpecError: It is no such list.
    """
    keys = []
    for item in text.split(","):
        word = item.strip()
        if "." not in word:
            word = f"{SPACE}.kv.{word}" + ("" if "x" in word else "x0")
        try:
            keys.append(BasisKey.parse(word))
        except SpecError as error:
            raise SpecError(
                "--widths", f"{item.strip()!r:.80} is none; a width is like 3, 1x1 or fisher.k.3x0"
            ) from error
    return tuple(sorted(set(keys)))


def read_texts(paths: Sequence[Path]) -> tuple[Text, ...]:
    """Return the texts of files; the built-in text for none.

    Raises:
        SpecError: One is no text.
    """
    return tuple(Text.read(path) for path in paths) or builtin_texts()


def _settings(order: Order, config: Any) -> Settings:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return Settings.fitting(limit, keys=order.keys, seed=order.seed)
