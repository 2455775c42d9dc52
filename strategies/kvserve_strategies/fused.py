"""A projection with the ladder's coder after it, in one call of native code where there is some; the same bytes."""

from kvserve_api.errors import WireError, WireReason
from kvserve_kernels import fused
from kvserve_kernels.linear import Cells
from kvserve_strategies import projection
from kvserve_strategies.ladder import decode_levels, encode_levels, stream_groups
from kvserve_strategies.projection import Projection
from kvserve_strategies.stage import Array, Bytes, Spec
from kvserve_strategies.stages.ladder import Ladder
from kvserve_strategies.turns import rope_turns


def encode(folded: Projection, native: Cells, spec: Spec) -> tuple[Array, ...]:
    """Return the ladder's section of a piece.

    Args:
        folded: The linear stages and the quantiser, by one step.
        native: ``[rows, tokens, heads, dim]``.
        spec: Of the values.

    Raises:
        ValuesError: A value is NaN, infinite or too large.
        StrategyError: There is no calibration for this piece.
    """
    matrices = folded.matrices(spec)
    plan = matrices.plan(folded.quantiser)
    turns = rope_turns(matrices.ropes, projection.positions(spec), undo=True)
    if fused.available():
        # how streams are cut depends on how many channels are not all zero; a wrong guess costs time
        groups = stream_groups(_likely_live(plan.components, folded.quantiser.step), spec.tokens)
        section = fused.encode(native, plan, *turns, groups)
        if section is not None:
            return (section,)
    return encode_levels(folded.encode(native, spec))


def decode(folded: Projection, section: Bytes, spec: Spec, out: Cells) -> None:
    """Undo `encode` into ``[rows, tokens, heads, dim]``.

    Raises:
        WireError: The section is not what `encode` writes.
    """
    matrices = folded.matrices(spec)
    plan = matrices.plan(folded.quantiser)
    if not fused.available():
        levels = decode_levels(section, plan.components, spec.tokens)
        folded.decode(levels, spec, out)
        return
    turns = rope_turns(matrices.ropes, projection.positions(spec), undo=False)
    if not fused.decode(section, plan, *turns, out):
        raise WireError(WireReason.MALFORMED, f"{Ladder.id}: not what an encoder writes")


def _likely_live(components: int, step: float) -> int:
    """Return how many components of a long piece have a level other than 0, about.

    On prose and on sums, 512 or 1,024 tokens, bases over a head and over 3 layers: 98 to 100 % at a step of .15, 96 to
    98 at .35, 91 to 95 at 1. Fewer have in short pieces, whose streams don't depend on it.
    """
    return round(components * max(1 - step / 32, 0.75))
