"""Tensors in files: written by safetensors, and read back with nothing taken on trust."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from kvserve_api.errors import ArtifactError

_NAMES: Final[Mapping[str, np.dtype[Any]]] = {
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_HEADER_NBYTES: Final = 4096
_ENTRY_NBYTES: Final = 256
"""More than safetensors' header takes, and takes for each tensor."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a tensor must be.

    Attributes:
        dtype: float16 or float32.
        shape: Its shape.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def max_nbytes(forms: Mapping[str, Form]) -> int:
    """Return the most bytes that a file of these tensors has."""
    return _HEADER_NBYTES + sum(form.nbytes + _ENTRY_NBYTES for form in forms.values())


def pack(name: str, tensors: Mapping[str, NDArray[Any]], forms: Mapping[str, Form]) -> bytes:
    """Return the file of these tensors; the same tensors give the same bytes.

    Raises:
        ArtifactError: A tensor is not of its form, or not finite.
    """
    check(name, tensors, forms)
    plain = {key: np.ascontiguousarray(tensors[key]) for key in sorted(tensors)}
    return bytes(safetensors.numpy.save(plain))


def unpack(name: str, data: bytes, forms: Mapping[str, Form]) -> dict[str, NDArray[Any]]:
    """Read a file.

    Args:
        name: Of the file, for errors.
        data: Its bytes.
        forms: What it must hold, exactly.

    Returns:
        Read-only arrays.

    Raises:
        ArtifactError: It is no such file, or a value is not finite.
    """
    try:
        entries: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except (safetensors.SafetensorError, ValueError, OverflowError) as error:
        raise ArtifactError(name, f"is not safetensors: {error}") from error
    tensors: dict[str, NDArray[Any]] = {}
    for key, entry in entries:
        dtype = _NAMES.get(entry["dtype"])
        if dtype is None:
            raise ArtifactError(name, f"{key} has dtype {entry['dtype']}; F16 or F32 is known")
        array: NDArray[Any] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
        array.flags.writeable = False
        tensors[key] = array
    check(name, tensors, forms)
    return tensors


def check(name: str, tensors: Mapping[str, NDArray[Any]], forms: Mapping[str, Form]) -> None:
    """Refuse tensors that are not exactly of these forms and finite.

    Raises:
        ArtifactError: The error names the first tensor that is not.
    """
    for key in sorted(forms.keys() ^ tensors.keys()):
        raise ArtifactError(name, f"{key} is {'missing' if key in forms else 'not known'}")
    for key, form in forms.items():
        array = tensors[key]
        if array.dtype != form.dtype or array.shape != form.shape:
            raise ArtifactError(
                name,
                f"{key} must be {form.dtype} {list(form.shape)}, "
                f"is {array.dtype} {list(array.shape)}",
            )
        if not np.isfinite(array).all():
            raise ArtifactError(name, f"{key} holds NaN or infinity")


def sha256(data: bytes) -> str:
    """Return the 64 hex digits."""
    return hashlib.sha256(data).hexdigest()
