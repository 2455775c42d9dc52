"""The lloyd kernels, each with the types and sizes at which its machine code is held to a budget."""

from typing import Final

from kvserve_kernels.aot import Case
from kvserve_kernels.lloyd import lloyd_triton

CASES: Final = (
    Case(
        name="lloyd.roots",
        kernel=lloyd_triton.roots_kernel,
        types={"x": "*i16", "out": "*i16", "failed": "*i32", "rows": "i32", "dim": "i32"},
        constants={"ROWS": 128},
        values=128 * 128,
        trips=(32,),
        nbytes=2,
    ),
    Case(
        name="lloyd.encode",
        kernel=lloyd_triton.encode_kernel,
        types={
            "x": "*fp32",
            "scales": "*i16",
            "thresholds": "*fp32",
            "codes": "*u8",
            "rows": "i32",
            "dim": "i32",
        },
        constants={"COUNT": 15, "DIM": 128, "SEVERAL": 16},
        values=2048,
        nbytes=5,
    ),
    Case(
        name="lloyd.decode",
        kernel=lloyd_triton.decode_kernel,
        types={
            "codes": "*u8",
            "scales": "*i16",
            "centroids": "*fp32",
            "out": "*fp32",
            "rows": "i32",
            "dim": "i32",
            "last": "i32",
        },
        constants={"DIM": 128, "SEVERAL": 16},
        unaligned=frozenset({"last"}),
        values=2048,
        nbytes=5,
    ),
)
