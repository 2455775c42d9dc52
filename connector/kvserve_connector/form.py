"""How an engine's KV cache is cut for the wire: parts of layers with one layout, and what may code them.

A cache of plain keys and values is one part, whose rows are tokens. Any other is carried in whole blocks, as many parts
as it has groups of layers with equal blocks; where a block's numbers are known to be numbers its rows are the states in
it, else the block is one row of bytes. What a block holds only the engine knows, so both ends must store it alike, and
nothing may be lost of it.
"""

from dataclasses import dataclass, field
from typing import Final

from kvserve_api.canonical import digest
from kvserve_api.wire import BYTES, KVLayout
from kvserve_connector.groups import Group, Opaque
from kvserve_strategies import Pipeline

TOKEN_STEP: Final = 128
"""Cuts between tokens fall on multiples of this, so that coders with token groups lose nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Layers that are coded together.

    Attributes:
        layout: Their form; its tokens are the rows of this part.
        group: What their blocks are.
        block_rows: Rows in a block.
        whole_blocks: Only whole blocks are carried; else single tokens.
    """

    layout: KVLayout
    group: Group
    block_rows: int
    whole_blocks: bool = False

    @property
    def least_rows(self) -> int:
        """Rows of a layer that may make a chunk of their own, however large: there, cuts between rows fall."""
        return TOKEN_STEP if self.block_rows > 1 else 1

    def rows(self, tokens: range) -> range:
        """Return which rows of a request must be carried for these tokens."""
        if not self.whole_blocks:
            return tokens
        blocks = self.group.blocks(tokens)
        return range(blocks.start * self.block_rows, blocks.stop * self.block_rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What both ends of a transfer must agree on.

    Attributes:
        fingerprint: Identity of the model.
        parts: What is carried, in this order.
        opaque: Why the cache is carried as whole blocks; None if it is not.
        blocks: Digest of what the blocks hold and how; empty if they are not carried whole.
        rank: Which of the tensor-parallel workers this is.
        ranks: How many there are.
    """

    fingerprint: str
    parts: tuple[Part, ...]
    opaque: Opaque | None = None
    blocks: str = ""
    rank: int = 0
    ranks: int = 1
    identities: tuple[str, ...] = field(init=False)
    """For each part what its blobs give as their model, so that none is taken for another's."""

    def __post_init__(self) -> None:
        own = {"model": self.fingerprint, "blocks": self.blocks}
        identities = (
            tuple(digest(own | {"part": number}) for number in range(len(self.parts)))
            if self.opaque
            else (self.fingerprint,) * len(self.parts)
        )
        object.__setattr__(self, "identities", identities)

    @property
    def layout(self) -> KVLayout:
        """The layout of the first part; of the whole cache if it is not opaque."""
        return self.parts[0].layout

    def native_bytes(self, tokens: range) -> int:
        """Return the bytes that are carried for these tokens, uncompressed."""
        return sum(part.layout.native_bytes(len(part.rows(tokens))) for part in self.parts)

    def carries(self, pipeline: Pipeline) -> bool:
        """Tell whether a strategy may code this cache; a part that it can't code goes raw.

        Bases that join heads can't be cut into the heads of one worker, so none that is calibrated may code a slice.
        """
        if self.ranks > 1 and pipeline.calibrated:
            return False
        if self.opaque is None:
            return True
        numbers = any(part.layout.dtype != BYTES for part in self.parts)
        return pipeline.lossless and not pipeline.calibrated and (numbers or pipeline.takes_bytes)
