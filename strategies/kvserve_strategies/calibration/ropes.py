"""Finding out how a model rotates its keys, by looking at keys.

A token that stands alone attends only to itself, so all that its position changes is the rotation of its key. The
keys of one token alone at several positions tell whether a layer rotates, and check a description of how, whatever the
architecture is called.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from kvserve_strategies.bundle.rope import Rope

POSITIONS: Final = (0, 1, 2, 5, 17, 64, 251)
_TOLERANCE: Final = 1e-3
"""Of the root mean square of the keys; a wrong description is wrong by about all of it."""


def turn(x: torch.Tensor, rope: Rope, positions: Sequence[int], *, back: bool) -> torch.Tensor:
    """Rotate heads forward or back; the attention factor is not applied.

    Args:
        x: ``[tokens, heads, head_dim]`` float32.
        rope: How.
        positions: Of each token.
        back: Whether to undo a rotation.

    Returns:
        The same shape.
    """
    angles = torch.tensor(np.outer(np.asarray(positions, np.float64), rope.inv_freq))
    cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
    sin = -sin if back else sin
    half, out = rope.rotary_dim // 2, x.clone()
    if rope.interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = x[..., first], x[..., second]
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out


def described(model: torch.nn.Module, head_dim: int) -> tuple[list[Rope], list[str]]:
    """Return the rotations that a model's modules describe, and why some of them were left out.

    Args:
        model: A transformers model: modules that hold a buffer ``…inv_freq`` describe a rotation.
        head_dim: Larger rotations belong to something else.
    """
    ropes: dict[Rope, None] = {}
    refused: dict[str, None] = {}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or "original" in name:
                continue
            if buffer.ndim != 1 or not 1 <= len(buffer) <= head_dim // 2:
                continue
            prefix = name.removesuffix("inv_freq")
            if why := _depends_on_length(module, prefix.rstrip("_")):
                refused[why] = None
                continue
            inv_freq = buffer.detach().double().cpu().numpy()
            factor = float(getattr(module, f"{prefix}attention_scaling", 1.0))
            for interleaved in (False, True):
                ropes[Rope(inv_freq, factor, interleaved)] = None
    return list(ropes), list(refused)


def explain(
    keys: torch.Tensor, positions: Sequence[int], ropes: Sequence[Rope]
) -> tuple[Rope | None, bool]:
    """Return the rotation that explains a layer's keys.

    Args:
        keys: ``[len(positions), kv_heads, head_dim]`` float32: of one token, alone, at each position.
        positions: The first is 0.
        ropes: Those that may be.

    Returns:
        The rotation, None for no rotation; and whether that explains the keys at all.
    """
    scale = float(keys.square().mean().sqrt())
    still = keys[:1].expand_as(keys)
    if _close(still, keys, scale):
        return None, True
    for rope in ropes:
        if _close(turn(still, rope, positions, back=False), keys, scale):
            return rope, True
    return None, False


def _close(a: torch.Tensor, b: torch.Tensor, scale: float) -> bool:
    return float((a - b).abs().max()) <= _TOLERANCE * max(scale, 1e-12)


def _depends_on_length(module: Any, layer_type: str) -> str:
    """Return why a rotation is not the same for all requests; empty if it is."""
    kind = getattr(module, "rope_type", "default")
    kind = kind.get(layer_type, "default") if isinstance(kind, Mapping) else kind
    if kind == "dynamic":
        return "dynamic RoPE scaling depends on the request's length; keys are coded as they are"
    if kind == "longrope":
        parameters = getattr(module.config, "rope_parameters", None) or {}
        parameters = parameters.get(layer_type) or parameters
        if parameters.get("short_factor") != parameters.get("long_factor"):
            return "LongRoPE has other factors for long requests; keys are coded as they are"
    return ""
