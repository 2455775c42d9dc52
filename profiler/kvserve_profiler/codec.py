"""A strategy as the profiler uses it: the very blobs that the serving pods exchange."""

from dataclasses import dataclass
from typing import Self

from kvserve_api.errors import StrategyError
from kvserve_api.strategy import StrategyConfig
from kvserve_api.wire import Buffer, KVLayout
from kvserve_profiler.model import KV
from kvserve_strategies import Expectation, Pipeline, decode_blob, encode_blob
from kvserve_strategies.bundle import Bundle


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec:
    """Encodes and decodes KV caches of one model with one strategy.

    Attributes:
        pipeline: The strategy at work.
        fingerprint: Of the model.
        layout: The form of its KV cache.
    """

    pipeline: Pipeline
    fingerprint: str
    layout: KVLayout

    @classmethod
    def of(
        cls,
        strategy: StrategyConfig,
        *,
        fingerprint: str,
        layout: KVLayout,
        bundle: Bundle | None = None,
    ) -> Self:
        """Return the codec of a strategy.

        Args:
            strategy: The strategy.
            fingerprint: Of the model.
            layout: The form of its KV cache.
            bundle: The model's calibration, for strategies that need one.

        Raises:
            StrategyError: The strategy can't work, or not without a bundle.
        """
        pipeline = Pipeline.of(strategy, bundle)
        if pipeline.calibrated and pipeline.bundle is None:
            raise StrategyError("strategy", "needs a calibration bundle, and there is none")
        return cls(pipeline=pipeline, fingerprint=fingerprint, layout=layout)

    @property
    def lossless(self) -> bool:
        """Whether the strategy says that it decodes bit by bit what was encoded."""
        return self.pipeline.lossless

    def encode(self, kv: KV) -> Buffer:
        """Return the blob of a KV cache, whose length is what goes over the wire.

        Raises:
            KVServeError: The strategy refuses this cache.
        """
        return encode_blob(
            self.pipeline,
            kv.keys,
            kv.values,
            model_fingerprint=self.fingerprint,
            layout=self.layout,
            layers=range(self.layout.layers),
            tokens=range(kv.tokens),
        )

    def decode(self, blob: Buffer, tokens: int) -> KV:
        """Return the KV cache in a blob.

        Args:
            blob: What `encode` returned.
            tokens: How many tokens it covers.

        Raises:
            WireError: The blob is not what was expected.
        """
        expect = Expectation(
            model_fingerprint=self.fingerprint,
            layout=self.layout,
            layers=range(self.layout.layers),
            tokens=range(tokens),
            max_bytes=len(blob),
            bundles=self._find_bundle,
        )
        decoded = decode_blob(blob, expect=expect)
        return KV(keys=decoded.keys, values=decoded.values)

    def _find_bundle(self, digest: str) -> Bundle | None:
        bundle = self.pipeline.bundle
        return bundle if bundle is not None and bundle.digest == digest else None
