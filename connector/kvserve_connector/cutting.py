"""How one engine's transfers are cut into chunks: by what can be read of them, and by who is to code them."""

from collections.abc import Iterable

from kvserve_connector.chunks import (
    DEADLINE_TOKENS,
    Chunk,
    ahead_layers,
    plan_ahead,
    plan_form,
    range_tokens,
)
from kvserve_connector.form import Form
from kvserve_connector.midway import common_step


class Cutter:
    """Cuts transfers into chunks.

    Args:
        form: How the engine's cache is cut.
        chunk_layers: Most layers in a chunk.
        step_tokens: Most tokens that the engine computes in one step.
    """

    def __init__(self, form: Form, chunk_layers: int, step_tokens: int) -> None:
        self._form = form
        self._chunk_layers = chunk_layers
        self._step_tokens = step_tokens

    def plan(
        self, tokens: range, *, kept: bool, layer_multiple: int = 1, fine: bool = False
    ) -> tuple[Chunk, ...]:
        """Cut a transfer.

        Args:
            tokens: Which tokens are sent.
            kept: Whether their prefill has finished.
            layer_multiple: Of how many layers chunks are multiples.
            fine: Whether it has a deadline and may change midway.
        """
        layers = self._chunk_layers
        if kept or self._form.opaque is not None:
            return plan_form(
                self._form,
                tokens,
                layers,
                layer_multiple=layer_multiple,
                most_tokens=range_tokens(len(tokens), DEADLINE_TOKENS) if fine else None,
            )
        return plan_ahead(
            self._form,
            tokens,
            layers,
            layer_multiple=layer_multiple,
            step_tokens=min(self._step_tokens, DEADLINE_TOKENS) if fine else self._step_tokens,
        )

    def multiple(self, layer_step: int, others: Iterable[int], *, kept: bool) -> int:
        """Return of how many layers chunks are to be multiples; see `common_step`.

        Args:
            layer_step: How many layers the strategy codes together that begins.
            others: The same of those that might go on.
            kept: Whether the prefill has finished.
        """
        most_layers = self._chunk_layers
        if not kept and self._form.opaque is None:
            most_layers = ahead_layers(self._form, most_layers)
        return common_step(layer_step, others, most_layers)
