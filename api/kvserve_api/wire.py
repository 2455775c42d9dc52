"""Identities that a blob of coded KV carries, and that both ends must agree on."""

from dataclasses import dataclass
from typing import Any

from kvserve_api.canonical import digest
from kvserve_api.errors import SpecError

DTYPES = ("bfloat16", "float16", "float32")
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayout:
    """The form of a model's KV cache, independent of how an engine stores it.

    Attributes:
        layers: Layers that have a KV cache.
        kv_heads: KV heads of one tensor-parallel rank.
        head_dim: Size of a head; the same for keys and values.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
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
