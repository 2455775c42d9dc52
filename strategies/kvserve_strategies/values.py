"""Conversion between tensors, arrays of a form, and what kernels compute on."""

from typing import Any

import numpy as np
import torch

from kvserve_api.errors import StrategyError, WireError, WireReason
from kvserve_api.wire import BYTES
from kvserve_kernels.finite import all_finite
from kvserve_strategies.stage import Array, Bytes, Form, Spec

_TORCH_NAMES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.uint8: BYTES,
}
_LARGEST_HALF = np.float32(65504)


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16``, ``float16``, ``float32`` or ``uint8``.

    Raises:
        StrategyError: It is another dtype.
    """
    if dtype not in _TORCH_NAMES:
        raise StrategyError("dtype", f"must be bfloat16, float16, float32 or uint8, got {dtype}")
    return _TORCH_NAMES[dtype]


def to_array(tensor: torch.Tensor) -> Array:
    """Return a tensor's memory as an array, copied only if it is not contiguous.

    Args:
        tensor: ``[layers, tokens, kv_heads, head_dim]`` on the CPU.

    Returns:
        The same shape: uint16 bits for bfloat16, else float16, float32 or uint8.
    """
    if tensor.device.type != "cpu":
        raise StrategyError("keys/values", f"must be on the CPU, got {tensor.device}")
    plain = tensor.detach().contiguous()
    if plain.dtype == torch.bfloat16:
        bits: Array = plain.view(torch.int16).numpy().view(np.uint16)
        return bits
    array: Array = plain.numpy()
    return array


def to_tensor(array: Array, dtype: str) -> torch.Tensor:
    """Undo `to_array`; memory is shared if it may be written to."""
    own = array if array.flags.writeable else array.copy()
    if dtype == "bfloat16":
        return torch.from_numpy(own.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(own)


def load(value: Array) -> Array:
    """Return a NATIVE or REAL value as kernels take it: float32, or uint16 bits of bfloat16."""
    return value.astype(np.float32) if value.dtype == np.float16 else value


def store(value: Array, dtype: np.dtype[Any]) -> Array:
    """Undo `load`: to float16 where that is wanted, held at the largest finite number."""
    if dtype != np.float16:
        return value
    return np.clip(value, -_LARGEST_HALF, _LARGEST_HALF).astype(np.float16)


def cut(section: Bytes, what: str, *shapes: tuple[int, ...], dtype: np.dtype[Any]) -> list[Array]:
    """Return arrays of one type that fill a section exactly.

    Raises:
        WireError: The section has another length.
    """
    sizes = [int(np.prod(shape)) * dtype.itemsize for shape in shapes]
    if section.size != sum(sizes):
        raise WireError(
            WireReason.MALFORMED, f"{what} takes {sum(sizes)} bytes, got {section.size}"
        )
    arrays, at = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        arrays.append(section[at : at + size].view(dtype).reshape(shape))
        at += size
    return arrays


def require_finite(array: Array, spec: Spec, what: str) -> None:
    """Refuse NaN and infinity in what a peer sent beside a NATIVE or REAL value."""
    dtype = spec.dtype if spec.form == Form.NATIVE else "float32"
    if not all_finite(array, dtype):
        raise WireError(WireReason.MALFORMED, f"{what} holds NaN or infinity")
