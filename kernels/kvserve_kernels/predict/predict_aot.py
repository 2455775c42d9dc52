"""The predict kernels, each with the types and sizes at which its machine code is held to a budget."""

from typing import Final

from kvserve_kernels.aot import Case
from kvserve_kernels.predict import predict_triton

CASES: Final = (
    Case(
        name="predict.apply",
        kernel=predict_triton.apply_kernel,
        types={
            "before": "*fp32",
            "sources": "*i32",
            "weights": "*fp16",
            "out": "*fp32",
            "tokens": "i32",
            "channels": "i32",
        },
        constants={"SOURCES": 4, "TOKENS": 16, "CHANNELS": 128},
        values=2048,
        nbytes=8,
    ),
)
