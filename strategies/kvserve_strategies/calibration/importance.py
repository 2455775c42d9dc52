"""How much a token matters, predicted from its own components and its distance to the end of the text.

A token that much attention will come back to must be kept better. What an error in a token costs is measured on
calibration texts by `fisher.token_costs`; here its logarithm is fitted by a linear function, as a generalised linear
model with gamma deviance (McCullagh and Nelder, Generalized Linear Models, 1989, §8). With steps proportional to
the inverse root of the prediction, that deviance is the rate lost to its errors, so that nothing else need be tuned.
"""

from typing import Final

import torch

COMPONENTS: Final = 192
"""Leading components that are looked at."""
AGE_FEATURES: Final = 4
_CLIP: Final = 4.0
_RIDGE: Final = 0.01
_STEPS: Final = 60
_LARGEST_RATIO: Final = 30.0
"""Of a measured cost to its prediction: costs are sampled, and single ones are far off."""


def features(scores: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
    """Return what the prediction is linear in.

    Args:
        scores: ``[tokens, COMPONENTS]`` leading components divided by their deviations; zero where there are fewer.
        ages: ``[tokens]`` tokens from the end of the text: 1 for the last.

    Returns:
        ``[tokens, COMPONENTS + AGE_FEATURES + 1]`` float32: the scores, clipped at 4 deviations; ``ln(age) / 7`` and
        its square; ``exp(-(age - 1) / 4)`` and ``exp(-(age - 1) / 32)``; 1.
    """
    ages = ages.float()
    far = ages.log() / 7
    near = 1 - ages
    terms = [far, far.square(), (near / 4).exp(), (near / 32).exp(), torch.ones_like(ages)]
    return torch.cat([scores.float().clamp(-_CLIP, _CLIP), torch.stack(terms, dim=1)], dim=1)


def fitted(x: torch.Tensor, costs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weights of the features that predict the logarithm of the cost.

    Args:
        x: ``[samples, features]``, the last of them 1.
        costs: ``[samples]``, not negative.
        weights: ``[samples]``, how many tokens each stands for.

    Returns:
        ``[features]`` float32, by Fisher scoring with a ridge on all but the constant.
    """
    x, costs = x.double(), costs.double()
    weights = weights.double() / weights.sum()
    ridge = torch.full((x.shape[1],), _RIDGE, dtype=torch.float64)
    ridge[-1] = 0
    # a feature that is always zero has neither weight nor curvature
    curvature = x.T @ (weights[:, None] * x) + torch.diag(ridge + 1e-9)
    factor = torch.linalg.cholesky(curvature)
    found = torch.zeros(x.shape[1], dtype=torch.float64)
    found[-1] = (weights @ costs).clamp(min=1e-30).log()
    for _ in range(_STEPS):
        ratio = (costs * torch.exp(-(x @ found))).clamp(max=_LARGEST_RATIO)
        slope = x.T @ (weights * (ratio - 1)) - ridge * found
        # half a step: the curvature is that of the expectation, and costs have heavy tails
        found += 0.5 * torch.cholesky_solve(slope[:, None], factor)[:, 0]
    return found.float()
