"""Stages that are linear maps known from calibration, computed in float32 one after the other.

This is how they work before any quantiser but one: with ``quantise.grid.v1`` after ``transform.pca.v1`` the whole run
of linear stages is folded into one integer matrix instead, see `kvserve_strategies.projection`.
"""

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from kvserve_api.errors import StrategyError, ValuesError, WireError, WireReason
from kvserve_strategies.bundle import Bundle
from kvserve_strategies.stage import Array, Bytes, Encoded, Form, Role, Spec, Stage, Where

Real = NDArray[np.float32]


class LinearStage(Stage):
    """A calibrated linear map; it writes nothing, because the decoder has the bundle too."""

    __slots__ = ()

    role: ClassVar[Role] = Role.TRANSFORM
    lossless: ClassVar[bool] = False
    is_fixed_size: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True

    @abstractmethod
    def apply(self, x: Real, spec: Spec) -> Real:
        """Return the map of values ``[layers, tokens, kv_heads, head_dim]`` of a spec."""

    @abstractmethod
    def invert(self, y: Real, spec: Spec) -> Real:
        """Undo `apply`; the result has the shape of the spec."""

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return 0."""
        return 0

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Map the values."""
        with np.errstate(over="ignore", invalid="ignore"):
            mapped = self.apply(to_real(value, spec), spec)
        if not np.isfinite(mapped).all():
            raise ValuesError(f"{self.id}: a value exceeds float32")
        return Encoded((), mapped)

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Map back."""
        assert value is not None
        if section.size:
            raise WireError(WireReason.MALFORMED, f"{self.id} writes nothing, got {section.size}")
        # what overflows is held at the largest number by `to_native`
        with np.errstate(over="ignore", invalid="ignore"):
            restored = self.invert(value, spec)
        return to_native(restored, spec)


def bundle_of(stage: Stage, spec: Spec) -> tuple[Bundle, Where]:
    """Return the calibration and the place that a calibrated stage works with.

    Raises:
        StrategyError: There is none, or the piece is not of the calibrated model.
    """
    bundle, where = spec.bundle, spec.where
    if bundle is None or where is None:
        raise StrategyError(
            stage.id,
            "needs a calibration bundle of the model: make one with `kvserve calibrate` and build the "
            "pipeline with it",
        )
    layout = bundle.layout
    if where.layers[-1] >= layout.layers or where.heads[-1] >= layout.kv_heads:
        raise StrategyError(
            stage.id,
            f"the bundle is of a model with {layout.layers} layers and {layout.kv_heads} KV heads, "
            f"the piece has layer {where.layers[-1]} and head {where.heads[-1]}",
        )
    return bundle, where


def to_real(value: Array, spec: Spec) -> Real:
    """Return a NATIVE or REAL value as float32, in memory of its own or not."""
    if value.dtype == np.uint16:
        bits = torch.from_numpy(np.ascontiguousarray(value).view(np.int16)).view(torch.bfloat16)
        widened: Real = bits.float().numpy()
        return widened
    return np.ascontiguousarray(value, dtype=np.float32)


def to_native(value: Real, spec: Spec) -> Array:
    """Undo `to_real` for a spec, held at the largest finite number of a NATIVE value's dtype."""
    if spec.form != Form.NATIVE or spec.dtype == "float32":
        limit = np.float32(np.finfo(np.float32).max)
        return np.clip(np.nan_to_num(value, nan=0.0), -limit, limit)
    dtype = torch.bfloat16 if spec.dtype == "bfloat16" else torch.float16
    limit = np.float32(torch.finfo(dtype).max)
    held = torch.from_numpy(np.clip(np.nan_to_num(value, nan=0.0), -limit, limit)).to(dtype)
    words: Array = held.view(torch.int16).numpy()
    return words.view(spec.array_dtype)
