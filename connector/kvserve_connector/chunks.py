"""How a transfer is cut into chunks: groups of layers, and ranges of tokens where those would still be too large."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final, Self

from kvserve_api.errors import SpecError, WireError, WireReason
from kvserve_api.wire import KVLayout
from kvserve_connector.form import TOKEN_STEP, Form
from kvserve_connector.remote import MAX_TOKENS

MAX_CHUNK_BYTES: Final = 8 << 20
"""Most native bytes of a chunk: with two in flight on each side it bounds a transfer's memory."""
LEAST_CUTS: Final = 12
"""So many groups of layers has a transfer that goes on while its prefill runs: one of them is left when that ends."""
AHEAD_TOKENS: Final = 1024
"""Most tokens of its chunks: what is ready at the end in one piece is coded, sent and decoded one after the other."""
AHEAD_RANGES: Final = 256
"""Most ranges of tokens that it is cut into."""
DEADLINE_TOKENS: Final = 512
"""Most tokens of the chunks of a transfer that has a deadline and may change midway: what was begun is sent as it
began, and where a link falls to a fifth two chunks of many tokens are late by themselves."""
LANES: Final = 32
"""Where many layers make even that too many tokens: what entropy coders code side by side."""
MAX_PARTS: Final = 1024
MAX_LAYERS: Final = 65_535


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """What one blob of a transfer covers.

    Attributes:
        layers: Layers of the part.
        tokens: Its rows: tokens, unless the cache is carried as whole blocks.
        part: Which part of the cache, see `kvserve_connector.form.Form`.
    """

    layers: range
    tokens: range
    part: int = 0

    def to_json(self) -> list[int]:
        """Return the four bounds, and the part unless it is the first."""
        bounds = [self.layers.start, self.layers.stop, self.tokens.start, self.tokens.stop]
        return [*bounds, self.part] if self.part else bounds

    @classmethod
    def read(cls, value: Any) -> Self:
        """Read it from its plain form; `SpecError` if anything in it is wrong."""
        if not isinstance(value, list) or len(value) not in (4, 5):
            raise SpecError("chunks", "must be lists of four or five integers")
        part = value[4] if len(value) == 5 else 0
        if type(part) is not int or not 0 <= part <= MAX_PARTS:
            raise SpecError("chunks.part", f"must be an integer up to {MAX_PARTS}")
        return cls(
            part=part,
            layers=read_span(value[:2], "chunks.layers", MAX_LAYERS),
            tokens=read_span(value[2:4], "chunks.tokens", MAX_TOKENS),
        )

    def native_bytes(self, layout: KVLayout) -> int:
        """Return the bytes of its KV, uncompressed."""
        return layout.native_bytes(len(self.tokens)) // layout.layers * len(self.layers)


def plan_form(
    form: Form,
    tokens: range,
    chunk_layers: int,
    *,
    layer_multiple: int = 1,
    most_tokens: int | None = None,
) -> tuple[Chunk, ...]:
    """Cut a transfer of all parts of a cache into chunks, part after part; see `plan`."""
    return tuple(
        replace(chunk, part=number)
        for number, part in enumerate(form.parts)
        for chunk in plan(
            part.layout,
            part.rows(tokens),
            chunk_layers,
            layer_multiple=layer_multiple,
            token_step=part.least_rows,
            most_tokens=most_tokens,
        )
    )


def plan_ahead(
    form: Form, tokens: range, chunk_layers: int, *, layer_multiple: int = 1, step_tokens: int
) -> tuple[Chunk, ...]:
    """Cut a transfer whose prefill may be running: as `plan_form`, so fine that little is left when it ends.

    Args:
        form: How the cache is cut.
        tokens: Which tokens are sent.
        chunk_layers: Most layers in a chunk.
        layer_multiple: Layers that the strategy codes together.
        step_tokens: Most tokens that the engine computes in one step.
    """
    return plan_form(
        form,
        tokens,
        ahead_layers(form, chunk_layers),
        layer_multiple=layer_multiple,
        most_tokens=range_tokens(len(tokens), min(step_tokens, AHEAD_TOKENS)),
    )


def range_tokens(tokens: int, wanted: int) -> int:
    """Return into ranges of how many tokens a transfer is cut.

    Args:
        tokens: How many it has.
        wanted: What is wanted; it is more where that would be too many ranges.
    """
    step = max(wanted, -(-tokens // AHEAD_RANGES))
    return max(1, round(step / TOKEN_STEP)) * TOKEN_STEP


def ahead_layers(form: Form, chunk_layers: int) -> int:
    """Return the most layers in a chunk of `plan_ahead`, where the strategy allows it."""
    return min(chunk_layers, -(-form.layout.layers // LEAST_CUTS))


def plan(
    layout: KVLayout,
    tokens: range,
    chunk_layers: int,
    *,
    layer_multiple: int = 1,
    token_step: int = TOKEN_STEP,
    most_tokens: int | None = None,
) -> tuple[Chunk, ...]:
    """Cut a transfer into chunks of at most ``MAX_CHUNK_BYTES``, and of at most so many layers if the strategy allows.

    Token ranges are the outer loop, so that a coder sees long runs of tokens first.

    Args:
        layout: Form of the cache.
        tokens: Which tokens are sent.
        chunk_layers: Most layers in a chunk.
        layer_multiple: Layers that the strategy codes together: chunks begin at multiples of it, and hold as many even
            if that is more than ``chunk_layers``.
        token_step: Cuts between tokens fall on multiples of this.
        most_tokens: Most tokens in a chunk; None for as many as fit.
    """
    if not tokens:
        return ()
    layer_bytes = layout.native_bytes(1) // layout.layers
    least_layers = min(layer_multiple, layout.layers)
    token_step = min(_most_tokens(layer_bytes, least_layers, token_step), len(tokens))
    token_step = min(token_step, most_tokens or token_step)
    fitting = MAX_CHUNK_BYTES // (layer_bytes * token_step)
    most_layers = min(chunk_layers, fitting, layout.layers) // least_layers * least_layers
    layer_step = max(least_layers, most_layers)
    return tuple(
        Chunk(
            layers=range(layer, min(layer + layer_step, layout.layers)),
            tokens=range(token, min(token + token_step, tokens.stop)),
        )
        for token in range(tokens.start, tokens.stop, token_step)
        for layer in range(0, layout.layers, layer_step)
    )


def _most_tokens(layer_bytes: int, layers: int, step: int) -> int:
    """Return the most tokens of a chunk of so many layers; a single layer takes a whole step, however large."""
    fitting = MAX_CHUNK_BYTES // (layer_bytes * layers)
    if layers == 1:
        return max(step, fitting // step * step)
    step = step if fitting >= step else LANES if fitting >= LANES else 1
    return max(1, fitting // step * step)


def check_form(chunks: Sequence[Chunk], form: Form, tokens: range) -> None:
    """Check that a foreign plan covers all parts of a cache; see `check_cover`.

    Raises:
        WireError: It doesn't.
    """
    if any(chunk.part >= len(form.parts) for chunk in chunks):
        raise WireError(WireReason.RANGE_MISMATCH, "the plan has parts that the cache has not")
    for number, part in enumerate(form.parts):
        own = [chunk for chunk in chunks if chunk.part == number]
        check_cover(own, part.layout, part.rows(tokens), token_step=part.least_rows)


def check_cover(
    chunks: Sequence[Chunk], layout: KVLayout, tokens: range, *, token_step: int = TOKEN_STEP
) -> None:
    """Check that a foreign plan covers every layer of every token exactly once, in bounded chunks.

    Args:
        chunks: The plan.
        layout: Form of what is covered.
        tokens: Which tokens it must cover; none if it must be empty.
        token_step: A chunk of one layer and so many tokens may be of any size.

    Raises:
        WireError: It doesn't.
    """
    if not (chunks or tokens):
        return
    area = 0
    seen: set[tuple[int, int]] = set()
    starts: dict[int, int] = {}
    for chunk in chunks:
        inside = chunk.layers.stop <= layout.layers and (
            tokens.start <= chunk.tokens.start and chunk.tokens.stop <= tokens.stop
        )
        if (
            not inside
            or starts.setdefault(chunk.tokens.start, chunk.tokens.stop) != chunk.tokens.stop
        ):
            raise WireError(WireReason.RANGE_MISMATCH, "the plan leaves what was asked for")
        divisible = len(chunk.layers) > 1 or len(chunk.tokens) > token_step
        if divisible and chunk.native_bytes(layout) > MAX_CHUNK_BYTES:
            raise WireError(WireReason.TOO_LARGE, "the plan has a chunk that is too large")
        area += len(chunk.layers) * len(chunk.tokens)
        seen.update((layer, chunk.tokens.start) for layer in chunk.layers)
    # equal area and no (layer, token range) twice, on one grid of token ranges: nothing is missing or doubled
    spans = sorted(starts.items())
    joined = all(a[1] == b[0] for a, b in pairwise(spans))
    whole = area == layout.layers * len(tokens) and len(seen) == layout.layers * len(spans)
    if not (spans and joined and whole):
        raise WireError(WireReason.RANGE_MISMATCH, "the plan does not cover what was asked for")


def read_span(value: Any, where: str, maximum: int) -> range:
    """Return the range of two growing integers; `SpecError`, which names ``where``, for anything else."""
    pair: list[Any] = value if isinstance(value, list) and len(value) == 2 else [None, None]
    # a bool is an int to isinstance
    if any(type(item) is not int for item in pair) or not 0 <= pair[0] < pair[1] <= maximum:
        raise SpecError(where, f"must be two growing integers up to {maximum}")
    return range(value[0], value[1])
