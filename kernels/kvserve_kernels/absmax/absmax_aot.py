"""The absmax kernels, each with the types and sizes at which its machine code is held to a budget."""

from typing import Final

from kvserve_kernels.absmax import absmax_triton
from kvserve_kernels.aot import Case

_TOP: Final = {"rows": "i32", "dim": "i32", "top": "i32"}

CASES: Final = (
    Case(
        name="absmax.encode",
        kernel=absmax_triton.encode_kernel,
        types={"x": "*i16", "codes": "*u8", "peaks": "*i16", **_TOP},
        constants={"DIM": 128, "SEVERAL": 16},
        unaligned=frozenset({"top"}),
        values=2048,
        nbytes=3,
    ),
    Case(
        name="absmax.decode",
        kernel=absmax_triton.decode_kernel,
        types={"codes": "*u8", "peaks": "*i16", "out": "*i16", **_TOP},
        constants={"DIM": 128, "SEVERAL": 16},
        unaligned=frozenset({"top"}),
        values=2048,
        nbytes=3,
    ),
)
