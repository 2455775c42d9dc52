"""A forecast of the quality loss from the error of the cache alone, without a prediction of the model.

For a small error ``e`` of a cache the divergence is ``e' F e / 2``, F being the Fisher information
(`kvserve_strategies.calibration.fisher`). A few gradients of one window, taken once, estimate it for any strategy at
the price of a decode, in two ways with opposite faults:

- *directed*, ``sum over layers of mean (g . e)^2 / 2``, keys and values apart, is right in the mean for any errors
  that layers make independently, and noisy. Over all layers at once it would be right for every error, and with 16
  gradients off by a third; what layers have in common is less than that;
- *scattered*, ``sum mean(g^2) e^2 / 2``, has little noise, and is right only for errors that are all independent.

What strategies leave behind lies between; a search learns from its first trials how far each is to be believed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import torch

from kvserve_profiler.model import KV, Model
from kvserve_strategies.calibration.fisher import gradients
from kvserve_strategies.calibration.protocol import Prefill

MOST_NATS: Final = 10.0
"""A forecast is at most this, and this for a decoded cache that is not finite."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the error of a cache will cost in divergence.

    Attributes:
        directed: Nats a token, 0 to `MOST_NATS`.
        scattered: The same.
    """

    directed: float
    scattered: float


@dataclass(frozen=True, slots=True, eq=False)
class Sensitivity:
    """What errors of one window's cache cost.

    Attributes:
        gradients: ``[2 * layers, samples, numbers of a layer]`` bfloat16, keys before values: the noise of so few is
            much larger than its rounding.
        squares: ``[2 * layers, numbers of a layer]`` float32: the mean of their squares.
    """

    gradients: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def of(
        cls, model: Model, kv: KV, continuation: Sequence[int], *, samples: int, seed: int
    ) -> Self:
        """Compute the gradients of a window.

        Args:
            model: The model.
            kv: The exact cache of the window's prefix.
            continuation: The tokens that follow.
            samples: How many gradients.
            seed: Of the tokens that the model draws.
        """
        drawn = gradients(
            model,
            # a copy, because what was computed in inference mode takes no part in a backward pass
            Prefill(keys=kv.keys.clone(), values=kv.values.clone(), queries=()),
            continuation,
            samples=samples,
            generator=torch.Generator().manual_seed(seed),
        )
        layers = len(kv.keys)
        size = kv.keys[0].numel()
        found = torch.empty(2 * layers, samples, size, dtype=torch.bfloat16)
        squares = torch.zeros(2 * layers, size)
        for sample, pair in enumerate(drawn):
            gradient = torch.cat(pair).flatten(1)
            squares.addcmul_(gradient, gradient, value=1 / samples)
            found[:, sample] = gradient
        return cls(found, squares)

    def forecast(self, exact: KV, decoded: KV) -> Forecast:
        """Return what an error of the cache is expected to cost.

        Args:
            exact: The cache that the gradients are of.
            decoded: What came out of a codec.
        """
        rows, samples, size = self.gradients.shape
        directed, scattered = torch.zeros(()), torch.zeros(())
        # a layer at a time: what fits the processor's cache takes a quarter of the time, and no memory to speak of
        wide = torch.empty(samples, size)
        for row in range(rows):
            layer = row % len(exact.keys)
            one, other = (
                (kv.keys if row < len(exact.keys) else kv.values)[layer].flatten()
                for kv in (exact, decoded)
            )
            error = other.float().sub_(one)
            directed += (wide.copy_(self.gradients[row]) @ error).square_().mean()
            scattered += self.squares[row] @ error.square_()
        return Forecast(
            directed=_nats(directed),
            scattered=_nats(scattered),
        )


def _nats(twice: torch.Tensor) -> float:
    # written so that NaN is the most, too
    value = float(twice) / 2
    return value if value < MOST_NATS else MOST_NATS
