"""The strategy space: typed stages, chains of them, presets, and the blob that carries coded KV.

A strategy works on canonical tensors only: keys and values each ``[layers, tokens, kv_heads, head_dim]`` on the CPU, in
bfloat16, float16 or float32. Everything here is synchronous, thread-safe and drops the interpreter lock where it works.
"""

from kvserve_strategies.blob import (
    DecodedBlob,
    Expectation,
    decode_blob,
    encode_blob,
    max_blob_nbytes,
    peek_header,
)
from kvserve_strategies.piece import Place
from kvserve_strategies.pipeline import Pipeline, config_needs_bundle
from kvserve_strategies.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "DecodedBlob",
    "Expectation",
    "Pipeline",
    "Place",
    "config_needs_bundle",
    "decode_blob",
    "encode_blob",
    "max_blob_nbytes",
    "peek_header",
    "preset",
]
