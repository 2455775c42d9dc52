"""Canonical JSON and the digests made of it.

Whatever is identified by its content (strategies, Pareto sets, inputs of a profiling run) is identified by the
SHA-256 of its canonical JSON: keys sorted, no spaces, UTF-8, no NaN or infinity.
"""

import hashlib
import json
from typing import Any

from kvserve_api.errors import SpecError


def canonical_json(value: Any) -> bytes:
    """Return the canonical JSON of a value made of dicts, lists, strings, numbers, booleans and None.

    Raises:
        SpecError: The value holds NaN, infinity or something JSON has no form for.
    """
    try:
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise SpecError("json", f"has no canonical form: {error}") from error
    return text.encode()


def digest_bytes(data: bytes) -> str:
    """Return ``sha256:<64 hex digits>`` of the bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest(value: Any) -> str:
    """Return the digest of the value's canonical JSON, as ``sha256:<64 hex digits>``."""
    return digest_bytes(canonical_json(value))


def short_digest(full: str, length: int = 10) -> str:
    """Return the first hex digits of a digest, for names; never for comparison."""
    return full.removeprefix("sha256:")[:length]
