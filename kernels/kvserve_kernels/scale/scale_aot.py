"""The scale kernels, each with the types and sizes at which its machine code is held to a budget."""

from typing import Final

from kvserve_kernels.aot import Case
from kvserve_kernels.scale import scale_triton

CASES: Final = (
    Case(
        name="scale.exponents",
        kernel=scale_triton.exponents_kernel,
        types={"x": "*i16", "exponents": "*u8", "failed": "*i32", "rows": "i32", "dim": "i32"},
        constants={"ROWS": 128},
        values=128 * 128,
        trips=(32,),
        nbytes=2,
    ),
    Case(
        name="scale.multiply",
        kernel=scale_triton.multiply_kernel,
        types={
            "x": "*i16",
            "table": "*fp32",
            "exponents": "*u8",
            "out": "*fp32",
            "rows": "i32",
            "dim": "i32",
        },
        constants={"DIM": 128, "SEVERAL": 16},
        values=2048,
        nbytes=6,
    ),
)
