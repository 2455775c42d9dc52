"""The minmax kernels, each with the types and sizes at which its machine code is held to a budget."""

from typing import Final

from kvserve_kernels.aot import Case
from kvserve_kernels.minmax import minmax_triton

_ROWS: Final = {"rows": "i32", "dim": "i32", "group": "i32", "groups": "i32", "top": "i32"}
_COLUMNS: Final = {"tokens": "i32", "columns": "i32", "group": "i32", "top": "i32"}
_BOUNDS: Final = {"lo": "*i16", "hi": "*i16"}

CASES: Final = (
    Case(
        name="minmax.encode_rows",
        kernel=minmax_triton.encode_rows_kernel,
        types={"x": "*i16", "codes": "*u8", **_BOUNDS, "failed": "*i32", **_ROWS},
        constants={"GROUP": 64, "SEVERAL": 32},
        unaligned=frozenset({"groups", "top"}),
        values=2048,
        nbytes=3,
    ),
    Case(
        name="minmax.decode_rows",
        kernel=minmax_triton.decode_rows_kernel,
        types={"codes": "*u8", **_BOUNDS, "out": "*i16", **_ROWS},
        constants={"GROUP": 64, "SEVERAL": 32},
        unaligned=frozenset({"groups", "top"}),
        values=2048,
        nbytes=3,
    ),
    Case(
        name="minmax.encode_columns",
        kernel=minmax_triton.encode_columns_kernel,
        types={"x": "*i16", "codes": "*u8", **_BOUNDS, "failed": "*i32", **_COLUMNS},
        constants={"TOKENS": 16, "COLUMNS": 128},
        unaligned=frozenset({"tokens", "top"}),
        values=64 * 128,
        trips=(4, 4),
        nbytes=3,
    ),
    Case(
        name="minmax.decode_columns",
        kernel=minmax_triton.decode_columns_kernel,
        types={"codes": "*u8", **_BOUNDS, "out": "*i16", **_COLUMNS},
        constants={"TOKENS": 16, "COLUMNS": 128},
        unaligned=frozenset({"tokens", "top"}),
        values=64 * 128,
        trips=(4,),
        nbytes=3,
    ),
)
