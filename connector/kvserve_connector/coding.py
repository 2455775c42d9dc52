"""Coding of one chunk: the connector's only door to `kvserve_strategies`."""

import math
from functools import lru_cache

import torch

from kvserve_api.errors import ValuesError
from kvserve_api.profile_set import NONE
from kvserve_api.wire import KVLayout
from kvserve_connector.chunks import Chunk
from kvserve_strategies import Expectation, Pipeline, decode_blob, encode_blob, preset
from kvserve_strategies.registry import STAGES

BLOB_SLACK_BYTES = 1 << 18
"""What a blob may have beyond twice its native bytes: header, tables, checksums."""


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
        fingerprint: Identity of the model.
        layout: Form of its cache.
    """

    def __init__(self, fingerprint: str, layout: KVLayout) -> None:
        self._fingerprint = fingerprint
        self._layout = layout

    def encode(
        self, pipeline: Pipeline, chunk: Chunk, keys: torch.Tensor, values: torch.Tensor
    ) -> memoryview:
        """Return the chunk's blob; raw if the strategy refuses these values, like NaN in a lossy one."""
        try:
            blob = self._encode(pipeline, chunk, keys, values)
        except ValuesError:
            blob = self._encode(raw_pipeline(), chunk, keys, values)
        return blob

    def decode(self, blob: bytearray, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the chunk's keys and values ``[layers, tokens, heads, dim]``.

        Raises:
            WireError: The blob is damaged, or is not this chunk of this model.
        """
        decoded = decode_blob(
            blob,
            expect=Expectation(
                model_fingerprint=self._fingerprint,
                layout=self._layout,
                layers=chunk.layers,
                tokens=chunk.tokens,
                max_bytes=self.max_bytes(chunk),
            ),
        )
        return decoded.keys, decoded.values

    def warm_up(self, pipeline: Pipeline) -> None:
        """Code a small chunk there and back, so that the first transfer does not wait for compilers."""
        chunk = Chunk(layers=range(min(2, self._layout.layers)), tokens=range(33))
        shape = (len(chunk.layers), 33, self._layout.kv_heads, self._layout.head_dim)
        ramp = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
        ramp = ramp.to(getattr(torch, self._layout.dtype))
        blob = self.encode(pipeline, chunk, ramp, ramp.flip(1))
        self.decode(bytearray(blob), chunk)

    def max_bytes(self, chunk: Chunk) -> int:
        """Return the most bytes that a chunk's blob may have; more is refused before it is read."""
        return 2 * chunk.native_bytes(self._layout) + BLOB_SLACK_BYTES

    def _encode(
        self, pipeline: Pipeline, chunk: Chunk, keys: torch.Tensor, values: torch.Tensor
    ) -> memoryview:
        return encode_blob(
            pipeline,
            keys,
            values,
            model_fingerprint=self._fingerprint,
            layout=self._layout,
            layers=chunk.layers,
            tokens=chunk.tokens,
        )
