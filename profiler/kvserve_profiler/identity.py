"""What a run is about: which model, known without loading its weights."""

from dataclasses import dataclass
from pathlib import Path

from kvserve_profiler.model import Source, fingerprint
from kvserve_strategies.calibration.weights import weights_digest


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """A model as its files tell.

    Attributes:
        fingerprint: Of the form of its KV cache; what serving pods compare.
        weights: Of its weight files; empty for a model from the hub, whose revision names them.
    """

    fingerprint: str
    weights: str


def identify(source: Source) -> Identity:
    """Return a model's identity.

    Raises:
        SpecError: There is no model.
        UnsupportedError: See `Source.config`.
    """
    return Identity(fingerprint=fingerprint(source.config()), weights=weights(source))


def weights(source: Source) -> str:
    """Return a digest of the model's weight files; empty for a model from the hub."""
    return weights_digest(Path(source.location))
