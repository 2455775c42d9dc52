"""Linear stages and the quantiser after them, folded into one integer matrix for each block of layers and heads.

This is the arithmetic of ``[unrope] mean [metric] pca [recentre] grid``, or with importance as the last;
`kvserve_kernels.linear` defines it. Integers make processors and GPUs write the same bytes: a native value less its
mean is scaled to int8 (with a shift for each token), multiplied by an int8 matrix, basis times metric, in exact
integers, and the sum is rounded to a level. Both int8 factors are rounded so that it hardly shows: see
`kvserve_strategies.folding`. The decoder moves each level to the mean of the values that led to it and multiplies by
the inverse matrix in bfloat16; its result need not be equal between devices to the last bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvserve_api.errors import StrategyError, ValuesError
from kvserve_api.strategy import Kind
from kvserve_kernels import linear
from kvserve_strategies.bundle import Bundle, Rope
from kvserve_strategies.folding import LEAST_DEVIATION, fold
from kvserve_strategies.linear import bundle_of
from kvserve_strategies.stage import Space, Spec, Stage, Where
from kvserve_strategies.stages.grid import Grid, live_components, thresholds
from kvserve_strategies.stages.importance import Importance
from kvserve_strategies.stages.mean import Mean
from kvserve_strategies.stages.metric import Metric
from kvserve_strategies.stages.pca import Block, Pca
from kvserve_strategies.stages.recentre import Recentre
from kvserve_strategies.stages.unrope import Unrope, rope_tables

_PLANS: Final = 512
_KEPT: Final = 64
_TABLES: Final = 64
Real: TypeAlias = NDArray[np.float32]
Positions: TypeAlias = range | NDArray[np.int64]


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

    def matrices(self, spec: Spec) -> "Matrices":
        """Return the folded matrices of a piece, which do not depend on positions and step.

        Raises:
            StrategyError: There is no calibration for this piece.
        """
        bundle, where = bundle_of(self.stages[0], spec)
        anywhere = replace(where, first_token=0, tokens_after=0)
        fixed = tuple(stage for stage in self.stages[:-1] if not isinstance(stage, Recentre))
        matrices = _matrices(fixed, bundle, anywhere)
        return matrices if self.means is None else matrices.moved(self.means)

    @property
    def recentre(self) -> Recentre | None:
        """The stage that sends the means of a piece, if there is one."""
        return next((stage for stage in self.stages if isinstance(stage, Recentre)), None)

    def with_means(self, means: tuple[Real, ...] | None) -> "Projection":
        """Return the projection of a piece with means of its own, or with the calibrated ones."""
        return replace(self, means=means)


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
    levels = linear.forward(native, plan, *turns(matrices, at, undo=True))
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
    linear.inverse(levels, plan, *turns(matrices, at, undo=False), out)


def turns(matrices: Matrices, at: Positions, *, undo: bool) -> tuple[Real, Real, bool]:
    """Return how keys at these positions turn: cosine and sine ``[rotations, tokens, pairs]``, and how pairs lie."""
    return rope_turns(matrices.ropes, at, undo=undo)


def rope_turns(ropes: tuple[Rope, ...], at: Positions, *, undo: bool) -> tuple[Real, Real, bool]:
    """Do as `turns` for the rotations of a piece."""
    return *_tables(ropes, at, undo=undo), _interleaved(ropes)


@lru_cache(maxsize=_KEPT)
def _matrices(stages: tuple[Stage, ...], bundle: Bundle, where: Where) -> Matrices:
    *before, pca = stages
    assert isinstance(pca, Pca)
    metric = next((stage.metric for stage in before if isinstance(stage, Metric)), None)
    key = pca.key(where.kinds, metric or Space.CENTRED)
    basis = pca.basis(bundle, where, key.space)
    ropes = _ropes(bundle, where) if isinstance(before[0], Unrope) else ()
    blocks = pca.blocks(bundle, where)
    bases, factors = [], []
    for block in blocks:
        folded = fold(bundle, key, block.group)
        rotations = [
            _rotation(row, where, bundle, ropes) for row in block.rows for _ in block.heads
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


def _ropes(bundle: Bundle, where: Where) -> tuple[Rope, ...]:
    """Return the different rotations of a piece's keys.

    Raises:
        StrategyError: They can't be applied together.
    """
    if where.kinds[0] != Kind.KEYS:
        return ()
    found = dict.fromkeys(bundle.rope_of(layer) for layer in where.layers)
    ropes = tuple(rope for rope in found if rope is not None)
    if len({(rope.interleaved, rope.rotary_dim) for rope in ropes}) > 1:
        raise StrategyError(
            Unrope.id, "layers of different rotary size or pairing need parts of their own"
        )
    return ropes


def _rotation(row: int, where: Where, bundle: Bundle, ropes: tuple[Rope, ...]) -> int:
    """Return which rotation a row turns by, -1 for none."""
    if not ropes or where.kinds[0] != Kind.KEYS or row >= len(where.layers):
        return -1
    rope = bundle.rope_of(where.layers[row])
    return -1 if rope is None else ropes.index(rope)


def _interleaved(ropes: tuple[Rope, ...]) -> bool:
    return bool(ropes) and ropes[0].interleaved


def _tables(ropes: tuple[Rope, ...], at: Positions, *, undo: bool) -> tuple[Real, Real]:
    """Return cosine and sine ``[rotations, tokens, pairs]`` of positions."""
    if isinstance(at, range):
        return _range_tables(ropes, at.start, len(at), undo)
    first = int(at.min())
    cos, sin = _range_tables(ropes, first, int(at.max()) + 1 - first, undo)
    return cos[:, at - first], sin[:, at - first]


@lru_cache(maxsize=_TABLES)
def _range_tables(
    ropes: tuple[Rope, ...], first: int, tokens: int, undo: bool
) -> tuple[Real, Real]:
    if not ropes:
        return np.empty((0, tokens, 0), np.float32), np.empty((0, tokens, 0), np.float32)
    pairs = [rope_tables(rope, first, tokens, undo=undo) for rope in ropes]
    cos, sin = (np.stack(side) for side in zip(*pairs, strict=True))
    return cos, sin
