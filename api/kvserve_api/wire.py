"""The blob of coded KV: the identities that it carries and both ends must agree on, and the form of its header.

A blob is prefix (fixed size, says how long the rest is), header (whose KV, which part of it, coded how) and payload.
All numbers are little-endian. Prefix and header are covered by a CRC-32, the payload by an XXH64.
"""

import hashlib
import json
import re
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Self, TypeAlias

from kvserve_api.canonical import digest
from kvserve_api.errors import SpecError, WireError, WireReason
from kvserve_api.strategy import MAX_JSON_BYTES, StrategyConfig

Buffer: TypeAlias = bytes | bytearray | memoryview
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
FLOAT_DTYPES: Final = ("bfloat16", "float16", "float32")
BYTES: Final = "uint8"
"""The dtype of a cache whose numbers only the engine can read: quantised, packed, or of several dtypes."""
DTYPES: Final = (*FLOAT_DTYPES, BYTES)
DTYPE_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4, BYTES: 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayout:
    """The form of a model's KV cache, independent of how an engine stores it.

    Attributes:
        layers: Layers that have a KV cache.
        kv_heads: KV heads of one tensor-parallel rank.
        head_dim: Size of a head; the same for keys and values.
        dtype: ``bfloat16``, ``float16``, ``float32``, or ``uint8`` for bytes that are not read as numbers.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim"):
            if not 1 <= getattr(self, name) <= 65_535:
                raise SpecError(name, f"must be 1 to 65535, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise SpecError("dtype", f"must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def native_bytes(self, tokens: int) -> int:
        """Return the bytes of so many tokens' KV, uncompressed."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype] * tokens

    def to_json(self) -> dict[str, Any]:
        """Return the layout as an object."""
        return {
            "layers": self.layers,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
        }


def model_fingerprint(config: dict[str, Any]) -> str:
    """Return the digest of what decides the meaning of a model's KV cache.

    Profiler (from the model folder's ``config.json``) and connector (from vLLM's copy of it) must come to the same
    digest. The cache's dtype is not part of it: it may be served in another one than it was profiled in.

    Args:
        config: The parsed ``config.json``.
    """
    keys = (
        "model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_size", "intermediate_size", "vocab_size",
    )  # fmt: skip
    return digest({key: config.get(key) for key in keys})


MAGIC: Final = b"KVSB"
FORMAT_VERSION: Final = 1
ALIGNMENT: Final = 64
"""The payload starts at a multiple of this from the blob's start, so that wide loads on it are aligned."""
_STRATEGIES: Final = 16
_PREFIX = struct.Struct("<4sHHIIQQ")
_FIELDS = struct.Struct("<32s32s32sHHHBBHHIIH")
_NO_DIGEST = bytes(32)
PREFIX_NBYTES: Final = _PREFIX.size
"""What a receiver must have before it knows how long header and payload are."""
MAX_HEADER_NBYTES: Final = _FIELDS.size + MAX_JSON_BYTES + ALIGNMENT


@dataclass(frozen=True, kw_only=True, slots=True)
class BlobPrefix:
    """The first `PREFIX_NBYTES` bytes of a blob.

    Attributes:
        header_nbytes: Bytes between prefix and payload.
        header_crc32: CRC-32 of the prefix up to this field's place, and of the header.
        payload_nbytes: Bytes of the payload; the rest of the blob.
        payload_xxh64: XXH64 of the payload, seed 0.
    """

    header_nbytes: int
    header_crc32: int
    payload_nbytes: int
    payload_xxh64: int

    @property
    def payload_offset(self) -> int:
        """Where the payload starts."""
        return PREFIX_NBYTES + self.header_nbytes

    @property
    def total_nbytes(self) -> int:
        """The bytes of the whole blob."""
        return PREFIX_NBYTES + self.header_nbytes + self.payload_nbytes

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Read the prefix; trust nothing but the bounds of its lengths.

        Args:
            data: At least the first `PREFIX_NBYTES` bytes of a blob.

        Raises:
            WireError: Too short, not a blob, of another version, or with an impossible header length.
        """
        view = memoryview(data).cast("B")
        if len(view) < PREFIX_NBYTES:
            raise WireError(
                WireReason.TRUNCATED, f"a prefix has {PREFIX_NBYTES} bytes, got {len(view)}"
            )
        magic, version, reserved, header, crc, payload, checksum = _PREFIX.unpack_from(view)
        if magic != MAGIC:
            raise WireError(WireReason.BAD_MAGIC, f"a blob starts with {MAGIC!r}, got {magic!r}")
        if version != FORMAT_VERSION:
            raise WireError(
                WireReason.UNSUPPORTED_VERSION, f"format {version}, known is {FORMAT_VERSION}"
            )
        if reserved or not _FIELDS.size <= header <= MAX_HEADER_NBYTES:
            raise WireError(WireReason.MALFORMED, f"reserved {reserved}, header of {header} bytes")
        return cls(
            header_nbytes=header,
            header_crc32=crc,
            payload_nbytes=payload,
            payload_xxh64=checksum,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BlobHeader:
    """What a blob says of itself.

    Attributes:
        strategy: How the payload is coded.
        bundle: Digest of the calibration bundle that decoding needs, or None.
        model_fingerprint: See `model_fingerprint`.
        layout: The form of the whole cache the blob is a part of.
        layers: Which layers it holds.
        tokens: Which tokens of the request it holds.
    """

    strategy: StrategyConfig
    bundle: str | None
    model_fingerprint: str
    layout: KVLayout
    layers: range
    tokens: range

    def __post_init__(self) -> None:
        if self.layers.step != 1 or not 0 <= self.layers.start < self.layers.stop:
            raise SpecError("layers", f"must be a rising range with step 1, got {self.layers}")
        if self.layers.stop > self.layout.layers:
            raise SpecError(
                "layers", f"end at {self.layers.stop}, the cache has {self.layout.layers}"
            )
        if self.tokens.step != 1 or not 0 <= self.tokens.start < self.tokens.stop < 2**32:
            raise SpecError("tokens", f"must be a rising range with step 1, got {self.tokens}")

    def pack(self, *, payload_nbytes: int, payload_xxh64: int) -> bytes:
        """Return prefix and header, padded so that the payload is aligned.

        Raises:
            SpecError: A digest is not of the form ``sha256:<64 hex digits>``, or the strategy is too long.
        """
        strategy = self.strategy.canonical()
        if len(strategy) > MAX_JSON_BYTES:
            raise SpecError("strategy", f"has more than {MAX_JSON_BYTES} bytes of JSON")
        fields = _FIELDS.pack(
            hashlib.sha256(strategy).digest(),
            _NO_DIGEST if self.bundle is None else _raw_digest("bundle", self.bundle),
            _raw_digest("model_fingerprint", self.model_fingerprint),
            self.layout.layers,
            self.layout.kv_heads,
            self.layout.head_dim,
            DTYPES.index(self.layout.dtype),
            0,
            self.layers.start,
            self.layers.stop,
            self.tokens.start,
            self.tokens.stop,
            len(strategy),
        )
        body = fields + strategy
        body += bytes(-(PREFIX_NBYTES + len(body)) % ALIGNMENT)
        lengths = (MAGIC, FORMAT_VERSION, 0, len(body))
        crc = _header_crc32(
            _PREFIX.pack(*lengths, 0, payload_nbytes, payload_xxh64), memoryview(body)
        )
        return _PREFIX.pack(*lengths, crc, payload_nbytes, payload_xxh64) + body

    @classmethod
    def parse(cls, data: Buffer) -> tuple[BlobPrefix, Self]:
        """Read prefix and header and check them against their checksum.

        Args:
            data: A blob, or at least its prefix and header.

        Raises:
            WireError: The bytes are cut, altered, or not a header of this format.
        """
        prefix = BlobPrefix.parse(data)
        view = memoryview(data).cast("B")
        if len(view) < prefix.payload_offset:
            raise WireError(
                WireReason.TRUNCATED,
                f"prefix and header have {prefix.payload_offset} bytes, got {len(view)}",
            )
        body = view[PREFIX_NBYTES : prefix.payload_offset]
        if _header_crc32(bytes(view[:PREFIX_NBYTES]), body) != prefix.header_crc32:
            raise WireError(WireReason.CHECKSUM_MISMATCH, "the header was altered on its way")
        return prefix, cls._parse_body(body)

    @classmethod
    def _parse_body(cls, body: memoryview) -> Self:
        (
            strategy_digest, bundle, fingerprint, layers, kv_heads, head_dim, dtype, reserved,
            first_layer, end_layer, first_token, end_token, json_nbytes,
        ) = _FIELDS.unpack_from(body)  # fmt: skip
        text = bytes(body[_FIELDS.size : _FIELDS.size + json_nbytes])
        padding = body[_FIELDS.size + json_nbytes :]
        if len(text) != json_nbytes or len(padding) >= ALIGNMENT or any(padding) or reserved:
            raise WireError(WireReason.MALFORMED, "the header's lengths do not add up")
        if dtype >= len(DTYPES):
            raise WireError(WireReason.MALFORMED, f"unknown dtype {dtype}")
        if hashlib.sha256(text).digest() != strategy_digest:
            raise WireError(WireReason.STRATEGY_MISMATCH, "the strategy is not the digest's")
        try:
            return cls(
                strategy=_strategy(text),
                bundle=None if bundle == _NO_DIGEST else f"sha256:{bundle.hex()}",
                model_fingerprint=f"sha256:{fingerprint.hex()}",
                layout=KVLayout(
                    layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype=DTYPES[dtype]
                ),
                layers=range(first_layer, end_layer),
                tokens=range(first_token, end_token),
            )
        except (SpecError, ValueError, RecursionError) as error:
            raise WireError(WireReason.MALFORMED, f"the header is no header: {error}") from error


@lru_cache(maxsize=_STRATEGIES)
def _strategy(text: bytes) -> StrategyConfig:
    """Return the strategy of a header; the last few are kept, because all blobs of a transfer have the same.

    Raises:
        WireError: The JSON is not canonical.
        SpecError: It is no strategy.
        ValueError: It is no JSON.
    """
    strategy = StrategyConfig.from_json(json.loads(text))
    if strategy.canonical() != text:
        raise WireError(WireReason.MALFORMED, "the strategy's JSON is not canonical")
    return strategy


def _header_crc32(prefix: bytes, body: memoryview) -> int:
    """Return the CRC-32 of a prefix with its CRC field as zero, and of the header."""
    at = _PREFIX.size - 20
    return zlib.crc32(body, zlib.crc32(prefix[:at] + bytes(4) + prefix[at + 4 :]))


def _raw_digest(field: str, text: str) -> bytes:
    """Return the 32 bytes of ``sha256:<64 hex digits>``."""
    if not _DIGEST.fullmatch(text):
        raise SpecError(field, f"must be sha256: and 64 hex digits, got {text!r}")
    return bytes.fromhex(text[7:])
