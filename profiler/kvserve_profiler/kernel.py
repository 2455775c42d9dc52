"""How alike the losses of two strategies are: the kernel of the surrogate model.

Three effects add up: how far a strategy compresses, whatever it is; what kind of strategy it is; and how that kind
answers to its numbers. The first two let a model say something of a kind that was tried once, and know how little it
knows of one that was never tried.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from gpytorch.kernels import Kernel, RBFKernel, ScaleKernel
from gpytorch.priors import LogNormalPrior

from kvserve_profiler.pool import FloatArray


def mixed_kernel(inputs: FloatArray) -> Kernel:
    """Return the kernel for inputs, its hyperparameters at the modes of their priors.

    Args:
        inputs: ``[n, columns]``, 0 to 1; the last column is the ratio, columns of nothing but 0 and 1 are choices.
    """
    last = inputs.shape[1] - 1
    choices = [at for at in range(last) if np.isin(inputs[:, at], (0.0, 1.0)).all()]
    numbers = [at for at in range(last + 1) if at not in choices]
    ratio = _scaled(_alike([last], 0.6, spread=0.7), 1.0)
    if not choices:
        return ratio + _scaled(_alike(numbers, 1.35, apart=True), 1.0)
    kinds = _scaled(_alike(choices, 1.35, spread=0.7), 1.0)
    answers = _alike(choices, math.e, apart=True) * _alike(numbers, 1.35, apart=True)
    return ratio + kinds + _scaled(answers, 1.0)


def _alike(
    columns: Sequence[int], lengthscale: float, *, spread: float = 1.0, apart: bool = False
) -> RBFKernel:
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
