"""The pack kernels, each with the types and sizes at which its machine code is held to a budget."""

from typing import Final

from kvserve_kernels.aot import Case
from kvserve_kernels.pack import pack_triton


def _pack(width: int) -> tuple[Case, Case]:
    word = {1: "*u8", 2: "*i16", 4: "*i32", 8: "*i64"}.get(width, "*u8")
    constants = {"WIDTH": width, "BLOCK": 512}
    return (
        Case(
            name=f"pack.pack.{width}",
            kernel=pack_triton.pack_kernel,
            types={"codes": "*u8", "out": word, "count": "i32"},
            constants=constants,
            values=4096,
            nbytes=1 + width / 8,
        ),
        Case(
            name=f"pack.unpack.{width}",
            kernel=pack_triton.unpack_kernel,
            types={"data": word, "codes": "*u8", "count": "i32"},
            constants=constants,
            values=4096,
            nbytes=1 + width / 8,
        ),
    )


CASES: Final = (
    *_pack(4),
    *_pack(3),
)
