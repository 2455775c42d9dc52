"""The fp8 kernels, each with the types and sizes at which its machine code is held to a budget."""

from typing import Final

from kvserve_kernels.aot import Case
from kvserve_kernels.fp8 import fp8_triton

CASES: Final = (
    Case(
        name="fp8.encode",
        kernel=fp8_triton.encode_kernel,
        types={"x": "*i16", "codes": "*u8", "peaks": "*i16", "rows": "i32", "dim": "i32"},
        constants={"SCALED": True, "DIM": 128, "SEVERAL": 16},
        values=2048,
        nbytes=3,
    ),
    Case(
        name="fp8.decode",
        kernel=fp8_triton.decode_kernel,
        types={"codes": "*u8", "peaks": "*i16", "out": "*i16", "rows": "i32", "dim": "i32"},
        constants={"SCALED": True, "DIM": 128, "SEVERAL": 16},
        values=2048,
        nbytes=3,
    ),
)
