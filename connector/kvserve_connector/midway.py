"""When what is left of a transfer is chosen for again, and what may code it. Pure.

A link that falls makes a transfer late that was chosen for what the link was before, and those behind it; one that
recovers has had quality given away for nothing. The transfer's own chunks are the first to show it.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Final

from kvserve_api.selection import Bound, Selection
from kvserve_connector.chunks import Chunk

MOVED: Final = 1.5
"""A link that is thought so many times faster or slower than it was has moved: estimates scatter by less."""
MOST_CHANGES: Final = 2
"""So often at most a transfer changes."""
_ON_MERIT: Final = frozenset({Bound.GOAL, Bound.KEPT, Bound.DEADLINE, Bound.UNSTABLE})


def moved(before_bytes_per_s: float, now_bytes_per_s: float) -> bool:
    """Tell whether a link has become another than the one that was chosen for."""
    return (
        now_bytes_per_s * MOVED < before_bytes_per_s or now_bytes_per_s > before_bytes_per_s * MOVED
    )


def by_merit(selection: Selection) -> bool:
    """Tell whether a choice was made by what the link is.

    What is pinned, or only shown, is not chosen again; nor is what is being tried out, or it would teach nothing.
    """
    return selection.bound in _ON_MERIT and selection.profile == selection.wanted


def follows(layer_step: int, layers: Sequence[int], chunks: Iterable[Chunk]) -> bool:
    """Tell whether a strategy can code chunks of a plan that was made for another one.

    Args:
        layer_step: How many layers it codes together.
        layers: How many layers each part of the cache has.
        chunks: The chunks.
    """
    return layer_step == 1 or all(
        chunk.layers.start % layer_step == 0
        and (chunk.layers.stop % layer_step == 0 or chunk.layers.stop == layers[chunk.part])
        for chunk in chunks
    )


def common_step(layer_step: int, others: Iterable[int], most_layers: int) -> int:
    """Return of how many layers chunks are to be multiples, so that others can go on where one has begun.

    Args:
        layer_step: How many layers the one codes together.
        others: How many the others code together; those come in that make no chunk larger than it would be otherwise.
        most_layers: Most layers of a chunk.
    """
    step = layer_step
    for other in others:
        joint = math.lcm(step, other)
        if joint <= max(most_layers, layer_step):
            step = joint
    return step
