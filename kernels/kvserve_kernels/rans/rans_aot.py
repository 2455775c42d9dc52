"""The rans kernels, each with the types and sizes at which its machine code is held to a budget."""

from typing import Final

from kvserve_kernels.aot import Case
from kvserve_kernels.rans import rans_triton, symbols_triton

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
)
