"""What strategies cost and give on a model and any texts: real blobs, real predictions, one thread's speed.

It measures the beginning of each text, because there a prompt begins: its first tokens are the ones that attention
rests on. Policies are served by `kvserve_profiler.engine`, which spreads its windows over the text instead.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import torch

from kvserve_api.errors import SpecError, UnsupportedError
from kvserve_api.strategy import StrategyConfig
from kvserve_profiler.codec_bench_rows import Row, Subject
from kvserve_profiler.cost import least_s
from kvserve_profiler.model import KV, Model
from kvserve_profiler.quality import MeasurementError, divergence, upper_mean
from kvserve_profiler.settings import Settings
from kvserve_profiler.windows import Window
from kvserve_strategies.blob import Expectation, decode_blob, encode_blob
from kvserve_strategies.bundle import Bundle
from kvserve_strategies.pipeline import Pipeline

_PROBE_TOKENS: Final = 64
_NATIVE_BYTES_PER_S: Final = 150e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """A stretch of text with what does not depend on the strategy.

    Attributes:
        window: Its tokens.
        kv: The exact KV cache of the prefix.
        exact: ``[continuation, vocabulary]`` log-probabilities with the exact cache.
    """

    window: Window
    kv: KV
    exact: torch.Tensor


class CodecBench:
    """Measures strategies on one model. Not thread-safe: it owns torch's thread setting while it lives."""

    def __init__(
        self, model: Model, settings: Settings, *, fingerprint: str, bundle: Bundle | None = None
    ) -> None:
        """Take a model.

        Args:
            model: The model.
            settings: How to measure.
            fingerprint: Of the model; see `kvserve_profiler.model.fingerprint`.
            bundle: Its calibration, for strategies that need one.

        Raises:
            UnsupportedError: The model takes fewer tokens than a window has.
        """
        if model.max_positions is not None and model.max_positions < settings.window_tokens:
            raise UnsupportedError(
                f"the model takes {model.max_positions} tokens; measuring needs "
                f"{settings.window_tokens}: choose a shorter prefix or continuation"
            )
        torch.set_num_threads(settings.threads)
        self._model = model
        self._settings = settings
        self._fingerprint = fingerprint
        self._bundle = bundle

    def estimate_s(self, texts: int, subjects: int) -> float:
        """Return about how long so many texts and strategies take, in seconds, from a short run of the model."""
        start = time.perf_counter()
        self._model.prefill([0] * _PROBE_TOKENS)
        token_s = (time.perf_counter() - start) / _PROBE_TOKENS
        settings = self._settings
        window_s = token_s * settings.window_tokens
        codec_s = self._model.layout.native_bytes(settings.prefix_tokens) / _NATIVE_BYTES_PER_S
        scored_s = token_s * settings.continuation_tokens + 2 * codec_s
        timed_s = 2 * (settings.cost_repeats + 1) * codec_s
        return texts * (
            settings.max_windows * (window_s + subjects * scored_s) + subjects * timed_s
        )

    def prepare(self, text: str, name: str) -> list[Passage]:
        """Compute the exact caches and predictions of the beginning of a text.

        Args:
            text: The text.
            name: For errors.

        Raises:
            SpecError: It is too short.
        """
        prepared = []
        for window in first_windows(
            self._model.tokenise(text), self._settings, lead=self._model.lead, name=name
        ):
            kv = self._model.prefill(window.prefix)
            exact = self._model.log_probabilities(window.continuation, kv)
            prepared.append(Passage(window=window, kv=kv, exact=exact))
        return prepared

    def measure(self, subject: Subject, passages: Sequence[Passage], text: str) -> Row:
        """Measure one strategy on one text.

        Raises:
            MeasurementError: It is not as lossless as it says, or something is not finite.
            KVServeError: The strategy refuses this cache.
        """
        coder = Coder.of(subject.strategy, self._model, self._fingerprint, self._bundle)
        raw = wire = 0
        divergences, agreements = [], []
        for passage in passages:
            blob = coder.encode(passage.kv)
            decoded = coder.decode(blob, passage.kv.tokens)
            raw += self._model.layout.native_bytes(passage.kv.tokens)
            wire += len(blob)
            lost, same = self.loss(passage, decoded, lossless=coder.pipeline.lossless)
            divergences.append(lost)
            agreements.append(same)
        kv = passages[0].kv
        blob = coder.encode(kv)
        native_mb = self._model.layout.native_bytes(kv.tokens) / 1e6
        repeats = self._settings.cost_repeats
        return Row(
            strategy=subject.strategy,
            preset=subject.preset,
            ratio=raw / wire,
            kl=float(np.mean(np.stack(divergences))),
            kl_upper=upper_mean(divergences, self._settings),
            top1=float(np.mean(agreements)),
            encode_mb_s=native_mb / least_s(lambda: coder.encode(kv), repeats),
            decode_mb_s=native_mb / least_s(lambda: coder.decode(blob, kv.tokens), repeats),
            bytes_raw=raw,
            bytes_wire=wire,
            text=text,
        )

    def loss(
        self, passage: Passage, decoded: KV, *, lossless: bool = False
    ) -> tuple[np.ndarray[Any, np.dtype[np.float64]], float]:
        """Return the divergence of each scored token, and the share whose most likely successor stays the same.

        Args:
            passage: The passage.
            decoded: Its KV cache as a receiver gets it.
            lossless: It must be equal bit by bit, so no prediction is needed.

        Raises:
            MeasurementError: It is not equal, or a prediction is not finite.
        """
        if lossless:
            if not _same_bits(passage.kv, decoded):
                raise MeasurementError(
                    "the strategy says it is lossless, but the decoded KV differs"
                )
            return np.zeros(len(passage.window.continuation)), 1.0
        scored = self._model.log_probabilities(passage.window.continuation, decoded)
        same = (passage.exact.argmax(-1) == scored.argmax(-1)).float().mean()
        return divergence(passage.exact, scored), float(same)


@dataclass(frozen=True, slots=True)
class Coder:
    """A strategy ready to code one model's whole cache: the very blobs that serving pods exchange.

    Attributes:
        pipeline: The strategy at work.
        model: The model.
        fingerprint: Of the model.
    """

    pipeline: Pipeline
    model: Model
    fingerprint: str

    @classmethod
    def of(
        cls, strategy: StrategyConfig, model: Model, fingerprint: str, bundle: Bundle | None
    ) -> Self:
        """Make a strategy ready.

        Raises:
            StrategyError: It can't work, or needs a bundle and there is none.
        """
        return cls(Pipeline.of(strategy, bundle), model, fingerprint)

    def encode(self, kv: KV) -> memoryview:
        """Return the blob of a cache."""
        layout = self.model.layout
        return encode_blob(
            self.pipeline,
            kv.keys,
            kv.values,
            model_fingerprint=self.fingerprint,
            layout=layout,
            layers=range(layout.layers),
            tokens=range(kv.tokens),
        )

    def decode(self, blob: memoryview, tokens: int) -> KV:
        """Undo `encode`, as a receiver that knows nothing but the model."""
        layout = self.model.layout
        expect = Expectation(
            model_fingerprint=self.fingerprint,
            layout=layout,
            layers=range(layout.layers),
            tokens=range(tokens),
            max_bytes=len(blob),
            bundles=lambda _: self.pipeline.bundle,
        )
        decoded = decode_blob(blob, expect=expect)
        return KV(keys=decoded.keys, values=decoded.values)


def first_windows(
    tokens: Sequence[int], settings: Settings, *, lead: Sequence[int], name: str
) -> Iterator[Window]:
    """Yield the first windows of a text, one after the other: as many as wanted, or as there are.

    Args:
        tokens: The text's token ids.
        settings: How long windows are and how many are wanted.
        lead: Tokens the model expects at the beginning of any text; they count as part of the prefix.
        name: The text's, for errors.

    Raises:
        SpecError: There is not even one.
    """
    size = settings.window_tokens - len(lead)
    count = min(settings.max_windows, len(tokens) // size)
    if count < 1:
        raise SpecError(
            f"--text {name}",
            f"has {len(tokens)} tokens, but {size} are needed: give a longer text, or a shorter "
            "--prefix or --continuation",
        )
    for start in range(0, count * size, size):
        middle = start + settings.prefix_tokens - len(lead)
        yield Window(
            prefix=(*lead, *tokens[start:middle]),
            continuation=tuple(tokens[middle : start + size]),
        )


def _same_bits(one: KV, other: KV) -> bool:
    """Compare bits, not values: a lossless strategy keeps NaN and the sign of zero."""
    pairs = ((one.keys, other.keys), (one.values, other.values))
    return all(
        a.dtype == b.dtype
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in pairs
    )
