"""The model of the quality loss: a Gaussian process over what strategies are and how far they compress.

It works in octaves of loss (`loss_octaves`), in which a loss is about linear in the octaves of the ratio within a
family and its noise about equal everywhere. Loss rises with the ratio, so that is the prior mean; what the process adds
is how families differ from that line.
"""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from botorch.exceptions import ModelFittingError
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.kernels import Kernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.utils.errors import NotPSDError

from kvserve_profiler.hypervolume import loss_octaves
from kvserve_profiler.kernel import mixed_kernel
from kvserve_profiler.pool import FloatArray, Pool, windows_of

LEAST_VARIANCE = 1e-4
"""Of an observation, in octaves squared: the model would otherwise bend to rounding errors."""
UNSEEN_VARIANCE = 0.25
"""Of a loss on fewer windows than others have, before any candidate told how far windows agree."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Belief:
    """What is believed of every candidate's loss, in octaves.

    Attributes:
        mean: ``[n]``.
        deviation: ``[n]``, positive.
    """

    mean: FloatArray
    deviation: FloatArray


def octaves_of(losses: Sequence[Sequence[float]]) -> tuple[FloatArray, FloatArray]:
    """Return each candidate's loss over all windows and the variance of what is known of it.

    A candidate with fewer windows than others is brought to theirs by how those with all of them differ between the
    same few windows and all.

    Args:
        losses: For each candidate, its losses on the first windows, in basis points; at least one window each.

    Returns:
        ``[n]`` octaves and ``[n]`` variances.
    """
    most = max(len(row) for row in losses)
    whole = windows_of(losses)
    noise = _window_noise(whole)
    octaves, variances = np.empty(len(losses)), np.empty(len(losses))
    for position, row in enumerate(losses):
        octaves[position] = loss_octaves(float(np.mean(row)))
        variances[position] = noise
        if len(row) < most:
            part = whole[:, : len(row)].mean(axis=1)
            shift = loss_octaves(whole.mean(axis=1)) - loss_octaves(part)
            octaves[position] += shift.mean()
            spread = shift.var(ddof=1) if len(shift) > 2 else UNSEEN_VARIANCE
            variances[position] += spread
    return octaves, variances


def _window_noise(whole: FloatArray) -> float:
    """Return the variance of a candidate's mean over its windows, apart from what all share.

    Windows differ for all candidates alike; only what is left after that makes one candidate look better than it is.
    """
    rows, windows = whole.shape
    if windows < 2 or rows < 2:
        return LEAST_VARIANCE
    octaves = loss_octaves(whole)
    rest = octaves - octaves.mean(axis=1, keepdims=True) - octaves.mean(axis=0) + octaves.mean()
    return max(float((rest**2).sum() / ((rows - 1) * (windows - 1)) / windows), LEAST_VARIANCE)


class Surrogate:
    """A Gaussian process on the losses observed on one text. A function of its arguments alone."""

    def __init__(
        self,
        pool: Pool,
        indices: Sequence[int],
        losses: Sequence[Sequence[float]],
        *,
        most_bp: float = math.inf,
    ) -> None:
        """Fit the process.

        Args:
            pool: The candidates.
            indices: Those observed, at least one.
            losses: The losses of each, as for `octaves_of`.
            most_bp: A loss beyond which nothing needs to be told apart, in basis points: a strategy that destroys the
                cache must not bend the model where it counts.
        """
        octaves, variances = octaves_of(losses)
        octaves = np.minimum(octaves, loss_octaves(most_bp))
        ratio = np.log2(pool.ratio)
        self._inputs = torch.from_numpy(_scaled(np.column_stack([pool.features, ratio])))
        kernel = mixed_kernel(self._inputs.numpy())
        chosen = list(indices)
        self._trend = _line(ratio[chosen], octaves)(ratio)
        rest = octaves - self._trend[chosen]
        self._unit = max(float(rest.std()), 0.1)
        self._model = _fitted(
            kernel,
            self._inputs[chosen],
            torch.from_numpy(rest / self._unit)[:, None],
            torch.from_numpy(variances / self._unit**2)[:, None],
        )

    def belief(self) -> Belief:
        """Return what is believed of every candidate of the pool."""
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            posterior = self._model.posterior(self._inputs)
            mean = posterior.mean[:, 0].numpy()
            variance = posterior.variance[:, 0].numpy()
        return Belief(
            mean=self._trend + mean * self._unit,
            deviation=np.sqrt(np.maximum(variance, 1e-12)) * self._unit,
        )

    def suppose(self, index: int) -> None:
        """Condition on a candidate having the loss that is expected of it.

        Its neighbours then have nothing new to tell, and the next of a batch is chosen elsewhere (Ginsbourger, Le
        Riche and Carraro, Kriging is well-suited to parallelize optimization, 2010).
        """
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            here = self._inputs[index : index + 1]
            mean = self._model.posterior(here).mean
            noise = torch.full_like(mean, LEAST_VARIANCE / self._unit**2)
            self._model = self._model.condition_on_observations(here, mean, noise=noise)


def _fitted(
    kernel: Kernel, inputs: torch.Tensor, targets: torch.Tensor, variances: torch.Tensor
) -> SingleTaskGP:
    """Return a process with the most likely hyperparameters, or with their prior's if there are none."""

    def start() -> SingleTaskGP:
        return SingleTaskGP(
            inputs,
            targets,
            train_Yvar=variances,
            covar_module=copy.deepcopy(kernel),
            outcome_transform=None,
        )

    with warnings.catch_warnings():
        # numerical warnings of the optimiser: the fit it ends with is judged by its likelihood alone
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = start()
        try:
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model), max_attempts=2)
        except (ModelFittingError, NotPSDError):
            model = start()
        return model.eval()


def _scaled(columns: FloatArray) -> FloatArray:
    """Return columns scaled to 0..1, without features that are the same for all; the last column stays."""
    least, span = columns.min(axis=0), np.ptp(columns, axis=0)
    kept = span > 0
    kept[-1] = True
    scaled: FloatArray = ((columns - least) / np.where(span > 0, span, 1.0))[:, kept]
    return scaled


def _line(x: FloatArray, y: FloatArray) -> Callable[[FloatArray], FloatArray]:
    """Return the line that does not fall, and fits the points best in the squares."""
    centre, height = float(x.mean()), float(y.mean())
    spread = float(((x - centre) ** 2).sum())
    slope = max(float(((x - centre) * (y - height)).sum()) / spread, 0.0) if spread > 0 else 0.0
    return lambda at: height + slope * (at - centre)
