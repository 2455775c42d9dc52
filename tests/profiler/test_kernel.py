"""How alike strategies are: the sum that is written out is the one of gpytorch's kernels."""

import pytest
import torch
from gpytorch.kernels import ConstantKernel, Kernel, LinearKernel, RBFKernel, ScaleKernel

from kvserve_profiler.kernel import BIAS, KIND, TILT, Columns, kernel_of

COLUMNS = {
    "kinds and numbers": Columns(choices=(0, 1), numbers=(2, 3), forecasts=(4, 5)),
    "kinds": Columns(choices=(0, 1), numbers=(), forecasts=(4, 5)),
    "numbers": Columns(choices=(), numbers=(2, 3), forecasts=(4, 5)),
}


def squares(columns: tuple[int, ...], lengthscale: float) -> Kernel:
    """Return gpytorch's kernel of some columns."""
    kernel = RBFKernel(active_dims=columns)
    kernel.lengthscale = lengthscale
    return kernel


def scaled(kernel: Kernel) -> Kernel:
    """Return a kernel with the variance of a kind."""
    whole = ScaleKernel(kernel)
    whole.outputscale = KIND**2
    return whole


def composed(columns: Columns) -> Kernel:
    """Return the same out of gpytorch's kernels."""
    bias, tilt = ConstantKernel(), LinearKernel(active_dims=columns.forecasts)
    bias.constant, tilt.variance = torch.as_tensor(BIAS**2), torch.as_tensor(TILT**2)
    kernel = bias + tilt
    if columns.choices:
        kernel = kernel + scaled(squares(columns.choices, 1.0))
    if columns.numbers:
        answers = squares(columns.numbers, 0.6)
        if columns.choices:
            answers = squares(columns.choices, 1.5) * answers
        kernel = kernel + scaled(answers)
    return kernel


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
def test_corrections_are_the_sum_of_their_kernels(columns: Columns) -> None:
    """Of all with some, and of each with itself."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(12, 6, generator=generator, dtype=torch.float64)
    own, expected = kernel_of(columns).double(), composed(columns).double()
    with torch.no_grad():
        covariance = own(inputs, inputs[:5]).to_dense()
        assert torch.allclose(covariance, expected(inputs, inputs[:5]).to_dense(), rtol=1e-6)
        assert torch.allclose(own(inputs, diag=True), expected(inputs, diag=True), rtol=1e-6)
