"""A chain of stages that is known to work."""

from dataclasses import dataclass
from typing import Self

import kvserve_strategies.stages
from kvserve_api.errors import StrategyError, ValuesError
from kvserve_api.strategy import Part
from kvserve_kernels.finite import all_finite
from kvserve_strategies.registry import make_stage
from kvserve_strategies.stage import Array, Bytes, Form, Role, Spec, Stage

__all__ = ["Chain"]

# importing the package registers every stage
_ = kvserve_strategies.stages
_ROLES = list(Role)
_PROBE = Spec(form=Form.NATIVE, layers=1, tokens=1, kv_heads=1, head_dim=1, dtype="bfloat16")


@dataclass(frozen=True, slots=True)
class Chain:
    """The stages that code the keys, or the values, of a piece of the cache.

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
        if not self.stages or self.stages[-1].role != Role.CODE:
            raise StrategyError("chain", "must end with a coder, like code.raw.v1")
        self.specs(_PROBE)

    @classmethod
    def of(cls, part: Part) -> Self:
        """Build the chain of one part of a strategy."""
        return cls(
            tuple(
                make_stage(config, f"{part.kind.value}.chain[{index}]")
                for index, config in enumerate(part.chain)
            )
        )

    @property
    def lossless(self) -> bool:
        """Decoding gives back every value bit by bit."""
        return all(stage.lossless for stage in self.stages)

    @property
    def is_fixed_size(self) -> bool:
        """The size depends on the shape only."""
        return all(stage.is_fixed_size for stage in self.stages)

    def specs(self, spec: Spec) -> list[Spec]:
        """Return what each stage takes, for a NATIVE spec."""
        taken = []
        for stage in self.stages:
            taken.append(spec)
            spec = stage.resolve(spec)
        return taken

    def section_bounds(self, spec: Spec) -> list[int]:
        """Return the most bytes of each section, for a NATIVE spec."""
        return [
            stage.encoded_nbytes(taken)
            for stage, taken in zip(self.stages, self.specs(spec), strict=True)
        ]

    def encode(self, native: Array, spec: Spec) -> list[tuple[Array, ...]]:
        """Return one section for each stage.

        Raises:
            ValuesError: The chain is lossy and a value is NaN, infinite or too large for it.
        """
        if not self.lossless and not all_finite(native, spec.dtype):
            raise ValuesError("a lossy strategy can't carry NaN or infinity")
        sections = []
        value: Array | None = native
        for stage, taken in zip(self.stages, self.specs(spec), strict=True):
            assert value is not None
            encoded = stage.encode(value, taken)
            sections.append(encoded.section)
            value = encoded.value
        return sections

    def decode(self, sections: list[Bytes], spec: Spec) -> Array:
        """Undo `encode`.

        Raises:
            WireError: A section is not what its stage writes.
        """
        value: Array | None = None
        stages = zip(self.stages, sections, self.specs(spec), strict=True)
        for stage, section, taken in reversed(list(stages)):
            value = stage.decode(section, value, taken)
        assert value is not None
        return value
