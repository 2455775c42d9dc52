"""Moments of a model's KV cache over many windows of text, in memory that does not grow with their number."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch

from kvserve_api.wire import KVLayout
from kvserve_strategies.bundle import BasisKey, Block, Rope
from kvserve_strategies.calibration.ropes import turn

Ropes: TypeAlias = Sequence[Rope | None]
SIDES = "kv"


def unrotated(x: torch.Tensor, ropes: Ropes) -> torch.Tensor:
    """Return keys, or gradients with respect to keys, in the coordinates before rotation.

    A rotation is orthogonal, so that both turn alike.

    Args:
        x: ``[layers, tokens, kv_heads, head_dim]``, of the tokens 0, 1, 2, …
        ropes: One for each layer.

    Returns:
        The same shape, float32; a copy.
    """
    plain = x.float().clone()
    positions = range(x.shape[1])
    for layer, rope in enumerate(ropes):
        if rope is not None:
            plain[layer] = turn(plain[layer], rope, positions, back=True)
    return plain


def pair(keys: torch.Tensor, values: torch.Tensor, ropes: Ropes, first: int) -> torch.Tensor:
    """Return keys before rotation and values together.

    Args:
        keys: ``[layers, tokens, kv_heads, head_dim]``, or gradients of that shape.
        values: The same shape.
        ropes: One for each layer.
        first: Tokens to leave out at the beginning.

    Returns:
        ``[2, layers, tokens - first, kv_heads, head_dim]`` float32.
    """
    return torch.stack([unrotated(keys, ropes)[:, first:], values.float()[:, first:]])


def columns(x: torch.Tensor, kinds: str, block: Block) -> torch.Tensor:
    """Return the channels of a block for each token.

    Args:
        x: ``[2, layers, tokens, kv_heads, head_dim]``.
        kinds: ``k``, ``v`` or ``kv``.
        block: Layers and heads.

    Returns:
        ``[tokens, width]``: kind, layer, head and dimension, the last fastest.
    """
    layers, heads = block
    cut = x[:, layers.start : layers.stop, :, heads.start : heads.stop]
    sides = cut[[SIDES.index(kind) for kind in kinds]]
    return sides.permute(2, 0, 1, 3, 4).reshape(x.shape[2], -1)


class Joint(NamedTuple):
    """Blocks of channels whose joint second moments are kept.

    Attributes:
        kinds: ``k``, ``v`` or ``kv``.
        layers: Layers a block.
        heads: Heads a block; 0 for all.
    """

    kinds: str
    layers: int
    heads: int


class Moments:
    """First and second moments of all channels, and joint ones within blocks.

    Second moments are taken about the mean of the first window, so that float32 holds the covariance of channels whose
    mean is many times their deviation.
    """

    def __init__(self, layout: KVLayout, keys: Sequence[BasisKey]) -> None:
        self._layout = layout
        self._keys = {Joint(key.kinds, key.layers, key.heads): key for key in keys}
        self._joint: dict[Joint, list[torch.Tensor]] = {}
        self._shift: torch.Tensor | None = None
        self._sum = torch.zeros(0)
        self._squares = torch.zeros(0)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Take note of a window.

        Args:
            x: ``[2, layers, tokens, kv_heads, head_dim]`` float32.
        """
        if self._shift is None:
            self._shift = x.mean(dim=2, keepdim=True)
            self._sum = torch.zeros_like(self._shift[:, :, 0], dtype=torch.float64)
            self._squares = torch.zeros_like(self._sum)
        near = x - self._shift
        self.tokens += x.shape[2]
        self._sum += near.sum(dim=2, dtype=torch.float64)
        self._squares += near.square().sum(dim=2, dtype=torch.float64)
        for joint, key in self._keys.items():
            sums = self._joint.setdefault(joint, [])
            for index, block in enumerate(key.blocks(self._layout)):
                flat = columns(near, joint.kinds, block)
                if index == len(sums):
                    sums.append(flat.T @ flat)
                else:
                    sums[index].addmm_(flat.T, flat)

    @property
    def means(self) -> torch.Tensor:
        """``[2, layers, kv_heads, head_dim]`` float32."""
        assert self._shift is not None
        return (self._shift[:, :, 0] + self._sum / self.tokens).float()

    @property
    def deviations(self) -> torch.Tensor:
        """``[2, layers, kv_heads, head_dim]`` float32."""
        variance = self._squares / self.tokens - (self._sum / self.tokens).square()
        return variance.clamp(min=0).sqrt().float()

    def covariances(self, key: BasisKey) -> Iterator[torch.Tensor]:
        """Yield the covariance ``[width, width]`` float32 of each of the key's blocks."""
        offset = (self._sum / self.tokens).float()[:, :, None]
        joint = Joint(key.kinds, key.layers, key.heads)
        for block, squares in zip(key.blocks(self._layout), self._joint[joint], strict=True):
            mean = columns(offset, key.kinds, block)[0]
            yield squares / self.tokens - torch.outer(mean, mean)
