"""Made-up keys and values for measuring speed and size without a model."""

import numpy as np
import torch

from kvserve_api.strategy import Kind
from kvserve_strategies.bundle import BasisKey, Bundle
from kvserve_strategies.bundle.basis import CENTRED
from kvserve_strategies.stage import Form, Space, Spec, Where
from kvserve_strategies.stages import Mean, Metric, Pca, Unrope
from kvserve_strategies.values import to_tensor


def gaussian_cache(shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Gaussian keys with a mean for each channel, and Gaussian values, in bfloat16.

    Args:
        shape: ``(layers, tokens, kv_heads, head_dim)``.
    """
    generator = torch.Generator().manual_seed(0)
    layers, _, kv_heads, head_dim = shape
    means = 3 * torch.randn(layers, 1, kv_heads, head_dim, generator=generator)
    keys = torch.randn(shape, generator=generator) + means
    return keys.bfloat16(), torch.randn(shape, generator=generator).bfloat16()


def modelled_cache(bundle: Bundle, key: BasisKey, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a whole cache drawn from a basis: independent components of the calibrated deviations.

    Args:
        bundle: The model's calibration.
        key: Which basis; what kinds it lacks are Gaussian around the calibrated means.
        tokens: How many.

    Returns:
        Keys, with rotary embedding, and values ``[layers, tokens, kv_heads, head_dim]`` in the cache's dtype.
    """
    layout = bundle.layout
    kinds = tuple(Kind(letter) for letter in key.kinds)
    spec = Spec(
        form=Form.NATIVE,
        layers=len(kinds) * layout.layers,
        tokens=tokens,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        where=Where(
            kinds=kinds,
            layers=tuple(range(layout.layers)),
            heads=tuple(range(layout.kv_heads)),
            first_token=0,
        ),
        bundle=bundle,
    )
    metric = () if key.space == CENTRED else (Metric(metric=key.space),)
    stages = (Unrope(), Mean(), *metric, Pca(layers=key.layers, heads=key.heads))
    specs = []
    for stage in stages:
        specs.append(spec)
        spec = stage.resolve(spec)
    assert spec.space == Space.COMPONENTS
    rng = np.random.default_rng(0)
    sigma = np.concatenate([group.sigma for group in bundle.basis(key).groups])
    value = rng.standard_normal((1, tokens, 1, sigma.size)).astype(np.float32) * sigma
    for stage, taken in zip(reversed(stages), reversed(specs), strict=True):
        value = stage.decode(np.empty(0, np.uint8), value, taken)
    halves = dict(zip(kinds, np.split(value, len(kinds)), strict=True))
    keys, values = (
        to_tensor(halves[kind], layout.dtype) if kind in halves else _around(bundle, kind, tokens)
        for kind in Kind
    )
    return keys, values


def _around(bundle: Bundle, kind: Kind, tokens: int) -> torch.Tensor:
    layout = bundle.layout
    generator = torch.Generator().manual_seed(1)
    shape = (layout.layers, tokens, layout.kv_heads, layout.head_dim)
    mean, deviation = (
        torch.from_numpy(of(kind).copy())[:, None] for of in (bundle.mean, bundle.deviation)
    )
    drawn = mean + deviation * torch.randn(shape, generator=generator)
    dtype: torch.dtype = getattr(torch, layout.dtype)
    return drawn.to(dtype)
