"""The mean kernels, each with the types and sizes at which its machine code is held to a budget."""

from typing import Final

from kvserve_kernels.aot import Case
from kvserve_kernels.mean import mean_triton

_MEANS: Final = {
    "x": "*i16",
    "own": "*fp32",
    "other": "*fp32",
    "total": "*fp64",
    "total_other": "*fp64",
    "tokens": "i32",
    "token_stride": "i32",
    "width": "i32",
}

CASES: Final = (
    Case(
        name="mean.turned",
        kernel=mean_triton.sums_kernel,
        types=_MEANS,
        constants={"TURNS": True, "NEAR": 16, "WIDTH": 128},
        values=256 * 128,
        trips=(16,),
        # the angles of a token are the same for all layers, which follow each other
        nbytes=2,
    ),
    Case(
        name="mean.plain",
        kernel=mean_triton.sums_kernel,
        types=_MEANS,
        constants={"TURNS": False, "NEAR": 16, "WIDTH": 128},
        values=256 * 128,
        trips=(16,),
        nbytes=2,
    ),
    Case(
        name="mean.combine",
        kernel=mean_triton.combine_kernel,
        types={
            "levels": "*i16",
            "rows": "*i16",
            "total": "*fp64",
            "components": "i32",
            "width": "i32",
        },
        constants={"WIDTH": 128},
        counted=False,
    ),
)
