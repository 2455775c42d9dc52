"""The step kernels, each with the types and sizes at which its machine code is held to a budget."""

from typing import Final

from kvserve_kernels.aot import Case
from kvserve_kernels.step import step_triton

CASES: Final = (
    Case(
        name="step.sums",
        kernel=step_triton.sums_kernel,
        types={"x": "*i16", "out": "*i16", "tokens": "i32", "columns": "i32"},
        constants={"SQUARES": False, "COLUMNS": 128},
        values=1024 * 128,
        trips=(1024,),
        marker=("LDG", 1),
        nbytes=2,
    ),
    Case(
        name="step.squares",
        kernel=step_triton.sums_kernel,
        types={"x": "*fp32", "out": "*fp64", "tokens": "i32", "columns": "i32"},
        constants={"SQUARES": True, "COLUMNS": 128},
        values=1024 * 128,
        trips=(1024,),
        marker=("LDG", 1),
        nbytes=4,
    ),
    Case(
        name="step.whole",
        kernel=step_triton.whole_kernel,
        types={"of_columns": "*fp64", "out": "*fp64", "columns": "i32"},
        warps=1,
        counted=False,
    ),
    Case(
        name="step.subtract",
        kernel=step_triton.shift_kernel,
        types={
            "x": "*i16",
            "means": "*i16",
            "out": "*fp32",
            "failed": "*i32",
            "tokens": "i32",
            "columns": "i32",
        },
        constants={"ADD": False, "TOKENS": 16, "COLUMNS": 128},
        values=2048,
        nbytes=6,
    ),
    Case(
        name="step.add",
        kernel=step_triton.shift_kernel,
        types={
            "x": "*fp32",
            "means": "*i16",
            "out": "*i16",
            "failed": "*i32",
            "tokens": "i32",
            "columns": "i32",
        },
        constants={"ADD": True, "TOKENS": 16, "COLUMNS": 128},
        values=2048,
        nbytes=6,
    ),
    Case(
        name="step.quantise",
        kernel=step_triton.quantise_kernel,
        types={
            "x": "*fp32",
            "steps": "*fp32",
            "codes": "*i16",
            "failed": "*i32",
            "count": "i32",
        },
        constants={"BLOCK": 2048},
        values=2048,
        nbytes=6,
    ),
    Case(
        name="step.dequantise",
        kernel=step_triton.dequantise_kernel,
        types={"codes": "*i16", "steps": "*fp32", "out": "*fp32", "count": "i32"},
        constants={"BLOCK": 2048},
        values=2048,
        nbytes=6,
    ),
)
