"""``quantise.step.v1``: multiples of one constant step for each layer."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from kvserve_api.errors import ValuesError, WireError, WireReason
from kvserve_api.fields import Fields
from kvserve_kernels import step
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Array, Bytes, Encoded, Form, Role, Spec, Stage, take_form
from kvserve_strategies.values import cut, load, store


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class ConstantStep(Stage):
    """Round to multiples of a step that is the same for all channels of a layer.

    Before an entropy coder this spends bits where the variance is, which no fixed number of levels can (entropy-coded
    scalar quantisation: Gish and Pierce, 1968). The section holds the steps ``[layers]`` as float32.

    Attributes:
        relative_step: The step over the root mean square of the layer's values, 0.001 to 8.
    """

    relative_step: float

    id: ClassVar[str] = "quantise.step.v1"
    role: ClassVar[Role] = Role.QUANTISE
    lossless: ClassVar[bool] = False
    is_fixed_size: ClassVar[bool] = True
    summary: ClassVar[str] = "multiples of a constant step per layer"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read ``relative_step``."""
        return cls(relative_step=params.number("relative_step", minimum=0.001, maximum=8))

    def resolve(self, spec: Spec) -> Spec:
        """Take NATIVE or REAL values, give unbounded LEVELS."""
        take_form(self, spec, Form.NATIVE, Form.REAL)
        return replace(spec, form=Form.LEVELS, levels=None)

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the size of the steps."""
        return 4 * spec.layers

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Quantise."""
        flat = load(value).reshape(spec.layers, spec.tokens, spec.columns)
        steps = step.relative_steps(flat, self.relative_step)
        codes = step.quantise(flat, steps) if np.isfinite(steps).all() else None
        if codes is None:
            raise ValuesError(f"a value is over {step.LARGEST_CODE} steps from zero")
        return Encoded((steps,), codes.reshape(spec.shape))

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Return the multiples."""
        assert value is not None
        (steps,) = cut(section, self.id, (spec.layers,), dtype=np.dtype(np.float32))
        if not (np.isfinite(steps).all() and (steps >= 0).all()):
            raise WireError(WireReason.MALFORMED, f"{self.id}: a step is not a positive number")
        kernel_dtype = np.float32 if spec.array_dtype == np.float16 else spec.array_dtype
        flat = value.reshape(spec.layers, spec.tokens, spec.columns)
        out = step.dequantise(flat, steps, kernel_dtype)
        return store(out, spec.array_dtype).reshape(spec.shape)
