"""Groups of layers that share their blocks, as an engine's scheduler sees them, and how far back each looks."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Reach(StrEnum):
    """What a layer needs of the tokens before the next one."""

    ALL = "all"
    WINDOW = "window"
    CHUNK = "chunk"
    STATE = "state"


class Opaque(StrEnum):
    """Why a cache is carried as whole blocks, whose numbers are not read; a label of metrics."""

    MLA = "MlaLatents"
    STATE = "RecurrentState"
    QUANTISED = "QuantisedCache"
    WINDOW = "SlidingWindow"
    GROUPS = "SeveralGroups"
    UNEVEN = "UnevenLayers"
    BACKEND = "UnknownBackend"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Layers whose blocks are named by one list of ids in each request.

    Attributes:
        index: Which of a request's lists of block ids that is.
        layer_names: The layers, in model order.
        block_tokens: Tokens in a block.
        reach: What the next token needs of those before it.
        span: Tokens of a window or chunk.
        spare_blocks: At the end of a recurrent group's list, blocks that do not hold the state.
    """

    index: int
    layer_names: tuple[str, ...]
    block_tokens: int
    reach: Reach = Reach.ALL
    span: int = 0
    spare_blocks: int = 0

    def blocks(self, tokens: range) -> range:
        """Return which of a request's blocks must be carried for these tokens, counted from its first.

        Args:
            tokens: Those that are not there yet; the token after them is computed next.
        """
        start = tokens.start
        match self.reach:
            case Reach.STATE:
                return range(1)
            case Reach.WINDOW:
                start = max(start, tokens.stop - self.span + 1)
            case Reach.CHUNK:
                start = max(start, tokens.stop // self.span * self.span)
        if start >= tokens.stop:
            return range(0)
        return range(start // self.block_tokens, -(-tokens.stop // self.block_tokens))

    def held(self, block_ids: Sequence[int], tokens: int) -> tuple[int, ...]:
        """Return the ids of the blocks that `blocks` counts, of a request that holds so many tokens."""
        if self.reach == Reach.STATE:
            # the running state is the last one that is not kept for speculation
            end = max(1, len(block_ids) - self.spare_blocks)
            return tuple(block_ids[end - 1 : end])
        return tuple(block_ids[: -(-tokens // self.block_tokens)])
