"""Loads and stores of cache values inside CPU kernels: float32 as it is, bfloat16 as the uint16 of its bits."""

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

_I32 = ir.IntType(32)
_I16 = ir.IntType(16)
_F32 = ir.FloatType()


@intrinsic
def widen(typingctx: Any, value: Any) -> Any:
    """Return the float32 of a float32 or of the bits of a bfloat16."""
    if value == types.uint16:

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            shifted = builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16))
            return builder.bitcast(shifted, _F32)

        return types.float32(types.uint16), codegen
    if value == types.float32:
        return types.float32(types.float32), lambda context, builder, signature, args: args[0]
    raise TypeError(f"widen takes float32 or bfloat16 bits, got {value}")


@intrinsic
def float_bits(typingctx: Any, value: Any) -> Any:
    """Return the bits of a float32 as uint32."""
    if value != types.float32:
        raise TypeError(f"float_bits takes float32, got {value}")
    return types.uint32(types.float32), lambda c, builder, s, args: builder.bitcast(args[0], _I32)


@intrinsic
def bits_float(typingctx: Any, value: Any) -> Any:
    """Return the float32 with the given bits."""
    if value != types.uint32:
        raise TypeError(f"bits_float takes uint32, got {value}")
    return types.float32(types.uint32), lambda c, builder, s, args: builder.bitcast(args[0], _F32)


@intrinsic
def narrow(typingctx: Any, value: Any, like: Any) -> Any:
    """Return a float32 in the type of ``like``; to bfloat16 bits it rounds to nearest even.

    The result is always finite: what would be infinite, or is NaN, becomes the largest finite number of its sign.
    """
    if value != types.float32:
        raise TypeError(f"narrow takes float32, got {value}")
    if like == types.float32:

        def held(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            bits = builder.bitcast(args[0], _I32)
            magnitude = builder.and_(bits, ir.Constant(_I32, 0x7FFFFFFF))
            sign = builder.and_(bits, ir.Constant(_I32, 0x80000000))
            over = builder.icmp_unsigned(">=", magnitude, ir.Constant(_I32, 0x7F800000))
            largest = builder.or_(sign, ir.Constant(_I32, 0x7F7FFFFF))
            return builder.bitcast(builder.select(over, largest, bits), _F32)

        return types.float32(types.float32, like), held
    if like != types.uint16:
        raise TypeError(f"narrow gives float32 or bfloat16 bits, not {like}")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def constant(number: int) -> Any:
            return ir.Constant(_I32, number)

        bits = builder.bitcast(args[0], _I32)
        lsb = builder.and_(builder.lshr(bits, constant(16)), constant(1))
        rounded = builder.lshr(builder.add(builder.add(bits, constant(0x7FFF)), lsb), constant(16))
        magnitude = builder.and_(rounded, constant(0x7FFF))
        over = builder.icmp_unsigned(">=", magnitude, constant(0x7F80))
        largest = builder.or_(builder.and_(rounded, constant(0x8000)), constant(0x7F7F))
        return builder.trunc(builder.select(over, largest, rounded), _I16)

    return types.uint16(types.float32, like), codegen
