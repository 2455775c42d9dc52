"""The hadamard kernels, each with the types and sizes at which its machine code is held to a budget."""

from typing import Final

from kvserve_kernels.aot import Case
from kvserve_kernels.hadamard import hadamard_triton

CASES: Final = (
    Case(
        name="hadamard.transform",
        kernel=hadamard_triton.transform_kernel,
        types={"x": "*i16", "out": "*fp32", "blocks": "i32", "factor": "fp32"},
        constants={"SIZE": 128, "STAGES": 7, "SEVERAL": 32},
        values=4096,
        nbytes=6,
    ),
)
