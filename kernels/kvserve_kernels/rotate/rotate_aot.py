"""The rotate kernels, each with the types and sizes at which its machine code is held to a budget."""

from typing import Final

from kvserve_kernels.aot import Case
from kvserve_kernels.rotate import rotate_triton

TURNS: Final = {"cos": "*fp32", "sin": "*fp32"}
HEAD: Final = {"DIM": 128, "PAIRS": 64, "HALF": 64, "INTERLEAVED": False}

CASES: Final = (
    Case(
        name="rotate.undo",
        kernel=rotate_triton.rotate_kernel,
        types={
            "x": "*i16",
            **TURNS,
            "out": "*fp32",
            "rows": "i32",
            "tokens": "i32",
            "heads": "i32",
        },
        constants={**HEAD, "UNDO": True, "SEVERAL": 16},
        unaligned=frozenset({"tokens", "heads"}),
        values=2048,
        nbytes=6,
    ),
)
