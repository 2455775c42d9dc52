"""The linear kernels, each with the types and sizes at which its machine code is held to a budget."""

from typing import Final

from kvserve_kernels.aot import Case
from kvserve_kernels.linear import kernels_triton
from kvserve_kernels.rotate.rotate_aot import HEAD, TURNS

WIDTH: Final = 4096
COMPONENTS: Final = 2048
_PIECE: Final = {
    "tokens": "i32",
    "row_stride": "i64",
    "token_stride": "i32",
    "head_stride": "i32",
    "count": "i32",
}
_SLOTS: Final = {"slots": "*i32", "heads": "*i32", "rotations": "*i32", "mean": "*fp32"}

CASES: Final = (
    Case(
        name="linear.prepare",
        kernel=kernels_triton.prepare_kernel,
        types={
            "native": "*i16",
            **_SLOTS,
            "inv_scale": "*fp32",
            **TURNS,
            "x8": "*i8",
            "shifts": "*i8",
            **_PIECE,
            "stride": "i32",
        },
        constants={**HEAD, "SLOTS": WIDTH // 128, "WHOLE": True},
        values=WIDTH,
        nbytes=3,
    ),
    Case(
        name="linear.quantise",
        kernel=kernels_triton.quantise_kernel,
        types={
            "matrix": "*i8",
            "x8": "*i8",
            "shifts": "*i8",
            "factor": "*fp32",
            "offset": "*fp32",
            "levels": "*i16",
            "components": "i32",
            "tokens": "i32",
            "width": "i32",
        },
        constants={"BLOCK_C": 128, "BLOCK_T": 128, "BLOCK_W": 128},
        warps=8,
        values=128 * WIDTH * 128 / COMPONENTS,
        trips=(WIDTH / 128,),
        nbytes=1 + 2 * COMPONENTS / WIDTH,
        tensor=(2.0 * COMPONENTS, "int8"),
    ),
    Case(
        name="linear.dequantise",
        kernel=kernels_triton.dequantise_kernel,
        types={
            "levels": "*i16",
            "delta": "*fp32",
            "restored": "*bf16",
            "components": "i32",
            "tokens": "i32",
            "stride": "i32",
        },
        constants={"BLOCK": 1024},
        values=1024,
        nbytes=4,
        per="level",
    ),
    Case(
        name="linear.expand",
        kernel=kernels_triton.expand_kernel,
        types={
            "restored": "*bf16",
            "inverse": "*bf16",
            **_SLOTS,
            **TURNS,
            "out": "*i16",
            "components": "i32",
            **_PIECE,
            "stride": "i32",
        },
        constants={**HEAD, "SLOTS": 1, "BLOCK_T": 128, "BLOCK_C": 64},
        warps=8,
        values=128 * 128,
        trips=(COMPONENTS / 64,),
        nbytes=2 + 2 * COMPONENTS / WIDTH,
        tensor=(2.0 * COMPONENTS, "bfloat16"),
    ),
)
