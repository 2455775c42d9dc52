"""How alike the losses of two strategies are: the kernel of the surrogate model.

Effects add up: what is known of a strategy beforehand, its forecasts or at least how far it compresses; what kind of
strategy it is; and how that kind answers to its numbers. The first two let a model say something of a kind that was
tried once, and know how little it knows of one that was never tried.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Self

import numpy as np
import torch
from gpytorch.constraints import Positive
from gpytorch.kernels import Kernel, RBFKernel, ScaleKernel
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
    return Corrections(columns) if columns.forecasts else _losses(columns)


def _losses(columns: Columns) -> Kernel:
    """Return how alike the losses are of strategies that nothing is forecast of."""
    numbers = (*columns.numbers, *columns.ratio)
    ratio = _scaled(_alike(columns.ratio, 0.6, spread=0.7), 1.0)
    if not columns.choices:
        return ratio + _scaled(_alike(numbers, 1.35, apart=True), 1.0)
    kinds = _scaled(_alike(columns.choices, 1.35, spread=0.7), 1.0)
    answers = _alike(columns.choices, math.e, apart=True) * _alike(numbers, 1.35, apart=True)
    return ratio + kinds + _scaled(answers, 1.0)


class Corrections(Kernel):  # type: ignore[misc]
    """How alike strategies are in how far their losses are off what is forecast, in octaves.

    It has few hyperparameters, because there is little left to learn. The sum is written out: put together of
    gpytorch's kernels it is the same and takes several times as long for a few dozen observations.
    """

    def __init__(self, columns: Columns) -> None:
        """Take the hyperparameters at the modes of their priors."""
        super().__init__()
        self._columns = columns
        modes: dict[str, tuple[float, float]] = {}
        if columns.choices:
            modes |= {"kind_variance": (KIND**2, 0.8), "kind_scale": (1.0, 1.0)}
        if columns.numbers:
            modes |= {"answer_variance": (KIND**2, 0.8), "number_scale": (0.6, 1.0)}
        if columns.choices and columns.numbers:
            modes |= {"choice_scale": (1.5, 1.0)}
        for name, (mode, spread) in modes.items():
            raw = f"raw_{name}"
            self.register_parameter(raw, torch.nn.Parameter(torch.zeros(1)))
            self.register_constraint(raw, Positive())
            self.register_prior(
                f"{name}_prior",
                LogNormalPrior(math.log(mode), spread),
                partial(_value, name=name),
                partial(_set_value, name=name),
            )
            _set_value(self, torch.as_tensor(mode), name=name)

    def forward(
        self, x1: torch.Tensor, x2: torch.Tensor, diag: bool = False, **_: object
    ) -> torch.Tensor:
        """Return ``[n, m]`` covariances of ``[n, columns]`` and ``[m, columns]`` inputs; of ``n`` pairs if ``diag``."""
        columns = self._columns
        products = _products(x1, x2, columns.forecasts, diag=diag)
        kernel = BIAS**2 + TILT**2 * products
        apart = torch.zeros(())
        if columns.choices:
            distances = _squared_distances(x1, x2, columns.choices, diag=diag)
            scale = _value(self, name="kind_scale")
            kind = torch.exp(distances * (-0.5 / scale**2))
            kernel = kernel + _value(self, name="kind_variance") * kind
            if columns.numbers:
                apart = distances / _value(self, name="choice_scale") ** 2
        if columns.numbers:
            distances = _squared_distances(x1, x2, columns.numbers, diag=diag)
            apart = apart + distances / _value(self, name="number_scale") ** 2
            kernel = kernel + _value(self, name="answer_variance") * torch.exp(-0.5 * apart)
        return kernel


def _value(kernel: Kernel, *, name: str) -> torch.Tensor:
    raw: torch.Tensor = getattr(kernel, f"raw_{name}")
    value: torch.Tensor = kernel.constraint_for_parameter_name(f"raw_{name}").transform(raw)
    return value


def _set_value(kernel: Kernel, value: torch.Tensor, *, name: str) -> None:
    raw = f"raw_{name}"
    kernel.initialize(**{raw: kernel.constraint_for_parameter_name(raw).inverse_transform(value)})


def _products(
    x1: torch.Tensor, x2: torch.Tensor, columns: Sequence[int], *, diag: bool
) -> torch.Tensor:
    x1, x2 = x1[..., columns], x2[..., columns]
    return (x1 * x2).sum(dim=-1) if diag else x1 @ x2.mT


def _squared_distances(
    x1: torch.Tensor, x2: torch.Tensor, columns: Sequence[int], *, diag: bool
) -> torch.Tensor:
    x1, x2 = x1[..., columns], x2[..., columns]
    if diag:
        return ((x1 - x2) ** 2).sum(dim=-1)
    squares = (x1**2).sum(dim=-1)[..., :, None] + (x2**2).sum(dim=-1)[..., None, :]
    return (squares - 2 * x1 @ x2.mT).clamp_min(0.0)


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
