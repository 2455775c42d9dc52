"""Linear stages and the quantiser after them, folded into one integer matrix for each block of layers and heads.

This is the arithmetic of ``[unrope] mean [metric] pca [recentre] grid``, or with importance as the last;
`kvserve_kernels.linear` defines it. Integers make processors and GPUs write the same bytes: a native value less its
mean is scaled to int8 (with a shift for each token), multiplied by an int8 matrix, basis times metric, in exact
integers, and the sum is rounded to a level. Both int8 factors are rounded so that it hardly shows: see
`kvserve_strategies.folding`. The decoder moves each level to the mean of the values that led to it and multiplies by
the inverse matrix in bfloat16; its result need not be equal between devices to the last bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvserve_api.errors import ValuesError
from kvserve_kernels import linear
from kvserve_strategies.linear import bundle_of
from kvserve_strategies.matrices import Matrices, matrices_of
from kvserve_strategies.stage import Spec, Stage
from kvserve_strategies.stages.grid import Grid
from kvserve_strategies.stages.importance import Importance
from kvserve_strategies.stages.mean import Mean
from kvserve_strategies.stages.metric import Metric
from kvserve_strategies.stages.pca import Pca
from kvserve_strategies.stages.recentre import Recentre
from kvserve_strategies.stages.unrope import Unrope
from kvserve_strategies.turns import Positions, Real, rope_turns


@dataclass(frozen=True, slots=True)
class Projection:
    """The linear stages of a chain with the quantiser that ends them.

    Attributes:
        stages: From the native values to the levels: maybe unrope, mean, maybe a metric, pca, maybe recentre, grid or
            importance.
        means: For each block of a piece the means of its channels, if they are not the calibrated ones.
    """

    stages: tuple[Stage, ...]
    means: tuple[Real, ...] | None = None

    @classmethod
    def find(cls, stages: Sequence[Stage]) -> tuple["Projection", range] | None:
        """Return the projection in a chain and its stages' indices; None if there is none."""
        for stop, stage in enumerate(stages):
            if isinstance(stage, Grid | Importance):
                start = stop
                while start > 0 and isinstance(
                    stages[start - 1], Unrope | Mean | Metric | Pca | Recentre
                ):
                    start -= 1
                return cls(tuple(stages[start : stop + 1])), range(start, stop + 1)
        return None

    @property
    def quantiser(self) -> Grid | Importance:
        """The last stage."""
        last = self.stages[-1]
        assert isinstance(last, Grid | Importance)
        return last

    def encode(self, native: linear.Cells, spec: Spec) -> NDArray[np.int16]:
        """Return the levels ``[components, tokens]`` of a piece, by one step.

        Raises:
            ValuesError: A value is too large.
            StrategyError: There is no calibration for this piece.
        """
        matrices = self.matrices(spec)
        return forward(matrices.plan(self.quantiser), matrices, native, positions(spec))

    def decode(self, levels: NDArray[np.int16], spec: Spec, out: linear.Cells) -> None:
        """Write the native values of levels by one step."""
        matrices = self.matrices(spec)
        inverse(matrices.plan(self.quantiser), matrices, levels, positions(spec), out)

    def components(self, spec: Spec) -> int:
        """Return how many components may have levels; without a bundle the most there may be."""
        if spec.bundle is None or spec.where is None:
            return spec.count // spec.tokens
        matrices = self.matrices(spec)
        if isinstance(self.quantiser, Importance):
            return sum(base.components for base in matrices.bases)
        return matrices.plan(self.quantiser).components

    def matrices(self, spec: Spec) -> Matrices:
        """Return the folded matrices of a piece, which do not depend on positions and step.

        Raises:
            StrategyError: There is no calibration for this piece.
        """
        bundle, where = bundle_of(self.stages[0], spec)
        anywhere = replace(where, first_token=0, tokens_after=0)
        fixed = tuple(stage for stage in self.stages[:-1] if not isinstance(stage, Recentre))
        matrices = matrices_of(fixed, bundle, anywhere)
        return matrices if self.means is None else matrices.moved(self.means)

    @property
    def recentre(self) -> Recentre | None:
        """The stage that sends the means of a piece, if there is one."""
        return next((stage for stage in self.stages if isinstance(stage, Recentre)), None)

    def with_means(self, means: tuple[Real, ...] | None) -> "Projection":
        """Return the projection of a piece with means of its own, or with the calibrated ones."""
        return replace(self, means=means)


def positions(spec: Spec) -> range:
    """Return the positions of a piece's tokens."""
    assert spec.where is not None
    return range(spec.where.first_token, spec.where.first_token + spec.tokens)


def forward(
    plan: linear.Plan, matrices: Matrices, native: linear.Cells, at: Positions
) -> NDArray[np.int16]:
    """Return the levels ``[components, tokens]`` of values ``[rows, tokens, heads, dim]``.

    Raises:
        ValuesError: A value is NaN, infinite or too large.
    """
    levels = linear.forward(native, plan, *rope_turns(matrices.ropes, at, undo=True))
    if levels is None:
        raise ValuesError("a value is NaN, infinite, or too far from what calibration saw")
    return levels


def inverse(
    plan: linear.Plan,
    matrices: Matrices,
    levels: NDArray[np.int16],
    at: Positions,
    out: linear.Cells,
) -> None:
    """Write what levels stand for into ``[rows, tokens, heads, dim]``."""
    linear.inverse(levels, plan, *rope_turns(matrices.ropes, at, undo=False), out)
