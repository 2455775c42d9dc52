"""How likely observations are under a Gaussian process with exact inference, worked out at once.

The value is gpytorch's, which takes it through distributions and lazy operators. These pay for thousands of
observations; a search has dozens, of which the numbers take a fraction of the time.
"""

import math

import torch
from gpytorch.mlls import ExactMarginalLogLikelihood


class DenseMarginalLikelihood(ExactMarginalLogLikelihood):  # type: ignore[misc]
    """The exact marginal likelihood, with its priors, of a process whose mean is zero."""

    def compute_custom_loss(self) -> torch.Tensor:
        """Return what is to be minimised: the negative logarithm, mean of the observations.

        BoTorch fits by this method where there is one (`botorch.optim.closures.get_loss_closure`).
        """
        targets = self.model.train_targets
        covariance = self.model.covar_module(*self.model.train_inputs).to_dense()
        root = torch.linalg.cholesky(covariance + torch.diag(self.likelihood.noise))
        apart = torch.linalg.solve_triangular(root, targets[:, None], upper=False)
        count = len(targets)
        misfit = (apart**2).sum() / 2 + root.diagonal().log().sum()
        likely = -misfit - count / 2 * math.log(2 * math.pi)
        loss: torch.Tensor = -self._add_other_terms(likely, ()) / count
        return loss
