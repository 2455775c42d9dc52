"""The ladder kernels, each with the types and sizes at which its machine code is held to a budget."""

from typing import Final

from kvserve_kernels.aot import Case
from kvserve_kernels.ladder import ladder_triton

CASES: Final = (
    Case(
        name="ladder.price",
        kernel=ladder_triton.price_kernel,
        types={
            "values": "*i16",
            "ones": "*i64",
            "table_prices": "*i32",
            "best": "*u8",
            "keeps": "*i32",
            "tokens": "i32",
            "tables": "i32",
            "shift": "i32",
            "keep": "i32",
        },
        warps=1,
        unaligned=frozenset({"tables", "shift", "keep"}),
        values=1024,
        trips=(1, 4),
        nbytes=2,
        per="level",
    ),
    Case(
        name="ladder.chain",
        kernel=ladder_triton.chain_kernel,
        types={"best": "*u8", "keeps": "*i32", "ids": "*u8", "channels": "i32"},
        warps=1,
        unaligned=frozenset({"channels"}),
        counted=False,
    ),
)
