"""Blobs: a piece of a request's KV, coded, with all that a decoder must know and check."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from kvserve_api.errors import StrategyError, WireError, WireReason
from kvserve_api.wire import (
    MAX_HEADER_NBYTES,
    PREFIX_NBYTES,
    BlobHeader,
    BlobPrefix,
    Buffer,
    KVLayout,
)
from kvserve_kernels.checksum import checksum
from kvserve_strategies.pipeline import Pipeline, own_bytes, payload_nbytes, write_payload
from kvserve_strategies.values import dtype_name

_DTYPES: Final = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Expectation:
    """What a receiver asked for; a blob that is anything else is refused.

    Attributes:
        model_fingerprint: Of the model it serves.
        layout: Of its cache.
        layers: The layers it wants.
        tokens: The tokens it wants.
        max_bytes: Most bytes of the whole blob.
    """

    model_fingerprint: str
    layout: KVLayout
    layers: range
    tokens: range
    max_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedBlob:
    """A blob's content.

    Attributes:
        keys: ``[layers, tokens, kv_heads, head_dim]``; may share memory with the buffer.
        values: Like the keys.
        header: What the blob says of itself.
        strategy_digest: The digest of the strategy that coded it.
    """

    keys: torch.Tensor
    values: torch.Tensor
    header: BlobHeader
    strategy_digest: str


def encode_blob(
    pipeline: Pipeline,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    model_fingerprint: str,
    layout: KVLayout,
    layers: range,
    tokens: range,
) -> memoryview:
    """Return the blob of a piece of KV.

    Args:
        pipeline: The strategy to use.
        keys: ``[len(layers), len(tokens), kv_heads, head_dim]`` on the CPU, in the layout's dtype.
        values: Like the keys.
        model_fingerprint: See `kvserve_api.wire.model_fingerprint`.
        layout: Of the whole cache.
        layers: Which layers of the cache these are.
        tokens: Which tokens of the request these are.

    Raises:
        ValuesError: The strategy is lossy and can't carry these values; send them by a lossless one.
        SpecError: Tensors, layout and ranges do not belong together.
    """
    header = BlobHeader(
        strategy=pipeline.config,
        bundle=None,
        model_fingerprint=model_fingerprint,
        layout=layout,
        layers=layers,
        tokens=tokens,
    )
    shape = (len(layers), len(tokens), layout.kv_heads, layout.head_dim)
    if tuple(keys.shape) != shape or dtype_name(keys.dtype) != layout.dtype:
        raise StrategyError(
            "keys",
            f"must be {shape} {layout.dtype}, got {tuple(keys.shape)} {dtype_name(keys.dtype)}",
        )
    sections = pipeline.encode_sections(keys, values)
    nbytes = payload_nbytes(sections)
    offset = len(header.pack(payload_nbytes=nbytes, payload_xxh64=0))
    out = np.empty(offset + nbytes, np.uint8)
    write_payload(sections, out[offset:])
    head = header.pack(payload_nbytes=nbytes, payload_xxh64=checksum(out[offset:]))
    out[:offset] = np.frombuffer(head, np.uint8)
    return out.data


def peek_header(buffer: Buffer) -> tuple[BlobPrefix, BlobHeader]:
    """Return what a blob says of itself, from its first bytes.

    A receiver reads `PREFIX_NBYTES`, learns from `BlobPrefix.parse` how long header and payload are, bounds both, reads
    the header, and looks at it here before it makes room for the payload.

    Raises:
        WireError: The bytes are cut, altered, or not a blob of this format.
    """
    return BlobHeader.parse(buffer)


def decode_blob(buffer: Buffer, *, expect: Expectation) -> DecodedBlob:
    """Check and decode a blob.

    Args:
        buffer: The whole blob; anything may be in it.
        expect: What was asked for.

    Raises:
        WireError: It is not that, or not intact; its reason says which.
    """
    view = memoryview(buffer).cast("B")
    if len(view) > expect.max_bytes:
        raise WireError(WireReason.TOO_LARGE, f"{len(view)} bytes, most is {expect.max_bytes}")
    prefix, header = BlobHeader.parse(view)
    if prefix.total_nbytes > len(view):
        raise WireError(
            WireReason.TRUNCATED, f"the blob has {prefix.total_nbytes} bytes, got {len(view)}"
        )
    if prefix.total_nbytes < len(view):
        raise WireError(
            WireReason.MALFORMED, f"{len(view) - prefix.total_nbytes} bytes after the blob"
        )
    check_header(header, expect)
    payload = own_bytes(view[prefix.payload_offset :])
    if checksum(payload) != prefix.payload_xxh64:
        raise WireError(WireReason.CHECKSUM_MISMATCH, "the payload was altered on its way")
    try:
        pipeline = Pipeline.of(header.strategy)
    except StrategyError as error:
        raise WireError(
            WireReason.STRATEGY_MISMATCH, f"the strategy can't be built here: {error}"
        ) from error
    shape = (len(header.layers), len(header.tokens), header.layout.kv_heads, header.layout.head_dim)
    keys, values = pipeline.decode(payload.data, shape=shape, dtype=_DTYPES[header.layout.dtype])
    return DecodedBlob(keys=keys, values=values, header=header, strategy_digest=pipeline.digest)


def check_header(header: BlobHeader, expect: Expectation) -> None:
    """Refuse a header that is not what was asked for.

    Raises:
        WireError: With the reason.
    """
    if header.model_fingerprint != expect.model_fingerprint:
        raise WireError(
            WireReason.MODEL_MISMATCH,
            f"KV of {header.model_fingerprint}, served is {expect.model_fingerprint}",
        )
    if header.layout != expect.layout:
        raise WireError(WireReason.LAYOUT_MISMATCH, f"{header.layout}, served is {expect.layout}")
    if header.layers != expect.layers:
        raise WireError(
            WireReason.RANGE_MISMATCH, f"layers {header.layers}, asked for {expect.layers}"
        )
    if header.tokens != expect.tokens:
        raise WireError(
            WireReason.RANGE_MISMATCH, f"tokens {header.tokens}, asked for {expect.tokens}"
        )
    if header.bundle is not None:
        raise WireError(WireReason.BUNDLE_MISMATCH, f"needs the calibration bundle {header.bundle}")


def max_blob_nbytes(pipeline: Pipeline, *, layout: KVLayout, layers: int, tokens: int) -> int:
    """Return the most bytes a blob of so many layers and tokens can have."""
    payload = pipeline.max_encoded_nbytes(
        layers=layers,
        tokens=tokens,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        dtype=_DTYPES[layout.dtype],
    )
    return PREFIX_NBYTES + MAX_HEADER_NBYTES + payload
