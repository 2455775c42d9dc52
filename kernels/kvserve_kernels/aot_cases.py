"""The GPU kernels, each with the types and sizes at which its machine code is held to a budget.

Sizes are those of a model with 8 key-value heads of 128 values. A group of the linear transform is the keys and values
of two layers: 4,096 values a token, of which half the components live.
"""

from typing import Final

from kvserve_kernels.absmax import absmax_triton
from kvserve_kernels.aot import Case
from kvserve_kernels.escape import escape_triton
from kvserve_kernels.floats import floats_triton
from kvserve_kernels.fp8 import fp8_triton
from kvserve_kernels.hadamard import hadamard_triton
from kvserve_kernels.ladder import ladder_triton
from kvserve_kernels.linear import kernels_triton
from kvserve_kernels.lloyd import lloyd_triton
from kvserve_kernels.mean import mean_triton
from kvserve_kernels.minmax import minmax_triton
from kvserve_kernels.pack import pack_triton
from kvserve_kernels.predict import predict_triton
from kvserve_kernels.rans import rans_triton, symbols_triton
from kvserve_kernels.rotate import rotate_triton
from kvserve_kernels.scale import scale_triton
from kvserve_kernels.step import step_triton

WIDTH: Final = 4096
COMPONENTS: Final = 2048
CODED_BITS: Final = 2.0
"""Bits a level, where bytes of coded words are reckoned."""

_CHANNELS: Final = 4096
# lines of 128 bytes among those of a table of 4,096 slots that 32 lanes touch
_SLOT_LINES: Final = 128 * (1 - (1 - 1 / 128) ** 32) / 32
# 32 divisors of 8 bytes are two lines
_DIVISOR_LINES: Final = 2 / 32
_RANS: Final = frozenset({"values", "words", "states", "channels", "tokens", "streams", "last_row"})
_DECODE: Final = {
    "values": "*i16",
    "words": "*i16",
    "offsets": "*i32",
    "states": "*i32",
    "slots": "*i32",
    "channel_facts": "*i32",
    "planes": "*i32",
    "sound": "*i8",
    "channels": "i32",
    "tokens": "i32",
    "streams": "i32",
}
_ENCODE: Final = {
    "values": "*i16",
    "words": "*i16",
    "counts": "*i32",
    "states": "*i32",
    "divisors": "*i64",
    "channel_facts": "*i32",
    "last_row": "i32",
    "channels": "i32",
    "tokens": "i32",
    "streams": "i32",
}
_PIECE: Final = {
    "tokens": "i32",
    "row_stride": "i64",
    "token_stride": "i32",
    "head_stride": "i32",
    "count": "i32",
}
_SLOTS: Final = {"slots": "*i32", "heads": "*i32", "rotations": "*i32", "mean": "*fp32"}
_TURNS: Final = {"cos": "*fp32", "sin": "*fp32"}
_HEAD: Final = {"DIM": 128, "PAIRS": 64, "HALF": 64, "INTERLEAVED": False}
_ROWS: Final = {"rows": "i32", "dim": "i32", "group": "i32", "groups": "i32", "top": "i32"}
_COLUMNS: Final = {"tokens": "i32", "columns": "i32", "group": "i32", "top": "i32"}
_TOP: Final = {"rows": "i32", "dim": "i32", "top": "i32"}
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
_BOUNDS: Final = {"lo": "*i16", "hi": "*i16"}


def _decode(streams: int) -> Case:
    return Case(
        name=f"rans.decode.{streams}",
        kernel=rans_triton.decode_kernel,
        types=_DECODE,
        constants={"GROUPS": 1, "STREAMS": streams, "PLANES": False},
        warps=1,
        unaligned=_RANS,
        values=_CHANNELS * 32 * streams,
        trips=(_CHANNELS,),
        marker=("REDUX", streams),
        nbytes=CODED_BITS / 8 + 2,
        lines=_SLOT_LINES,
        per="level",
    )


def _encode(streams: int) -> Case:
    return Case(
        name=f"rans.encode.{streams}",
        kernel=rans_triton.encode_kernel,
        types=_ENCODE,
        constants={"GROUPS": 1, "STREAMS": streams},
        warps=1,
        unaligned=_RANS,
        values=_CHANNELS * 32 * streams,
        trips=(_CHANNELS,),
        marker=("REDUX", streams),
        nbytes=2 + CODED_BITS / 8,
        lines=_DIVISOR_LINES,
        per="level",
    )


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
    _decode(1),
    _decode(4),
    Case(
        name="rans.decode.low_bits",
        kernel=rans_triton.decode_kernel,
        types=_DECODE,
        constants={"GROUPS": 1, "STREAMS": 4, "PLANES": True},
        warps=1,
        unaligned=_RANS,
        counted=False,
    ),
    Case(
        name="rans.decode.groups",
        kernel=rans_triton.decode_kernel,
        types=_DECODE,
        constants={"GROUPS": 4, "STREAMS": 1, "PLANES": False},
        warps=1,
        unaligned=_RANS,
        values=_CHANNELS * 32 * 4,
        trips=(_CHANNELS,),
        marker=("REDUX", 4),
        nbytes=CODED_BITS / 8 + 2,
        lines=_SLOT_LINES,
        per="level",
    ),
    _encode(1),
    _encode(4),
    Case(
        name="rans.gather",
        kernel=rans_triton.gather_kernel,
        types={"words": "*i16", "offsets": "*i32", "out": "*i16", "capacity": "i32"},
        constants={"BLOCK": 4096},
        values=4096 * 16 / CODED_BITS,
        nbytes=2 * CODED_BITS / 8,
        per="level",
    ),
    Case(
        name="rans.planes",
        kernel=symbols_triton.planes_kernel,
        types={
            "values": "*i16",
            "planes": "*i32",
            "channel_facts": "*i32",
            "tokens": "i32",
            "groups": "i32",
        },
        constants={"GROUPS": 8},
        counted=False,
    ),
    Case(
        name="rans.escapes",
        kernel=symbols_triton.escapes_kernel,
        types={
            "values": "*i16",
            "escapes": "*i16",
            "offsets": "*i32",
            "channel_facts": "*i32",
            "tokens": "i32",
            "count": "i32",
        },
        constants={"PUT": True, "BLOCK": 1024},
        counted=False,
    ),
    Case(
        name="linear.prepare",
        kernel=kernels_triton.prepare_kernel,
        types={
            "native": "*i16",
            **_SLOTS,
            "inv_scale": "*fp32",
            **_TURNS,
            "x8": "*i8",
            "shifts": "*i8",
            **_PIECE,
            "stride": "i32",
        },
        constants={**_HEAD, "SLOTS": WIDTH // 128, "WHOLE": True},
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
            **_TURNS,
            "out": "*i16",
            "components": "i32",
            **_PIECE,
            "stride": "i32",
        },
        constants={**_HEAD, "SLOTS": 1, "BLOCK_T": 128, "BLOCK_C": 64},
        warps=8,
        values=128 * 128,
        trips=(COMPONENTS / 64,),
        nbytes=2 + 2 * COMPONENTS / WIDTH,
        tensor=(2.0 * COMPONENTS, "bfloat16"),
    ),
    Case(
        name="rotate.undo",
        kernel=rotate_triton.rotate_kernel,
        types={
            "x": "*i16",
            **_TURNS,
            "out": "*fp32",
            "rows": "i32",
            "tokens": "i32",
            "heads": "i32",
        },
        constants={**_HEAD, "UNDO": True, "SEVERAL": 16},
        unaligned=frozenset({"tokens", "heads"}),
        values=2048,
        nbytes=6,
    ),
    *_pack(4),
    *_pack(3),
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
    Case(
        name="floats.split",
        kernel=floats_triton.split_kernel,
        types={"words": "*i16", "exponents": "*u8", "rest": "*u8", "count": "i32"},
        constants={"MANTISSA": 7, "BLOCK": 2048},
        values=2048,
        nbytes=4,
    ),
    Case(
        name="floats.join",
        kernel=floats_triton.join_kernel,
        types={"exponents": "*u8", "rest": "*u8", "words": "*i16", "count": "i32"},
        constants={"MANTISSA": 7, "BLOCK": 2048},
        values=2048,
        nbytes=4,
    ),
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
    Case(
        name="fp8.encode",
        kernel=fp8_triton.encode_kernel,
        types={"x": "*i16", "codes": "*u8", "peaks": "*i16", "rows": "i32", "dim": "i32"},
        constants={"SCALED": True, "DIM": 128, "SEVERAL": 16},
        values=2048,
        nbytes=3,
    ),
    Case(
        name="fp8.decode",
        kernel=fp8_triton.decode_kernel,
        types={"codes": "*u8", "peaks": "*i16", "out": "*i16", "rows": "i32", "dim": "i32"},
        constants={"SCALED": True, "DIM": 128, "SEVERAL": 16},
        values=2048,
        nbytes=3,
    ),
    Case(
        name="hadamard.transform",
        kernel=hadamard_triton.transform_kernel,
        types={"x": "*i16", "out": "*fp32", "blocks": "i32", "factor": "fp32"},
        constants={"SIZE": 128, "STAGES": 7, "SEVERAL": 32},
        values=4096,
        nbytes=6,
    ),
    Case(
        name="absmax.encode",
        kernel=absmax_triton.encode_kernel,
        types={"x": "*i16", "codes": "*u8", "peaks": "*i16", **_TOP},
        constants={"DIM": 128, "SEVERAL": 16},
        unaligned=frozenset({"top"}),
        values=2048,
        nbytes=3,
    ),
    Case(
        name="absmax.decode",
        kernel=absmax_triton.decode_kernel,
        types={"codes": "*u8", "peaks": "*i16", "out": "*i16", **_TOP},
        constants={"DIM": 128, "SEVERAL": 16},
        unaligned=frozenset({"top"}),
        values=2048,
        nbytes=3,
    ),
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
    Case(
        name="scale.exponents",
        kernel=scale_triton.exponents_kernel,
        types={"x": "*i16", "exponents": "*u8", "failed": "*i32", "rows": "i32", "dim": "i32"},
        constants={"ROWS": 128},
        values=128 * 128,
        trips=(32,),
        nbytes=2,
    ),
    Case(
        name="scale.multiply",
        kernel=scale_triton.multiply_kernel,
        types={
            "x": "*i16",
            "table": "*fp32",
            "exponents": "*u8",
            "out": "*fp32",
            "rows": "i32",
            "dim": "i32",
        },
        constants={"DIM": 128, "SEVERAL": 16},
        values=2048,
        nbytes=6,
    ),
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
