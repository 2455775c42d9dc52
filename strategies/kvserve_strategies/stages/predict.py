"""``predict.layer.v1``: each channel predicted from a few channels of the layer before."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from kvserve_api.errors import WireError, WireReason
from kvserve_api.fields import Fields
from kvserve_kernels import predict
from kvserve_strategies.linear import to_native, to_real
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Array, Bytes, Form, Role, Space, Spec, take_form
from kvserve_strategies.wrap import Rest, Wrapping, padded

_LARGEST = np.float32(np.finfo(np.float32).max)


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class PredictLayer(Wrapping):
    """Code each layer as its difference from a linear prediction by the decoded layer before it.

    That keys and values of a layer can be predicted from the one before is AQUA-KV's finding (Shutova et al., 2025),
    with matrices learnt for each model. Here nothing is learnt: each channel takes the few channels of the layer before
    that explain it best, found on the piece itself (orthogonal matching pursuit: Pati et al., 1993), and sends which
    and how much. Layers follow each other as they are computed, so they can be sent while the model still runs. The
    section holds

    ============  ================================================================================================
    part          content
    ============  ================================================================================================
    lengths       u64 for each layer
    sources       u16 ``[layers - 1, channels, sources]``: channels of the layer before
    weights       float16, the same shape; 0 where nothing is predicted
    zeros         to a multiple of 8
    layers        what the stages that follow wrote for each, see `kvserve_strategies.wrap.Rest`
    ============  ================================================================================================

    Attributes:
        sources: Most channels that one is predicted from, 1 to 8.
    """

    sources: int

    id: ClassVar[str] = "predict.layer.v1"
    role: ClassVar[Role] = Role.PREDICT
    lossless: ClassVar[bool] = False
    is_fixed_size: ClassVar[bool] = False
    summary: ClassVar[str] = "differences from a prediction by the layer before"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read ``sources``."""
        return cls(sources=params.integer("sources", minimum=1, maximum=predict.MAX_SOURCES))

    def resolve(self, spec: Spec) -> Spec:
        """Take NATIVE or REAL values, give REAL ones."""
        take_form(self, spec, Form.NATIVE, Form.REAL)
        return replace(spec, form=Form.REAL, space=Space.OTHER)

    def inner(self, spec: Spec) -> Spec:
        """Return the spec of one layer's differences."""
        return replace(self.resolve(spec), layers=1)

    def nbytes_with(self, spec: Spec, rest: Rest) -> int:
        """Return the size of the head and of all layers at their largest."""
        return self._head_nbytes(spec) + spec.layers * rest.encoded_nbytes(self.inner(spec))

    def encode_with(self, value: Array, spec: Spec, rest: Rest) -> tuple[Array, ...]:
        """Predict, and code what is left, layer by layer."""
        inner = self.inner(spec)
        x = to_real(value, spec).reshape(spec.layers, spec.tokens, spec.columns)
        sources = np.zeros((spec.layers - 1, spec.columns, self.sources), np.uint16)
        weights = np.zeros(sources.shape, np.float16)
        payloads = []
        before = predicted = np.zeros((spec.tokens, spec.columns), np.float32)
        for layer in range(spec.layers):
            if layer:
                found = predict.fit(before, x[layer], self.sources)
                sources[layer - 1], weights[layer - 1] = found
                predicted = predict.apply(before, *found)
            payload = rest.encode((x[layer] - predicted).reshape(inner.shape), inner)
            before = _sum(rest.decode(payload, inner), predicted)
            payloads.append(payload)
        lengths = np.array([payload.size for payload in payloads], np.uint64)
        gap = np.zeros(self._head_nbytes(spec) - lengths.nbytes - 2 * sources.nbytes, np.uint8)
        return (lengths, sources, weights, gap, *payloads)

    def decode_with(self, section: Bytes, spec: Spec, rest: Rest) -> Array:
        """Add what is left to the predictions."""
        inner = self.inner(spec)
        at = self._head_nbytes(spec)
        if section.size < at:
            raise _malformed(f"{section.size} bytes, its head takes {at}")
        lengths, sources, weights = self._head(section[:at], spec)
        if any(length % 8 for length in lengths) or at + sum(lengths) != section.size:
            raise _malformed("the lengths of its layers do not add up")
        out = np.empty((spec.layers, spec.tokens, spec.columns), np.float32)
        predicted = np.zeros((spec.tokens, spec.columns), np.float32)
        for layer, length in enumerate(lengths):
            if layer:
                predicted = predict.apply(out[layer - 1], sources[layer - 1], weights[layer - 1])
            out[layer] = _sum(rest.decode(section[at : at + length], inner), predicted)
            at += length
        return to_native(out.reshape(spec.shape), spec)

    def _head_nbytes(self, spec: Spec) -> int:
        return padded(8 * spec.layers + 4 * (spec.layers - 1) * spec.columns * self.sources)

    def _head(
        self, head: Bytes, spec: Spec
    ) -> tuple[list[int], NDArray[np.uint16], NDArray[np.float16]]:
        """Return lengths, sources and weights, checked."""
        shape = (spec.layers - 1, spec.columns, self.sources)
        size = 2 * int(np.prod(shape))
        first = 8 * spec.layers
        sources = head[first : first + size].view(np.uint16).reshape(shape)
        weights = head[first + size : first + 2 * size].view(np.float16).reshape(shape)
        if head[first + 2 * size :].any():
            raise _malformed("padding is not zero")
        if sources.size and (sources.max() >= spec.columns or not np.isfinite(weights).all()):
            raise _malformed("a source is no channel, or a weight no number")
        return head[:first].view(np.uint64).tolist(), sources, weights


def _sum(left: Array, predicted: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return decoded values, held at the largest finite number."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = left.reshape(predicted.shape) + predicted
    if not np.isfinite(total).all():
        total = np.clip(np.nan_to_num(total, nan=0.0), -_LARGEST, _LARGEST)
    result: NDArray[np.float32] = total
    return result


def _malformed(detail: str) -> WireError:
    return WireError(WireReason.MALFORMED, f"{PredictLayer.id}: {detail}")
