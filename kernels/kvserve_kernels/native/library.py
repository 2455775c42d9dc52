"""Loading of the C library and the choice of an instruction set.

``$KVSERVE_SIMD`` overrules the choice, for tests and for comparison: ``avx512``, ``avx2`` or ``portable`` C, or
``numba`` for no native code. All give the same bytes.
"""

import ctypes
import os
from enum import IntEnum
from functools import cache
from typing import Final

from kvserve_api.errors import SpecError
from kvserve_kernels.native.build import library_path

_VARIABLE: Final = "KVSERVE_SIMD"
_P, _I64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES: Final = {
    "kvserve_widest": (_INT, ()),
    "kvserve_table_nbytes": (ctypes.c_size_t, ()),
    "kvserve_tables": (None, (_I64, _P, _P, _P, _P, _P, _P)),
    "kvserve_slots": (None, (_I64, _P, _P)),
    "kvserve_choose": (None, (_INT, _P, _I64, _I64, _P, _P)),
    "kvserve_live": (None, (_P, _I64, _I64, _P)),
    "kvserve_encode": (_INT, (_INT, _P, _I64, _I64, _I64, _P, _P, _P, _P)),
    "kvserve_decode": (
        _INT, (_INT, _I64, _I64, _I64, _P, _P, _P, _P, _P, _P, _P, _P, _I64, _P),
    ),
    "kvserve_transpose": (None, (_P, _I64, _I64, _I64, _INT, _P, _INT)),
    "kvserve_histograms": (None, (_P, _I64, _I64, _P, ctypes.c_int32, _I64, _I64, _P)),
    "kvserve_linear_widest": (_INT, ()),
    "kvserve_linear_forward": (_INT, (_INT, _P, _P, _I64, _P)),
    "kvserve_linear_inverse": (_INT, (_INT, _P, _P, _I64, _P)),
    "kvserve_fused_encode": (_INT, (_INT, _INT, _P, _P, _I64, _I64, _P, _P, _P)),
    "kvserve_fused_decode": (_INT, (_INT, _INT, _P, _P, _I64, _P, _P, _I64)),
    "kvserve_fused_encode_runs": (_INT, (_INT, _INT, _P, _P, _P, _I64, _P, _P, _P)),
    "kvserve_fused_decode_runs": (_INT, (_INT, _INT, _P, _P, _P, _I64, _P, _P, _P)),
    "kvserve_spreads": (None, (_P, _I64, _I64, _P, _P)),
    "kvserve_absmax_encode": (None, (_INT, _P, _I64, _I64, ctypes.c_float, _P, _P, _INT)),
    "kvserve_finite": (_INT, (_P, _I64, _INT)),
    "kvserve_blocks_put": (None, (_P, _I64, _I64, _P, _P, _P, _P)),
    "kvserve_blocks_take": (None, (_P, _I64, _I64, _P, _P, _P, _P)),
    "kvserve_tiles": (None, (_INT, _I64, _P, _P, _P, _P, _P)),
    "kvserve_tiles_back": (None, (_INT, _I64, _P, _P, _P, _P, _P)),
}  # fmt: skip


class Simd(IntEnum):
    """Who does the work; the C code knows all but NUMBA by these numbers."""

    NUMBA = -1
    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2


@cache
def coder() -> ctypes.CDLL | None:
    """Return the library of exactly these sources, or None; calls of it drop the interpreter lock."""
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        # not built, or for another processor or C library
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@cache
def _widest() -> Simd:
    library = coder()
    return Simd.NUMBA if library is None else Simd(library.kvserve_widest())


def simd() -> Simd:
    """Return who is to do the work: ``$KVSERVE_SIMD``, or the fastest there is.

    Raises:
        SpecError: The variable names what is not known or not supported here.
    """
    wanted = os.environ.get(_VARIABLE)
    if not wanted:
        return _widest()
    names = [level.name.lower() for level in Simd]
    if wanted not in names:
        raise SpecError(_VARIABLE, f"must be one of {', '.join(names)}, got {wanted!r}")
    level = Simd[wanted.upper()]
    if level > _widest():
        raise SpecError(
            _VARIABLE, f"{wanted} is not supported here, only up to {_widest().name.lower()}"
        )
    return level
