"""How alike the losses of two strategies are: the kernel of the surrogate model.

Effects add up: what is known of a strategy beforehand, its forecasts or at least how far it compresses; what kind of
strategy it is; and how that kind answers to its numbers. The first two let a model say something of a kind that was
tried once, and know how little it knows of one that was never tried.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import torch
from gpytorch.kernels import ConstantKernel, Kernel, LinearKernel, RBFKernel, ScaleKernel
from gpytorch.priors import LogNormalPrior

from kvserve_profiler.pool import FloatArray

BIAS: Final = 0.5
"""Octaves by which all forecasts may be off together; this and what follows are standard deviations."""
TILT: Final = 0.2
"""Octaves by which the loss may rise faster or more slowly than a forecast."""
KIND: Final = 0.3
"""Octaves by which the forecasts of one kind of strategy may be off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which columns of the inputs are what.

    Attributes:
        choices: Those of nothing but 0 and 1.
        numbers: The others that say what a strategy is, from 0 to 1.
        ratio: The ratio, from 0 to 1; empty if there are forecasts.
        forecasts: Those of the loss, in octaves, about 0 in the middle; empty if there are none.
    """

    choices: tuple[int, ...]
    numbers: tuple[int, ...]
    ratio: tuple[int, ...] = ()
    forecasts: tuple[int, ...] = ()

    @classmethod
    def of(cls, inputs: FloatArray, forecasts: int) -> Self:
        """Return what is what.

        Args:
            inputs: ``[n, columns]``: what strategies are, then the ratio, or the forecasts if there are any.
            forecasts: How many.
        """
        count = inputs.shape[1]
        known = tuple(range(count - max(forecasts, 1), count))
        binary = np.isin(inputs[:, : known[0]], (0.0, 1.0)).all(axis=0)
        return cls(
            choices=tuple(np.flatnonzero(binary).tolist()),
            numbers=tuple(np.flatnonzero(~binary).tolist()),
            ratio=() if forecasts else known,
            forecasts=known if forecasts else (),
        )


def kernel_of(columns: Columns) -> Kernel:
    """Return the kernel, its hyperparameters at the modes of their priors."""
    return _corrections(columns) if columns.forecasts else _losses(columns)


def _losses(columns: Columns) -> Kernel:
    """Return how alike the losses are of strategies that nothing is forecast of."""
    numbers = (*columns.numbers, *columns.ratio)
    ratio = _scaled(_alike(columns.ratio, 0.6, spread=0.7), 1.0)
    if not columns.choices:
        return ratio + _scaled(_alike(numbers, 1.35, apart=True), 1.0)
    kinds = _scaled(_alike(columns.choices, 1.35, spread=0.7), 1.0)
    answers = _alike(columns.choices, math.e, apart=True) * _alike(numbers, 1.35, apart=True)
    return ratio + kinds + _scaled(answers, 1.0)


def _corrections(columns: Columns) -> Kernel:
    """Return how alike strategies are in how far their losses are off what is forecast, in octaves.

    It has few hyperparameters, because there is little left to learn.
    """
    tilt = LinearKernel(active_dims=columns.forecasts)
    tilt.variance = torch.as_tensor(TILT**2)
    bias = ConstantKernel()
    bias.constant = torch.as_tensor(BIAS**2)
    for fixed in (tilt.raw_variance, bias.raw_constant):
        fixed.requires_grad_(False)
    kernel = bias + tilt
    if columns.choices:
        kernel = kernel + _scaled(_alike(columns.choices, 1.0), KIND**2)
    if columns.numbers:
        answers = _alike(columns.numbers, 0.6)
        if columns.choices:
            answers = _alike(columns.choices, 1.5) * answers
        kernel = kernel + _scaled(answers, KIND**2)
    return kernel


def _alike(
    columns: Sequence[int], lengthscale: float, *, spread: float = 1.0, apart: bool = False
) -> Kernel:
    """Return a kernel of some columns, with a lengthscale for all of them or for each."""
    kernel = RBFKernel(
        ard_num_dims=len(columns) if apart else None,
        active_dims=tuple(columns),
        lengthscale_prior=LogNormalPrior(math.log(lengthscale), spread),
    )
    kernel.lengthscale = torch.full_like(kernel.lengthscale, lengthscale)
    return kernel


def _scaled(kernel: Kernel, variance: float) -> ScaleKernel:
    scaled = ScaleKernel(kernel, outputscale_prior=LogNormalPrior(math.log(variance), 0.8))
    scaled.outputscale = torch.as_tensor(variance)
    return scaled
