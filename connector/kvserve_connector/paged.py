"""Layers of an engine's paged cache as canonical tensors ``[layers, tokens, kv_heads, head_dim]``."""

from collections.abc import Sequence

import torch

from kvserve_api.wire import KVLayout
from kvserve_connector.views import LayerView


class PagedCache:
    """Layers of an engine's paged cache with one layout, in canonical order; its tokens may be other rows of blocks.

    Reading and writing are safe from any thread as long as nobody else writes the same blocks.
    """

    def __init__(self, layers: Sequence[LayerView], layout: KVLayout, block_tokens: int) -> None:
        self.layout = layout
        self.block_tokens = block_tokens
        self._layers = layers
        self._dtype: torch.dtype = getattr(torch, layout.dtype)

    def read(
        self, layers: range, tokens: range, block_ids: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy keys and values out of the cache.

        Args:
            layers: Consecutive layers.
            tokens: Consecutive tokens of the request.
            block_ids: The request's blocks, from its first token on.

        Returns:
            Keys and values, each ``[layers, tokens, heads, dim]``, contiguous, on the CPU.
        """
        first, skip = divmod(tokens.start, self.block_tokens)
        last = -(-tokens.stop // self.block_tokens)
        ids = torch.tensor(block_ids[first:last], dtype=torch.int64)
        heads, dim = self.layout.kv_heads, self.layout.head_dim
        shape = (len(layers), len(tokens), heads, dim)
        keys = torch.empty(shape, dtype=self._dtype)
        values = torch.empty(shape, dtype=self._dtype)
        for row, layer in enumerate(layers):
            self._layers[layer].read(ids, skip, keys[row], values[row])
        return keys, values

    def write(
        self,
        layers: range,
        tokens: range,
        block_ids: Sequence[int],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Copy canonical keys and values into the cache; the arguments are those of `read`."""
        first, skip = divmod(tokens.start, self.block_tokens)
        last = -(-tokens.stop // self.block_tokens)
        ids = torch.tensor(block_ids[first:last], dtype=torch.int64)
        for row, layer in enumerate(layers):
            self._layers[layer].write(ids, skip, keys[row], values[row])
