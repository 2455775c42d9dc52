"""The linear transform by the C library, on processors with AVX-512 and its integer dot products.

Products run on the tile unit (AMX) where there is one. Matrices are laid out for both once a plan and kept with it.
"""

import ctypes
from enum import IntEnum
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.linear.plan import Cells, Group, Plan, halves_of
from kvserve_kernels.native import Simd, coder, simd

_TYPES = {np.dtype(np.uint16): 0, np.dtype(np.float16): 1, np.dtype(np.float32): 2}
_DONE, _REFUSED = 0, 1
_LINE = 64


class Level(IntEnum):
    """What a processor has; the C code knows these numbers."""

    NONE = 0
    INT8_DOTS = 1
    BF16_DOTS = 2
    TILES = 3


def _structure(integers: str, pointers: str, floats: str = "") -> Any:
    return [
        (name, kind)
        for names, kind in (
            (integers, ctypes.c_int64),
            (pointers, ctypes.c_void_p),
            (floats, ctypes.c_float),
        )
        for name in names.split()
    ]


class _Group(ctypes.Structure):
    _fields_ = _structure(
        "slots width components stored",
        "rows heads rotations mean inv_scale factor offset delta bias matrix inverse",
        "unit",
    )


class _Piece(ctypes.Structure):
    _fields_ = _structure(
        "tokens dim row_stride token_stride head_stride type pairs is_interleaved rows",
        "values more cos sin order",
    )


class About:
    """A piece as the C code reads it, with the arrays it points into; the arrays fit each other.

    Attributes:
        piece: What ``Piece`` in linear.h is.
    """

    def __init__(
        self,
        cells: Cells,
        cos: NDArray[np.float32],
        sin: NDArray[np.float32],
        interleaved: bool,
        order: NDArray[np.int32] | None = None,
    ) -> None:
        halves = halves_of(cells)
        first = halves[0]
        tables = [np.ascontiguousarray(table) for table in (cos, sin)]
        self._held = (halves, tables, order)
        self.piece = _Piece(
            first.shape[1], first.shape[3], *first.strides[:3], _TYPES[first.dtype], cos.shape[2], interleaved,
            first.shape[0], *(half.ctypes.data for half in (first, halves[-1])),
            *(table.ctypes.data for table in tables), None if order is None else order.ctypes.data,
        )  # fmt: skip


class _Packed:
    """A plan as the C code reads it, with the arrays it points into."""

    def __init__(self, plan: Plan) -> None:
        self.groups = (_Group * len(plan.groups))()
        self._arrays = [_pack(group, plan.dim) for group in plan.groups]
        for to, group, arrays in zip(self.groups, plan.groups, self._arrays, strict=True):
            stored = (group.base or group).components
            sizes = (group.rows.size, group.width, group.components, stored)
            to.__init__(*sizes, *(array.ctypes.data for array in arrays), group.unit)


_packed: WeakKeyDictionary[Plan, _Packed] = WeakKeyDictionary()
_matrices: WeakKeyDictionary[Group, list[NDArray[Any]]] = WeakKeyDictionary()


@cache
def _widest() -> Level:
    library = coder()
    return Level.NONE if library is None else Level(library.kvserve_linear_widest())


def level() -> Level:
    """Return what this processor can do, or NONE where ``$KVSERVE_SIMD`` asks for less."""
    return _widest() if simd() == Simd.AVX512 else Level.NONE


def forward(
    native: Cells,
    plan: Plan,
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    interleaved: bool,
    with_level: Level,
) -> NDArray[np.int16] | None:
    """Map values to levels, at least with INT8_DOTS; see `linear_cpu.forward`."""
    about = About(native, cos, sin, interleaved)
    levels = np.empty((plan.components, about.piece.tokens), np.int16)
    return levels if _call("kvserve_linear_forward", with_level, about, plan, levels) else None


def inverse(
    levels: NDArray[np.int16],
    plan: Plan,
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    interleaved: bool,
    out: Cells,
    with_level: Level,
) -> None:
    """Map levels to values, at least with INT8_DOTS; see `linear_cpu.inverse`."""
    about = About(out, cos, sin, interleaved)
    _call("kvserve_linear_inverse", with_level, about, plan, np.ascontiguousarray(levels))


def packed(plan: Plan) -> Any:
    """Return the groups of a plan as the C code reads them, an array of ``Group`` in linear.h; kept with the plan."""
    kept = _packed.get(plan)
    if kept is None:
        kept = _packed[plan] = _Packed(plan)
    return kept.groups


def _call(name: str, level: Level, about: About, plan: Plan, levels: NDArray[np.int16]) -> bool:
    """Call the library; return whether it could do it.

    Raises:
        MemoryError: There is none for the scratch arrays, about 1.5 MB.
    """
    groups = packed(plan)
    status: int = getattr(coder(), name)(
        level, ctypes.byref(about.piece), groups, len(groups), levels.ctypes.data
    )
    if status not in (_DONE, _REFUSED):
        raise MemoryError
    return status == _DONE


def _pack(group: Group, dim: int) -> list[NDArray[Any]]:
    """Return the arrays of a group in the order of the C code."""
    base = group.base or group
    matrices = _matrices.get(base)
    if matrices is None:
        matrices = _matrices[base] = _pack_matrices(base, dim)
    return [
        group.rows,
        group.heads,
        group.rotations,
        group.mean,
        group.inv_scale,
        *(_pad(array, 0, 32) for array in (group.factor, group.offset, group.delta)),
        *matrices,
    ]


def _pack_matrices(group: Group, dim: int) -> list[NDArray[Any]]:
    """Return bias, matrix and inverse in the layout of the C code; see linear.h."""
    matrix = _pad(_pad(group.matrix, 0, 32), 1, 64)
    bias = (128 * matrix.sum(axis=1, dtype=np.int64)).astype(np.int32)
    rows, columns = matrix.shape
    tiles = matrix.reshape(rows // 16, 16, columns // 64, 64).swapaxes(1, 2)

    slots = group.rows.size
    inverse = group.inverse_bits.reshape(-1, slots, dim)
    inverse = _pad(_pad(inverse, 0, 32), 2, 32)
    shape = (inverse.shape[0] // 32, 16, 2, slots, inverse.shape[2] // 16, 16)
    inverse_tiles = inverse.reshape(shape).transpose(3, 4, 0, 1, 5, 2)
    return [bias, _aligned(tiles), _aligned(inverse_tiles)]


def _pad(array: NDArray[Any], axis: int, unit: int) -> NDArray[Any]:
    """Return the array with zeros after it up to a multiple of a unit."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % unit)
    return np.pad(array, widths)


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """Return a contiguous copy that starts on a cache line."""
    raw = np.empty(array.nbytes + _LINE, np.uint8)
    start = -raw.ctypes.data % _LINE
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
