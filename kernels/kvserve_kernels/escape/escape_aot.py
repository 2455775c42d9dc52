"""The escape kernels, each with the types and sizes at which its machine code is held to a budget."""

from typing import Final

from kvserve_kernels.aot import Case
from kvserve_kernels.escape import escape_triton

CASES: Final = (
    Case(
        name="escape.histogram",
        kernel=escape_triton.histogram_kernel,
        types={"data": "*u8", "frequencies": "*i32", "count": "i32"},
        constants={"BLOCK": 4096},
        values=4096,
        nbytes=1,
    ),
    Case(
        name="escape.codes",
        kernel=escape_triton.codes_kernel,
        types={"data": "*u8", "code_of": "*u8", "codes": "*u8", "escaped": "*i32", "count": "i32"},
        constants={"BLOCK": 4096},
        warps=8,
        values=4096,
        nbytes=1.5,
    ),
    Case(
        name="escape.escapes",
        kernel=escape_triton.escapes_kernel,
        types={
            "data": "*u8",
            "code_of": "*u8",
            "offsets": "*i32",
            "positions": "*i16",
            "values": "*u8",
            "count": "i32",
        },
        constants={"CHUNK": 65_536, "BLOCK": 4096},
        warps=8,
        values=4096,
        nbytes=1,
    ),
    Case(
        name="escape.bytes",
        kernel=escape_triton.bytes_kernel,
        types={"codes": "*u8", "book": "*u8", "data": "*u8", "count": "i32"},
        constants={"BLOCK": 4096},
        warps=8,
        values=4096,
        nbytes=1.5,
    ),
    Case(
        name="escape.patch",
        kernel=escape_triton.patch_kernel,
        types={
            "positions": "*i16",
            "values": "*u8",
            "offsets": "*i32",
            "data": "*u8",
            "failed": "*i32",
            "count": "i32",
        },
        constants={"CHUNK": 65_536, "BLOCK": 1024},
        warps=8,
        counted=False,
    ),
)
