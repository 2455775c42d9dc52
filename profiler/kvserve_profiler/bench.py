"""The measuring bench: a loaded model and the windows of every text, against which strategies are measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch

from kvserve_api.errors import UnsupportedError
from kvserve_api.wire import KVLayout
from kvserve_profiler.codec import Codec
from kvserve_profiler.cost import fit, least_s, sizes_tokens
from kvserve_profiler.model import KV, Model
from kvserve_profiler.quality import (
    FloatArray,
    MeasurementError,
    Quality,
    assess,
    divergence,
    loss_bp,
)
from kvserve_profiler.screening import Probe
from kvserve_profiler.sensitivity import Sensitivity
from kvserve_profiler.settings import Settings
from kvserve_profiler.texts import Text
from kvserve_profiler.trials import Measurement
from kvserve_profiler.windows import Window, cut, halves


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A window with what does not depend on the strategy.

    Attributes:
        window: The tokens.
        kv: The exact KV cache of the prefix.
        exact: ``[tokens, vocabulary]`` log-probabilities with the exact cache.
    """

    window: Window
    kv: KV
    exact: torch.Tensor


GoOn: TypeAlias = Callable[[Mapping[str, Sequence[float]]], bool]
"""Tells from the losses so far, by text and window, in basis points, whether further windows are worth their time."""


@dataclass(kw_only=True, slots=True)
class Tally:
    """What the windows of a text gave so far."""

    native: int = 0
    wire: int = 0
    divergences: list[FloatArray] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)

    def losses_bp(self) -> list[float]:
        """Return the loss of each window."""
        return [loss_bp(float(window.mean())) for window in self.divergences]

    def quality(self, settings: Settings) -> Quality:
        """Sum up."""
        return assess(
            ratio=self.native / self.wire,
            divergences=self.divergences,
            agreements=self.agreements,
            settings=settings,
        )


class Bench:
    """Measures strategies on one model. Not thread-safe: it owns torch's thread setting while it lives."""

    def __init__(self, model: Model, texts: Mapping[str, Text], settings: Settings) -> None:
        """Compute the exact KV caches and predictions that a search needs.

        Args:
            model: The model.
            texts: The different texts by digest.
            settings: How to measure.

        Raises:
            SpecError: A text is too short.
            UnsupportedError: The model takes fewer tokens than a window has.
        """
        if model.max_positions is not None and model.max_positions < settings.window_tokens:
            raise UnsupportedError(
                f"the model takes {model.max_positions} tokens; measuring needs "
                f"{settings.window_tokens}"
            )
        torch.set_num_threads(settings.threads)
        self._model = model
        self._settings = settings
        self._texts = dict(texts)
        self._seen: dict[str, list[Prepared]] = {}
        self._held: dict[str, list[Prepared]] = {}
        for key, text in self._texts.items():
            self._seen[key] = self._prepare(self._parts(text)[0])

    @property
    def layout(self) -> KVLayout:
        """The form of the model's KV cache."""
        return self._model.layout

    @property
    def sample(self) -> KV:
        """The KV cache of one whole prefix."""
        return next(iter(self._seen.values()))[0].kv

    def probes(self) -> dict[str, Probe]:
        """Return for each text what candidates are screened on: its first window, and what errors cost there."""
        count = self._settings.gradients
        found = {}
        for key, windows in self._seen.items():
            kv, tokens = windows[0].kv, windows[0].window.continuation
            sensitivity = (
                Sensitivity.of(self._model, kv, tokens, samples=count, seed=self._settings.seed)
                if count
                else None
            )
            found[key] = Probe(kv, sensitivity)
        return found

    def search(self, codec: Codec, go_on: GoOn) -> Measurement:
        """Measure what a strategy loses, on the search's windows; on the first of them only if that tells enough.

        Raises:
            MeasurementError: It is not as lossless as it says, or something is not finite.
            KVServeError: The codec refuses this KV cache.
        """
        first = self._settings.first_windows
        tallies = {key: Tally() for key in self._seen}
        for key, windows in self._seen.items():
            self._score(codec, windows[:first], tallies[key])
        if go_on({key: tally.losses_bp() for key, tally in tallies.items()}):
            for key, windows in self._seen.items():
                self._score(codec, windows[first:], tallies[key])
        return Measurement(
            qualities={key: tally.quality(self._settings) for key, tally in tallies.items()},
            lossless=codec.lossless,
            native_bytes=self.layout.native_bytes(self.sample.tokens),
        )

    def measure(self, codec: Codec) -> Measurement:
        """Measure a strategy on the windows that no search has seen, and what it costs.

        Raises:
            MeasurementError: It is not as lossless as it says, or something is not finite.
            KVServeError: The codec refuses this KV cache.
        """
        qualities, seen = {}, []
        for key in self._texts:
            tally = Tally()
            windows = self._held_out(key)
            self._score(codec, windows, tally)
            qualities[key] = tally.quality(self._settings)
            if windows is self._seen[key]:
                seen.append(key)
        kv = self.sample
        parts = [kv.first(tokens) for tokens in sizes_tokens(kv.tokens)]
        native = [self.layout.native_bytes(part.tokens) for part in parts]
        times = [self._time(codec, part) for part in parts]
        return Measurement(
            qualities=qualities,
            encode=fit(native, [encode_s for encode_s, _ in times]),
            decode=fit(native, [decode_s for _, decode_s in times]),
            lossless=codec.lossless,
            native_bytes=native[-1],
            seen=tuple(seen),
        )

    def _time(self, codec: Codec, kv: KV) -> tuple[float, float]:
        blob = codec.encode(kv)
        repeats = self._settings.cost_repeats
        return (
            least_s(lambda: codec.encode(kv), repeats),
            least_s(lambda: codec.decode(blob, kv.tokens), repeats),
        )

    def _held_out(self, key: str) -> list[Prepared]:
        """Return the windows that were held out of a text, or the search's if it is too short for others."""
        if key not in self._held:
            parts = self._parts(self._texts[key])[1]
            self._held[key] = self._prepare(parts) if any(parts) else self._seen[key]
        return self._held[key]

    def _parts(self, text: Text) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
        """Return what the search sees of each document, and what is held out of each."""
        documents = [self._model.tokenise(document) for document in text.documents]
        pairs = [halves(tokens, self._settings, lead=self._model.lead) for tokens in documents]
        return [seen for seen, _ in pairs], [held for _, held in pairs]

    def _prepare(self, documents: Sequence[Sequence[int]]) -> list[Prepared]:
        prepared = []
        for window in cut(documents, self._settings, lead=self._model.lead):
            kv = self._model.prefill(window.prefix)
            exact = self._model.log_probabilities(window.continuation, kv)
            prepared.append(Prepared(window=window, kv=kv, exact=exact))
        return prepared

    def _score(self, codec: Codec, windows: Sequence[Prepared], tally: Tally) -> None:
        """Add windows to what others gave."""
        for item in windows:
            blob = codec.encode(item.kv)
            tally.native += self.layout.native_bytes(item.kv.tokens)
            tally.wire += len(blob)
            decoded = codec.decode(blob, item.kv.tokens)
            if codec.lossless:
                _check_equal(item.kv, decoded)
                tally.divergences.append(np.zeros(len(item.window.continuation)))
                tally.agreements.append(1.0)
                continue
            scored = self._model.log_probabilities(item.window.continuation, decoded)
            tally.divergences.append(divergence(item.exact, scored))
            tally.agreements.append(_agreement(item.exact, scored))


def _agreement(exact: torch.Tensor, scored: torch.Tensor) -> float:
    return float((exact.argmax(-1) == scored.argmax(-1)).float().mean())


def _check_equal(exact: KV, decoded: KV) -> None:
    """Compare bits, not values: a lossless codec keeps NaN and the sign of zero."""
    for one, other in ((exact.keys, decoded.keys), (exact.values, decoded.values)):
        if one.dtype != other.dtype or not torch.equal(_bits(one), _bits(other)):
            raise MeasurementError("the strategy says it is lossless, but the decoded KV differs")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
