"""The model of the quality loss: a Gaussian process over what strategies are, around what is known of them beforehand.

It works in octaves of loss (`loss_octaves`), in which a forecast is off by about as much everywhere, and so is an
observation. The prior mean is the forecast; what the process learns is how far it is off, for all strategies, for a
kind, and for those that are alike. Without forecasts the prior mean is a line that rises with the octaves of the ratio.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Self

import numpy as np
import torch
from botorch.exceptions import ModelFittingError
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from gpytorch.means import ZeroMean
from gpytorch.priors import LogNormalPrior
from linear_operator.utils.errors import NotPSDError
from scipy.linalg import solve_triangular

from kvserve_profiler.hypervolume import loss_octaves
from kvserve_profiler.kernel import Columns, kernel_of
from kvserve_profiler.likelihood import DenseMarginalLikelihood
from kvserve_profiler.pool import FloatArray, IntArray, Pool, windows_of

LEAST_VARIANCE: Final = 1e-4
"""Of an observation, in octaves squared: the model would otherwise bend to rounding errors."""
UNSEEN_VARIANCE: Final = 0.25
"""Of a loss on fewer windows than others have, before any candidate told how far windows agree."""
REFIT: Final = 8
"""Observations between two fits of the hyperparameters: these change slowly, and finding them takes long."""
OWN_DEVIATION: Final = 0.15
"""Octaves by which a strategy differs from those most like it, before any told."""
DIRECTED_SHARE: Final = 0.75
"""Of the directed forecast in what is expected beforehand; the scattered one has the rest."""
_MIDDLE_OCTAVES: Final = 4.0
"""Losses that matter lie about here: the slope of a forecast turns around it."""


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
        text: int = 0,
        most_bp: float = math.inf,
    ) -> None:
        """Condition the process; its hyperparameters are those of the first observations, a multiple of `REFIT`.

        Args:
            pool: The candidates.
            indices: Those observed, at least one, in the order in which they were.
            losses: The losses of each, as for `octaves_of`.
            text: Which of the texts.
            most_bp: A loss beyond which nothing needs to be told apart, in basis points: a strategy that destroys the
                cache must not bend the model where it counts.
        """
        most = float(loss_octaves(most_bp))
        chosen = np.asarray(indices)
        octaves, variances = octaves_of(losses)
        octaves = np.minimum(octaves, most)
        if pool.forecast is None:
            ratio = np.log2(pool.ratio)
            inputs = _scaled(np.column_stack([pool.features, ratio]))
            self._trend = _line(ratio[chosen], octaves)(ratio)
            self._unit = max(float((octaves - self._trend[chosen]).std()), 0.1)
            columns = Columns.of(inputs, 0)
        else:
            # beyond the most, a forecast says no more than that
            known = np.minimum(loss_octaves(pool.forecast[:, text]), most + 1.0)
            inputs = np.column_stack([_scaled(pool.features), known - _MIDDLE_OCTAVES])
            self._trend = known @ (DIRECTED_SHARE, 1 - DIRECTED_SHARE)
            self._unit = 1.0
            columns = Columns.of(inputs, known.shape[1])
        fitted = len(chosen) // REFIT * REFIT
        first = fitted or len(chosen)
        early, noise = octaves_of(losses[:first])
        rest = np.minimum(early, most) - self._trend[chosen[:first]]
        basis = _Data.of(inputs[chosen[:first]], rest / self._unit, noise / self._unit**2)
        process = _fitted(basis, columns) if fitted else _model(basis, columns)
        self._kernel, self._own = (
            process.covar_module,
            float(process.likelihood.second_noise.detach()),
        )
        self._inputs = torch.from_numpy(inputs)
        covariance = self._covariances(chosen)
        among = covariance[chosen] + np.diag(variances / self._unit**2 + self._own)
        root = np.linalg.cholesky(among)
        # [m, n]: how all candidates go with what the observations say, each apart from those before it
        self._half = solve_triangular(root, covariance.T, lower=True, check_finite=False)
        told = solve_triangular(root, (octaves - self._trend[chosen]) / self._unit, lower=True)
        self._mean = told @ self._half
        with torch.no_grad():
            alone = self._kernel(self._inputs, diag=True).numpy()
        self._variance = alone - (self._half**2).sum(axis=0)

    def belief(self) -> Belief:
        """Return what is believed of every candidate of the pool, including what is a candidate's own."""
        return Belief(
            mean=self._trend + self._mean * self._unit,
            deviation=np.sqrt(np.maximum(self._variance, 1e-12) + self._own) * self._unit,
        )

    def suppose(self, index: int) -> None:
        """Condition on a candidate having the loss that is expected of it.

        Its neighbours then have nothing new to tell, and the next of a batch is chosen elsewhere (Ginsbourger, Le
        Riche and Carraro, Kriging is well-suited to parallelize optimization, 2010). What is expected of the others
        stays what it is.
        """
        shared = self._covariances([index])[:, 0] - self._half[:, index] @ self._half
        noise = LEAST_VARIANCE / self._unit**2 + self._own
        row = shared / np.sqrt(max(shared[index], 0.0) + noise)
        self._half = np.vstack([self._half, row])
        self._variance = self._variance - row**2

    def _covariances(self, indices: Sequence[int] | IntArray) -> FloatArray:
        """Return ``[n, len(indices)]``: how all candidates go with some."""
        with torch.no_grad():
            some = self._inputs[list(indices)]
            dense: FloatArray = self._kernel(self._inputs, some).to_dense().numpy()
        return dense


@dataclass(frozen=True, slots=True)
class _Data:
    """Observations, hashable.

    Attributes:
        shape: Of the inputs.
        inputs: Float64, as bytes.
        targets: The same.
        variances: The same.
    """

    shape: tuple[int, int]
    inputs: bytes
    targets: bytes
    variances: bytes

    @classmethod
    def of(cls, inputs: FloatArray, targets: FloatArray, variances: FloatArray) -> Self:
        """Copy arrays."""
        rows, columns = inputs.shape
        return cls((rows, columns), inputs.tobytes(), targets.tobytes(), variances.tobytes())

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ``[n, columns]`` inputs, ``[n, 1]`` targets and ``[n, 1]`` variances."""
        inputs, targets, variances = (
            torch.frombuffer(bytearray(data), dtype=torch.float64).reshape(self.shape[0], -1)
            for data in (self.inputs, self.targets, self.variances)
        )
        return inputs, targets, variances


def _model(data: _Data, columns: Columns) -> SingleTaskGP:
    """Return a process whose hyperparameters are those of their priors."""
    inputs, targets, variances = data.tensors()
    # what is a strategy's own can't be told from noise, but is no less true: beliefs include it
    likelihood = FixedNoiseGaussianLikelihood(variances[:, 0], learn_additional_noise=True)
    likelihood.register_prior(
        "own_prior",
        LogNormalPrior(2 * math.log(OWN_DEVIATION), 1.0),
        lambda module: module.second_noise,
        lambda module, value: module.second_noise_covar.initialize(noise=value),
    )
    likelihood.second_noise = OWN_DEVIATION**2
    return SingleTaskGP(
        inputs,
        targets,
        train_Yvar=variances,
        likelihood=likelihood,
        mean_module=ZeroMean(),
        covar_module=kernel_of(columns),
        outcome_transform=None,
    )


@lru_cache(maxsize=64)
def _fitted(data: _Data, columns: Columns) -> SingleTaskGP:
    """Return a process of the most likely hyperparameters, or their priors' if there are none; to be read only."""
    with warnings.catch_warnings():
        # numerical warnings of the optimiser: the fit it ends with is judged by its likelihood alone
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = _model(data, columns)
        try:
            fit_gpytorch_mll(DenseMarginalLikelihood(model.likelihood, model), max_attempts=2)
        except (ModelFittingError, NotPSDError):
            model = _model(data, columns)
    return model


def _scaled(columns: FloatArray) -> FloatArray:
    """Return columns scaled to 0..1, without those that are the same for all."""
    least, span = columns.min(axis=0), np.ptp(columns, axis=0)
    kept = span > 0
    scaled: FloatArray = (columns - least)[:, kept] / span[kept]
    return scaled


def _line(x: FloatArray, y: FloatArray) -> Callable[[FloatArray], FloatArray]:
    """Return the line that does not fall, and fits the points best in the squares."""
    centre, height = float(x.mean()), float(y.mean())
    spread = float(((x - centre) ** 2).sum())
    slope = max(float(((x - centre) * (y - height)).sum()) / spread, 0.0) if spread > 0 else 0.0
    return lambda at: height + slope * (at - centre)
