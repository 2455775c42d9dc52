"""How likely observations are: gpytorch's value, without its detours."""

import torch
from botorch.models import SingleTaskGP
from botorch.optim.closures import get_loss_closure_with_grads
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from gpytorch.means import ZeroMean
from gpytorch.mlls import ExactMarginalLogLikelihood

from kvserve_profiler.kernel import Columns, kernel_of
from kvserve_profiler.likelihood import DenseMarginalLikelihood


def test_value_and_gradients_are_those_of_gpytorch() -> None:
    """With priors and with noise that is learnt."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(20, 4, generator=generator, dtype=torch.float64)
    inputs[:, 0] = inputs[:, 0].round()
    targets = torch.randn(20, 1, generator=generator, dtype=torch.float64)
    noise = torch.full_like(targets, 0.05)
    model = SingleTaskGP(
        inputs,
        targets,
        train_Yvar=noise,
        likelihood=FixedNoiseGaussianLikelihood(noise[:, 0], learn_additional_noise=True),
        mean_module=ZeroMean(),
        covar_module=kernel_of(Columns(choices=(0,), numbers=(1,), forecasts=(2, 3))),
        outcome_transform=None,
    )
    found: list[torch.Tensor] = []
    for kind in (DenseMarginalLikelihood, ExactMarginalLogLikelihood):
        likelihood = kind(model.likelihood, model).train()
        learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert len(learnt) == 6
        value, gradients = get_loss_closure_with_grads(likelihood, learnt)()
        found.append(torch.cat([value.detach()[None], *(g.flatten() for g in gradients)]))
    dense, gpytorchs = found
    assert torch.allclose(dense, gpytorchs, rtol=1e-9, atol=1e-12)
