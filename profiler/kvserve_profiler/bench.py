"""The measuring bench: a loaded model and the windows of every text, against which strategies are measured."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from kvserve_api.errors import UnsupportedError
from kvserve_api.wire import KVLayout
from kvserve_profiler.codec import Codec
from kvserve_profiler.cost import fit, least_s, sizes_tokens
from kvserve_profiler.model import KV, Model
from kvserve_profiler.quality import MeasurementError, Quality, assess, divergence
from kvserve_profiler.settings import Settings
from kvserve_profiler.texts import Text
from kvserve_profiler.trials import Measurement
from kvserve_profiler.windows import Window, cut


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


class Bench:
    """Measures strategies on one model. Not thread-safe: it owns torch's thread setting while it lives."""

    def __init__(self, model: Model, texts: Mapping[str, Text], settings: Settings) -> None:
        """Compute the exact KV caches and predictions.

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
        self._texts = {key: self._prepare(text) for key, text in texts.items()}

    @property
    def layout(self) -> KVLayout:
        """The form of the model's KV cache."""
        return self._model.layout

    def measure(self, codec: Codec) -> Measurement:
        """Measure one strategy.

        Raises:
            MeasurementError: It is not as lossless as it says, or something is not finite.
            KVServeError: The codec refuses this KV cache.
        """
        qualities = {key: self._quality(codec, windows) for key, windows in self._texts.items()}
        kv = next(iter(self._texts.values()))[0].kv
        parts = [kv.first(tokens) for tokens in sizes_tokens(kv.tokens)]
        native = [self.layout.native_bytes(part.tokens) for part in parts]
        times = [self._time(codec, part) for part in parts]
        return Measurement(
            qualities=qualities,
            encode=fit(native, [encode_s for encode_s, _ in times]),
            decode=fit(native, [decode_s for _, decode_s in times]),
            lossless=codec.lossless,
            native_bytes=native[-1],
        )

    def _time(self, codec: Codec, kv: KV) -> tuple[float, float]:
        blob = codec.encode(kv)
        repeats = self._settings.cost_repeats
        return (
            least_s(lambda: codec.encode(kv), repeats),
            least_s(lambda: codec.decode(blob, kv.tokens), repeats),
        )

    def _prepare(self, text: Text) -> list[Prepared]:
        settings = self._settings
        documents = [self._model.tokenise(document) for document in text.documents]
        windows = cut(documents, settings, lead=self._model.lead)
        prepared = []
        for window in windows:
            kv = self._model.prefill(window.prefix)
            exact = self._model.log_probabilities(window.continuation, kv)
            prepared.append(Prepared(window=window, kv=kv, exact=exact))
        return prepared

    def _quality(self, codec: Codec, windows: list[Prepared]) -> Quality:
        native = wire = 0
        divergences, agreements = [], []
        for item in windows:
            blob = codec.encode(item.kv)
            native += self.layout.native_bytes(item.kv.tokens)
            wire += len(blob)
            decoded = codec.decode(blob, item.kv.tokens)
            if codec.lossless:
                _check_equal(item.kv, decoded)
                divergences.append(np.zeros(len(item.window.continuation)))
                agreements.append(1.0)
                continue
            scored = self._model.log_probabilities(item.window.continuation, decoded)
            divergences.append(divergence(item.exact, scored))
            agreements.append(_agreement(item.exact, scored))
        return assess(
            ratio=native / wire,
            divergences=divergences,
            agreements=agreements,
            settings=self._settings,
        )


def _agreement(exact: torch.Tensor, scored: torch.Tensor) -> float:
    return float((exact.argmax(-1) == scored.argmax(-1)).float().mean())


def _check_equal(exact: KV, decoded: KV) -> None:
    """Compare bits, not values: a lossless codec keeps NaN and the sign of zero."""
    for one, other in ((exact.keys, decoded.keys), (exact.values, decoded.values)):
        if one.dtype != other.dtype or not torch.equal(_bits(one), _bits(other)):
            raise MeasurementError("the strategy says it is lossless, but the decoded KV differs")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
