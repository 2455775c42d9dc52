"""Blobs: a piece of a request's KV, coded, with all that a decoder must know and check."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
import torch

from kvserve_api.errors import ArtifactError, StrategyError, WireError, WireReason
from kvserve_api.wire import (
    BYTES,
    MAX_HEADER_NBYTES,
    PREFIX_NBYTES,
    BlobHeader,
    BlobPrefix,
    Buffer,
    KVLayout,
)
from kvserve_kernels.checksum import checksum
from kvserve_strategies.bundle import Bundle
from kvserve_strategies.payload import own_bytes, payload_nbytes, write_payload
from kvserve_strategies.piece import Place
from kvserve_strategies.pipeline import Pipeline
from kvserve_strategies.values import dtype_name

_DTYPES: Final = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    BYTES: torch.uint8,
}
FindBundle: TypeAlias = Callable[[str], Bundle | None]
"""Returns the bundle of a digest from among those that may be used; must not fetch on a blob's word."""


def no_bundle(digest: str) -> None:
    """Find no bundle: only strategies that need none are decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expectation:
    """What a receiver asked for; a blob that is anything else is refused.

    Attributes:
        model_fingerprint: Of the model it serves.
        layout: Of its cache.
        layers: The layers it wants.
        tokens: The tokens it wants.
        max_bytes: Most bytes of the whole blob.
        bundles: Finds the calibration bundles that may be used.
    """

    model_fingerprint: str
    layout: KVLayout
    layers: range
    tokens: range
    max_bytes: int
    bundles: FindBundle = no_bundle


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
    tokens_after: int = 0,
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
        tokens_after: How many tokens of the request follow them, if more are sent. Importance is judged by it, and the
            last tokens of a strategy's parts are those of the request, see `StrategyConfig.before`.

    Raises:
        ValuesError: The strategy is lossy and can't carry these values; send them by a lossless one.
        SpecError: Tensors, layout and ranges do not belong together, or the strategy's bundle is of another model.
    """
    bundle = pipeline.bundle
    if bundle is not None:
        check_bundle(bundle, model_fingerprint, layout)
    config = pipeline.config.before(tokens_after)
    if config is not pipeline.config:
        pipeline = Pipeline.of(config, bundle)
        bundle = pipeline.bundle
    header = BlobHeader(
        strategy=pipeline.config,
        bundle=None if bundle is None else bundle.digest,
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
    sections = pipeline.encode_sections(
        keys, values, at=replace(_place(header), tokens_after=tokens_after)
    )
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
    shape = (len(header.layers), len(header.tokens), header.layout.kv_heads, header.layout.head_dim)
    dtype = _DTYPES[header.layout.dtype]
    try:
        bundle = None if header.bundle is None else expect.bundles(header.bundle)
        if header.bundle is not None and bundle is None:
            raise WireError(
                WireReason.BUNDLE_MISMATCH,
                f"needs the calibration bundle {header.bundle}, which is not loaded here",
            )
        if bundle is not None:
            check_bundle(bundle, header.model_fingerprint, header.layout)
        pipeline = Pipeline.of(header.strategy, bundle)
        if pipeline.calibrated != (bundle is not None):
            raise WireError(
                WireReason.BUNDLE_MISMATCH, "a bundle is named without need, or missing"
            )
        keys, values = pipeline.decode(payload.data, shape=shape, dtype=dtype, at=_place(header))
    except (StrategyError, ArtifactError) as error:
        raise WireError(
            WireReason.STRATEGY_MISMATCH, f"the strategy can't be used here: {error}"
        ) from error
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


def check_bundle(bundle: Bundle, model_fingerprint: str, layout: KVLayout) -> None:
    """Refuse a bundle of another model; a cache of another dtype is fine.

    Raises:
        StrategyError: It is.
    """
    ours = (layout.layers, layout.kv_heads, layout.head_dim)
    theirs = (bundle.layout.layers, bundle.layout.kv_heads, bundle.layout.head_dim)
    if bundle.model_fingerprint != model_fingerprint or ours != theirs:
        raise StrategyError(
            "bundle",
            f"{bundle.digest} was calibrated on {bundle.model_fingerprint} with (layers, KV heads, "
            f"head size) {theirs}; the cache is of {model_fingerprint} with {ours}",
        )


def _place(header: BlobHeader) -> Place:
    return Place(
        first_layer=header.layers.start,
        model_layers=header.layout.layers,
        first_token=header.tokens.start,
    )


def max_blob_nbytes(pipeline: Pipeline, *, layout: KVLayout, layers: range, tokens: range) -> int:
    """Return the most bytes a blob of these layers and tokens can have."""
    payload = pipeline.max_encoded_nbytes(
        layers=len(layers),
        tokens=len(tokens),
        at=Place(first_layer=layers.start, model_layers=layout.layers, first_token=tokens.start),
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        dtype=_DTYPES[layout.dtype],
    )
    return PREFIX_NBYTES + MAX_HEADER_NBYTES + payload
