"""Coding of one chunk: the connector's only door to `kvserve_strategies`."""

import math
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Final, TypeAlias

import torch

from kvserve_api.errors import ValuesError
from kvserve_api.profile_set import NONE
from kvserve_api.wire import BYTES
from kvserve_connector.chunks import Chunk, plan_form
from kvserve_connector.form import Form
from kvserve_strategies import Expectation, Pipeline, decode_blob, encode_blob, preset
from kvserve_strategies.bundle import Bundle
from kvserve_strategies.registry import STAGES

BLOB_SLACK_BYTES = 1 << 18
"""What a blob may have beyond twice its native bytes: header, tables, checksums."""


WARM_UP_TOKENS: Final = 33
"""Tokens of the chunks that a new pipeline codes first: more than the lanes of an entropy coder, and than its sinks."""

FindBundle: TypeAlias = Callable[[str], Bundle | None]
"""Returns the calibration bundle of a digest if this pod has it; never fetches."""


@lru_cache(maxsize=1)
def raw_pipeline() -> Pipeline:
    """Return the pipeline that changes nothing."""
    return Pipeline.of(preset(NONE))


@lru_cache(maxsize=1)
def known_stages() -> frozenset[str]:
    """Return the ids of all stages that can be coded and decoded here."""
    return frozenset(STAGES)


class ChunkCoder:
    """Codes the chunks of one model's KV; safe from any thread.

    Args:
        form: How its cache is cut.
        find_bundle: Returns a calibration bundle that blobs may be decoded with now.
    """

    def __init__(self, form: Form, find_bundle: FindBundle) -> None:
        self._form = form
        self._find_bundle = find_bundle

    def encode(
        self,
        pipeline: Pipeline,
        chunk: Chunk,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        tokens_after: int = 0,
    ) -> memoryview:
        """Return the chunk's blob; raw if the strategy refuses these values, like NaN in a lossy one.

        Args:
            pipeline: The strategy.
            chunk: What it is.
            keys: ``[layers, tokens, heads, dim]``.
            values: The same.
            tokens_after: How many tokens of the request follow the chunk's.
        """
        if self._form.parts[chunk.part].layout.dtype == BYTES and not pipeline.takes_bytes:
            pipeline = raw_pipeline()
        try:
            blob = self._encode(pipeline, chunk, keys, values, tokens_after)
        except ValuesError:
            blob = self._encode(raw_pipeline(), chunk, keys, values, tokens_after)
        return blob

    def decode(self, blob: bytearray, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the chunk's keys and values ``[layers, tokens, heads, dim]``.

        Raises:
            WireError: The blob is damaged, is not this chunk of this model, or needs a bundle that is not here.
        """
        return self._decode(blob, chunk, self._find_bundle)

    def warm_up(self, pipeline: Pipeline, chunk_layers: Collection[int] = (2,)) -> None:
        """Code small chunks there and back, so that the first transfer does not wait for compilers.

        What is calibrated has other matrices in each group of layers: then every group is coded once.

        Args:
            pipeline: What will code.
            chunk_layers: Most layers in a chunk, for each way in which transfers are cut.
        """
        tokens = range(WARM_UP_TOKENS)
        # not those of `decode`, among which it may not be yet
        own = {} if pipeline.bundle is None else {pipeline.bundle.digest: pipeline.bundle}
        chunks = dict.fromkeys(
            chunk
            for layers in chunk_layers
            for chunk in plan_form(self._form, tokens, layers, layer_multiple=pipeline.layer_step)
        )
        # uncalibrated, what is compiled depends on the dtype only
        firsts = {
            self._form.parts[chunk.part].layout.dtype: chunk for chunk in reversed(list(chunks))
        }
        for chunk in chunks if own else firsts.values():
            layout = self._form.parts[chunk.part].layout
            shape = (len(chunk.layers), len(chunk.tokens), layout.kv_heads, layout.head_dim)
            ramp = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
            ramp = ramp.to(getattr(torch, layout.dtype))
            blob = self.encode(pipeline, chunk, ramp, ramp.flip(1))
            self._decode(bytearray(blob), chunk, own.get)

    def max_bytes(self, chunk: Chunk) -> int:
        """Return the most bytes that a chunk's blob may have; more is refused before it is read."""
        return 2 * chunk.native_bytes(self._form.parts[chunk.part].layout) + BLOB_SLACK_BYTES

    def _decode(
        self, blob: bytearray, chunk: Chunk, find_bundle: FindBundle
    ) -> tuple[torch.Tensor, torch.Tensor]:
        decoded = decode_blob(
            blob,
            expect=Expectation(
                model_fingerprint=self._form.identities[chunk.part],
                layout=self._form.parts[chunk.part].layout,
                layers=chunk.layers,
                tokens=chunk.tokens,
                max_bytes=self.max_bytes(chunk),
                bundles=find_bundle,
            ),
        )
        return decoded.keys, decoded.values

    def _encode(
        self,
        pipeline: Pipeline,
        chunk: Chunk,
        keys: torch.Tensor,
        values: torch.Tensor,
        tokens_after: int,
    ) -> memoryview:
        return encode_blob(
            pipeline,
            keys,
            values,
            model_fingerprint=self._form.identities[chunk.part],
            layout=self._form.parts[chunk.part].layout,
            layers=chunk.layers,
            tokens=chunk.tokens,
            tokens_after=tokens_after,
        )
