"""The floats kernels, each with the types and sizes at which its machine code is held to a budget."""

from typing import Final

from kvserve_kernels.aot import Case
from kvserve_kernels.floats import floats_triton

CASES: Final = (
    Case(
        name="floats.split",
        kernel=floats_triton.split_kernel,
        types={"words": "*i16", "exponents": "*u8", "rest": "*u8", "count": "i32"},
        constants={"MANTISSA": 7, "BLOCK": 2048},
        values=2048,
        nbytes=4,
    ),
    Case(
        name="floats.join",
        kernel=floats_triton.join_kernel,
        types={"exponents": "*u8", "rest": "*u8", "words": "*i16", "count": "i32"},
        constants={"MANTISSA": 7, "BLOCK": 2048},
        values=2048,
        nbytes=4,
    ),
)
