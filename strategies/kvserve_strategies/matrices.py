"""The integer matrices that the linear stages of a chain are folded into, for each block of a piece.

They do not depend on positions, nor on the step of the quantiser, which makes plans of them for
`kvserve_kernels.linear`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels import linear
from kvserve_strategies.bundle import Bundle, Rope
from kvserve_strategies.folding import LEAST_DEVIATION, fold
from kvserve_strategies.stage import Space, Stage, Where
from kvserve_strategies.stages.grid import Grid, live_components, thresholds
from kvserve_strategies.stages.importance import Importance
from kvserve_strategies.stages.metric import Metric
from kvserve_strategies.stages.pca import Block, Pca
from kvserve_strategies.stages.unrope import Unrope
from kvserve_strategies.turns import Real, ropes_of, rotation_of

_PLANS: Final = 512
_KEPT: Final = 64


@dataclass(frozen=True, eq=False)
class Matrices:
    """The folded matrices of a piece with all stored components, at a step of 1.

    Attributes:
        bases: For each block its group, which refers to rows and heads of the piece.
        factors: For each block its factors in float64.
        sigmas: For each block the deviations of its components, over the basis's scale.
        importance: For each block the weights of its features, if there are any.
        blocks: The blocks.
        ropes: The rotations that groups refer to.
        dim: Size of a head.
    """

    bases: tuple[linear.Group, ...]
    factors: tuple[NDArray[np.float64], ...]
    sigmas: tuple[Real, ...]
    importance: tuple[Real, ...]
    blocks: tuple[Block, ...]
    ropes: tuple[Rope, ...]
    dim: int
    _plans: dict[tuple[str, float, float, float], linear.Plan] = field(default_factory=dict)

    def plan(self, quantiser: Grid | Importance) -> linear.Plan:
        """Return the plan of all blocks with a quantiser's step."""
        step, dead_zone = quantiser.step, quantiser.dead_zone
        return self._kept(
            ("all", 0, step, dead_zone),
            lambda: [self._group(block, step, dead_zone) for block in range(len(self.bases))],
        )

    def block_plan(self, block: int, step: float, dead_zone: float) -> linear.Plan:
        """Return the plan of one block with a step of its own."""
        return self._kept(
            ("block", block, step, dead_zone), lambda: [self._group(block, step, dead_zone)]
        )

    def leading_plan(self, block: int, count: int, resolution: int) -> linear.Plan:
        """Return a plan of a block's leading components, in parts of their deviations."""
        return self._kept(
            ("leading", block, count, resolution),
            lambda: [self._leading(block, count, resolution)],
        )

    def means_plan(self, step: float) -> linear.Plan:
        """Return a plan of all components of all blocks, rounded to the nearest multiple of a step."""
        return self._kept(
            ("means", 0, step, 0),
            lambda: [
                base.first(
                    base.components,
                    factor=(factor / step).astype(np.float32),
                    offset=base.offset,
                    delta=base.delta,
                    unit=step,
                )
                for base, factor in zip(self.bases, self.factors, strict=True)
            ],
        )

    def moved(self, means: tuple[Real, ...]) -> "Matrices":
        """Return the matrices with other means of each block's channels; what is large is shared."""
        bases = tuple(base.moved(mean) for base, mean in zip(self.bases, means, strict=True))
        return replace(self, bases=bases, _plans={})

    def _kept(
        self, key: tuple[str, float, float, float], groups: Callable[[], list[linear.Group]]
    ) -> linear.Plan:
        plan = self._plans.get(key)
        if plan is None:
            plan = linear.Plan(groups=tuple(groups()), dim=self.dim)
            # a peer can name any step: what it makes us build must not be kept without end
            if len(self._plans) >= _PLANS:
                self._plans.pop(next(iter(self._plans)), None)
            self._plans[key] = plan
        return plan

    def _leading(self, block: int, count: int, resolution: int) -> linear.Group:
        sigma = np.maximum(self.sigmas[block][:count], LEAST_DEVIATION)
        factor = self.factors[block][:count] * (resolution / sigma)
        return self.bases[block].first(
            len(sigma),
            factor=factor.astype(np.float32),
            offset=np.full(len(sigma), 0.5, np.float32),
            delta=np.zeros(len(sigma), np.float32),
            unit=1.0,
        )

    def _group(self, block: int, step: float, dead_zone: float) -> linear.Group:
        live = live_components(self.sigmas[block], step)
        offset, shift = thresholds(self.sigmas[block][:live], step, dead_zone)
        return self.bases[block].first(
            live,
            factor=(self.factors[block][:live] / step).astype(np.float32),
            offset=offset,
            delta=shift,
            unit=step,
        )


@lru_cache(maxsize=_KEPT)
def matrices_of(stages: tuple[Stage, ...], bundle: Bundle, where: Where) -> Matrices:
    """Return the folded matrices of a piece; those of the last 64 are kept.

    Args:
        stages: Maybe unrope, mean, maybe a metric, and pca.
        bundle: The model's calibration.
        where: The piece's place, without positions.

    Raises:
        StrategyError: There is no calibration for this piece.
    """
    *before, pca = stages
    assert isinstance(pca, Pca)
    metric = next((stage.metric for stage in before if isinstance(stage, Metric)), None)
    key = pca.key(where.kinds, metric or Space.CENTRED)
    basis = pca.basis(bundle, where, key.space)
    ropes = ropes_of(bundle, where) if isinstance(before[0], Unrope) else ()
    blocks = pca.blocks(bundle, where)
    bases, factors = [], []
    for block in blocks:
        folded = fold(bundle, key, block.group)
        rotations = [
            rotation_of(row, where, bundle, ropes) for row in block.rows for _ in block.heads
        ]
        slots = [(row, head) for row in block.rows for head in block.heads]
        factors.append(folded.factor)
        bases.append(
            linear.Group(
                rows=np.array([row for row, _ in slots], np.int32),
                heads=np.array([head for _, head in slots], np.int32),
                rotations=np.array(rotations, np.int32),
                mean=folded.mean,
                inv_scale=folded.inv_scale,
                matrix=folded.matrix,
                factor=folded.factor.astype(np.float32),
                offset=np.full(len(folded.factor), 0.5, np.float32),
                delta=np.zeros(len(folded.factor), np.float32),
                inverse=folded.inverse,
            )
        )
    return Matrices(
        bases=tuple(bases),
        factors=tuple(factors),
        sigmas=tuple(basis.groups[b.group].sigma / np.float32(basis.scale) for b in blocks),
        importance=tuple(basis.importance[b.group] for b in blocks) if basis.importance else (),
        blocks=blocks,
        ropes=ropes,
        dim=bundle.layout.head_dim,
    )
