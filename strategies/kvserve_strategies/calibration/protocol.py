"""What calibration needs of a model, so that its mathematics know no framework's classes.

A model gives the KV cache of a text as it is served (keys rotated, rounded to the cache's dtype) together with the
queries before rotation, and predicts a continuation from a given cache in a way that gradients can flow through.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray


class RopeLike(Protocol):
    """Rotary position embedding of one layer: the first ``rotary_dim`` dimensions of each head rotate."""

    @property
    def inv_freq(self) -> NDArray[np.float64]:
        """``[rotary_dim / 2]``, radians a token."""

    @property
    def attention_factor(self) -> float:
        """Factor of cosine and sine."""

    @property
    def interleaved(self) -> bool:
        """Whether neighbours ``(2i, 2i + 1)`` rotate together, instead of ``(i, i + rotary_dim / 2)``."""

    @property
    def rotary_dim(self) -> int:
        """Dimensions that rotate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefill:
    """What a model computes of a text.

    Attributes:
        keys: ``[layers, tokens, kv_heads, head_dim]``, rotated, the values of the cache's dtype; any float dtype.
        values: The same shape.
        queries: For each layer ``[tokens, heads, head_dim]`` before rotation, after any normalisation of heads;
            query heads ``h * heads // kv_heads`` up to the next one's first read key head ``h``. Unscaled: attention is
            the softmax of ``q . k * scale``.
    """

    keys: torch.Tensor
    values: torch.Tensor
    queries: Sequence[torch.Tensor]


class Predictor(Protocol):
    """A model whose predictions follow from a given cache."""

    def logits(
        self, tokens: Sequence[int], keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Return the predictions after each token, given the cache of all tokens before them.

        Gradients flow to `keys` and `values` (and to nothing else) if these require them.

        Args:
            tokens: The tokens to read, at the positions that follow the cache's.
            keys: ``[layers, past, kv_heads, head_dim]`` float32, rotated.
            values: The same shape.

        Returns:
            ``[len(tokens), vocabulary]`` float32.
        """


class CalibrationModel(Predictor, Protocol):
    """A model under calibration."""

    @property
    def layers(self) -> int:
        """Layers with a KV cache."""

    @property
    def kv_heads(self) -> int:
        """Key heads of a layer."""

    @property
    def head_dim(self) -> int:
        """Dimensions of a key head."""

    def rope_of(self, layer: int) -> RopeLike | None:
        """Return how the layer's keys rotate; None if they do not."""

    def prefill(self, tokens: Sequence[int]) -> Prefill:
        """Return KV cache and queries of a text, without gradients."""
