"""A chain of stages that is known to work."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

import kvserve_strategies.stages
from kvserve_api.errors import StrategyError, ValuesError, WireError, WireReason
from kvserve_api.strategy import Kind, Part
from kvserve_api.wire import BYTES
from kvserve_kernels.finite import all_finite
from kvserve_kernels.linear import Cells
from kvserve_strategies import fused, recentring, tokenclass
from kvserve_strategies.bundle import BasisKey
from kvserve_strategies.projection import Projection
from kvserve_strategies.registry import make_stage
from kvserve_strategies.stage import Array, Bytes, Form, Role, Space, Spec, Stage
from kvserve_strategies.stages.grid import Grid
from kvserve_strategies.stages.importance import Importance
from kvserve_strategies.stages.ladder import Ladder
from kvserve_strategies.stages.metric import Metric
from kvserve_strategies.stages.pca import Pca
from kvserve_strategies.stages.recentre import Recentre
from kvserve_strategies.values import require_finite
from kvserve_strategies.wrap import join

__all__ = ["Chain"]

# importing the package registers every stage
_ = kvserve_strategies.stages
_ROLES = list(Role)
_PROBE = Spec(form=Form.NATIVE, layers=1, tokens=1, kv_heads=1, head_dim=1, dtype="bfloat16")


@dataclass(frozen=True, slots=True)
class Chain:
    """The stages that code what a part of a strategy covers.

    Attributes:
        stages: In the order of encoding; roles rise, and exactly the last one is a coder.

    Raises:
        StrategyError: The order is wrong, or a stage can't take what its predecessor gives.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if before.role == Role.CODE:
                raise StrategyError(
                    after.id, f"can't follow {before.id}: a coder is the last stage"
                )
            if _ROLES.index(before.role) > _ROLES.index(after.role):
                raise StrategyError(
                    after.id, f"can't follow {before.id}: the order is {' → '.join(_ROLES)}"
                )
            if before.role == after.role == Role.QUANTISE:
                raise StrategyError(
                    after.id, f"can't follow {before.id}: values are quantised once"
                )
            if isinstance(before, Importance) and not isinstance(after, Ladder):
                raise StrategyError(
                    after.id, f"can't follow {before.id}: tokens of a class need {Ladder.id}"
                )
            if isinstance(before, Recentre) and not isinstance(after, Grid | Importance):
                raise StrategyError(
                    after.id, f"can't follow {before.id}: {Grid.id} or {Importance.id} must"
                )
            if isinstance(after, Grid | Importance) and not isinstance(before, Pca | Recentre):
                raise StrategyError(
                    after.id, f"can't follow {before.id}: it quantises what {Pca.id} gives"
                )
        if not self.stages or self.stages[-1].role != Role.CODE:
            raise StrategyError("chain", "must end with a coder, like code.raw.v1")
        self.specs(_PROBE)

    @classmethod
    def of(cls, part: Part, path: str = "chain") -> Self:
        """Build the chain of one part of a strategy.

        Args:
            part: The part.
            path: Where it stands in its document, for errors.
        """
        stages = tuple(
            make_stage(config, f"{path}.chain[{index}]") for index, config in enumerate(part.chain)
        )
        # the order is checked as it was written, and then what codes together is joined
        return cls(join(cls(stages).stages))

    @property
    def lossless(self) -> bool:
        """Decoding gives back every value bit by bit."""
        return all(stage.lossless for stage in self.stages)

    @property
    def takes_bytes(self) -> bool:
        """It carries values that are not numbers too."""
        return all(stage.takes_bytes for stage in self.stages)

    @property
    def is_fixed_size(self) -> bool:
        """The size depends on the shape only."""
        return all(stage.is_fixed_size for stage in self.stages)

    @property
    def calibrated(self) -> bool:
        """A stage needs the calibration bundle."""
        return any(stage.calibrated for stage in self.stages)

    def basis_key(self, kinds: tuple[Kind, ...]) -> BasisKey | None:
        """Return which basis of the bundle the chain needs to code these kinds; None if none."""
        metric: str = Space.CENTRED
        for stage in self.stages:
            if isinstance(stage, Metric):
                metric = stage.metric
            if isinstance(stage, Pca):
                return stage.key(kinds, metric)
        return None

    @property
    def takes_halves(self) -> bool:
        """It reads keys and values where they are, and decodes into where they go; see `encode` and `decode_into`."""
        projected = Projection.find(self.stages)
        return projected is not None and projected[1].start == 0 and self._ends(projected[1])

    @property
    def layer_step(self) -> int:
        """Pieces must start at layers that are multiples of this."""
        return max((stage.layers for stage in self.stages if isinstance(stage, Pca)), default=1)

    def specs(self, spec: Spec) -> list[Spec]:
        """Return what each stage takes, for a NATIVE spec."""
        if spec.dtype == BYTES and not self.takes_bytes:
            first = next(stage for stage in self.stages if not stage.takes_bytes)
            raise StrategyError(first.id, "takes numbers, and this cache holds only bytes")
        taken: list[Spec] = []
        projected = Projection.find(self.stages)
        for index, stage in enumerate(self.stages):
            if projected and index == projected[1].stop:
                # what the step leaves of the components is known to bundle and step together
                live = projected[0].components(taken[projected[1].start])
                spec = replace(spec, head_dim=live)
            taken.append(spec)
            spec = stage.resolve(spec)
        return taken

    def section_bounds(self, specs: Sequence[Spec]) -> list[int]:
        """Return the most bytes of each section, for what `specs` gives."""
        bounds = [
            stage.encoded_nbytes(taken) for stage, taken in zip(self.stages, specs, strict=True)
        ]
        if len(self.stages) > 1 and isinstance(self.stages[-2], Importance):
            bounds[-1] = tokenclass.most_body_bytes(specs[-1])
        return bounds

    def encode(self, native: Cells, specs: Sequence[Spec]) -> list[tuple[Array, ...]]:
        """Return one section for each stage.

        Args:
            native: What the first stage takes, contiguous; only if `takes_halves` in two, or with any strides but the
                last.
            specs: What `specs` gives for it.

        Raises:
            ValuesError: The chain is lossy and a value is NaN, infinite or too large for it.
        """
        sections: list[tuple[Array, ...]] = [()] * len(self.stages)
        if self.takes_halves:
            # it finds what is not finite on its own
            folded = self._recentred(*self._projection(), native, specs[0], sections)
            if isinstance(folded.quantiser, Importance):
                sections[-2:] = tokenclass.encode(folded, native, specs[0])
            else:
                sections[-1] = fused.encode(folded, native, specs[0])
            return sections
        assert not isinstance(native, tuple)
        if not self.lossless and not all_finite(native, specs[0].dtype):
            raise ValuesError("a lossy strategy can't carry NaN or infinity")
        value: Array | None = native
        projected = Projection.find(self.stages)
        index = 0
        while index < len(self.stages):
            assert value is not None
            if projected and index == projected[1].start:
                run = projected[1]
                folded = self._recentred(*projected, value, specs[index], sections)
                if isinstance(folded.quantiser, Importance):
                    sections[-2:] = tokenclass.encode(folded, value, specs[index])
                    break
                index = run.stop
                if isinstance(self.stages[index], Ladder):
                    sections[index] = fused.encode(folded, value, specs[run.start])
                    break
                levels = folded.encode(value, specs[run.start])
                value = np.ascontiguousarray(levels.T).reshape(specs[index].shape)
            encoded = self.stages[index].encode(value, specs[index])
            sections[index] = encoded.section
            value = encoded.value
            index += 1
        return sections

    def decode_into(self, sections: Sequence[Bytes], specs: Sequence[Spec], out: Cells) -> None:
        """Undo `encode` into values, if `takes_halves`.

        Raises:
            WireError: A section is not what its stage writes.
        """
        folded, run = self._projection()
        self._decode_projection(folded, run, sections, specs[0], out)

    def decode(self, sections: Sequence[Bytes], specs: Sequence[Spec]) -> Array:
        """Undo `encode`.

        Raises:
            WireError: A section is not what its stage writes.
        """
        value: Array | None = None
        projected = Projection.find(self.stages)
        index = len(self.stages) - 1
        while index >= 0:
            if projected and index == projected[1].stop:
                folded, run = projected
                taken = specs[run.start]
                out = np.empty(taken.shape, taken.array_dtype)
                if self._ends(run):
                    self._decode_projection(folded, run, sections, taken, out)
                else:
                    folded = self._with_means(folded, run, sections, taken)
                    decoded = self.stages[index].decode(sections[index], None, specs[index])
                    levels = np.ascontiguousarray(decoded.reshape(specs[index].tokens, -1).T)
                    folded.decode(levels, taken, out)
                value = out
                index = run.start
            else:
                value = self.stages[index].decode(sections[index], value, specs[index])
            index -= 1
        assert value is not None
        if not self.lossless and specs[-1].form == Form.NATIVE:
            # a coder of native values carries NaN and infinity, the stages before it do not
            require_finite(value, specs[0], self.stages[-1].id)
        return value

    def _projection(self) -> tuple[Projection, range]:
        projected = Projection.find(self.stages)
        assert projected is not None
        return projected

    def _ends(self, run: range) -> bool:
        """Return whether the ladder codes what stages of a projection give; nothing else follows importance."""
        return isinstance(self.stages[run.stop], Ladder)

    def _recentred(
        self,
        folded: Projection,
        run: range,
        native: Cells,
        spec: Spec,
        sections: list[tuple[Array, ...]],
    ) -> Projection:
        """Write the means of a piece, if they are sent, and return the projection with them."""
        if folded.recentre is None:
            return folded
        at = run.start + folded.stages.index(folded.recentre)
        sections[at], moved = recentring.encode(folded.recentre, folded, native, spec)
        return moved

    def _with_means(
        self, folded: Projection, run: range, sections: Sequence[Bytes], spec: Spec
    ) -> Projection:
        """Return the projection with the means that were sent; nothing else may be in its sections."""
        silent = set(run)
        if isinstance(folded.quantiser, Importance):
            silent.remove(run[-1])
        stage = folded.recentre
        if stage is not None:
            at = run.start + folded.stages.index(stage)
            silent.remove(at)
            folded = recentring.decode(stage, folded, sections[at], spec)
        if any(sections[at].size for at in silent):
            raise WireError(WireReason.MALFORMED, "linear stages write nothing")
        return folded

    def _decode_projection(
        self, folded: Projection, run: range, sections: Sequence[Bytes], spec: Spec, out: Cells
    ) -> None:
        """Decode what a projection and the ladder after it wrote."""
        folded = self._with_means(folded, run, sections, spec)
        if isinstance(folded.quantiser, Importance):
            tokenclass.decode(folded, sections[-2], sections[-1], spec, out)
        else:
            fused.decode(folded, sections[-1], spec, out)
