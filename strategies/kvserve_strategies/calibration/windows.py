"""What is learnt of windows of text: moments of the cache, gradients of the loss, and some tokens of each to keep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, TypeAlias

import torch

from kvserve_api.wire import KVLayout
from kvserve_strategies.bundle import Rope
from kvserve_strategies.calibration.fisher import Information, gradients
from kvserve_strategies.calibration.metrics import query_moments
from kvserve_strategies.calibration.protocol import CalibrationModel
from kvserve_strategies.calibration.settings import Settings
from kvserve_strategies.calibration.statistics import Moments, pair

Report: TypeAlias = Callable[[str, int, int], None]
_HELD_OUT: Final = 6
"""Every so many windows one is left out of the covariances, to see how large components are in other texts."""


class NamedModel(CalibrationModel, Protocol):
    """A model that knows what its cache is called."""

    @property
    def layout(self) -> KVLayout:
        """The form of its KV cache."""

    @property
    def fingerprint(self) -> str:
        """See `kvserve_api.wire.model_fingerprint`."""

    def rope_of(self, layer: int) -> Rope | None:
        """Return how the layer's keys rotate; None if they do not."""


class Kept(NamedTuple):
    """Tokens of one window.

    Attributes:
        held_out: Whether the window is in no covariance.
        values: ``[2, layers, tokens, kv_heads, head_dim]`` in the cache's dtype, keys before rotation.
        gradients: For each sample the same shape, bfloat16.
        ages: ``[tokens]`` from the end of the prefix.
        weights: ``[tokens]``, how many tokens each stands for.
    """

    held_out: bool
    values: torch.Tensor
    gradients: tuple[torch.Tensor, ...]
    ages: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """What was learnt of all windows."""

    moments: Moments
    information: Information
    queries: torch.Tensor
    kept: list[Kept]


def read_windows(
    model: NamedModel,
    ropes: tuple[Rope | None, ...],
    windows: Sequence[Sequence[int]],
    settings: Settings,
    report: Report,
) -> Statistics:
    """Read all windows.

    Args:
        model: The model.
        ropes: For each layer how its keys rotate.
        windows: Token ids, each of `Settings.window_tokens`.
        settings: How.
        report: Is told how far it is.
    """
    layers, heads, dim = model.layers, model.kv_heads, model.head_dim
    generator = torch.Generator().manual_seed(settings.seed)
    moments = Moments(model.layout, settings.keys)
    information = Information(layers, heads, dim)
    queries = torch.zeros(layers, heads, dim, dim)
    kept: list[Kept] = []
    for index, window in enumerate(windows):
        report("reading windows", index, len(windows))
        prefill = model.prefill(window[: settings.prefix_tokens])
        for layer, query in enumerate(prefill.queries):
            queries[layer] += query_moments(query[settings.sinks :], heads) / len(windows)
        x = pair(prefill.keys, prefill.values, ropes, settings.sinks)
        held_out = index % _HELD_OUT == _HELD_OUT - 1
        if not held_out:
            moments.add(x)
        chosen, weights = _choose(x.shape[2], settings, generator)
        samples = []
        for sample in gradients(
            model,
            prefill,
            window[settings.prefix_tokens :],
            samples=settings.samples,
            generator=generator,
        ):
            gradient = pair(*sample, ropes, settings.sinks)
            information.add(gradient)
            samples.append(gradient[:, :, chosen].bfloat16())
        values = x[:, :, chosen].to(prefill.keys.dtype)
        kept.append(Kept(held_out, values, tuple(samples), x.shape[2] - chosen, weights))
    report("reading windows", len(windows), len(windows))
    return Statistics(moments=moments, information=information, queries=queries, kept=kept)


def _choose(
    tokens: int, settings: Settings, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which tokens to keep, the recent ones always, and how many each stands for."""
    recent = min(settings.recent, tokens)
    older = tokens - recent
    count = min(older, max(settings.kept - recent, 1))
    chosen = torch.randperm(older, generator=generator)[:count].sort().values
    weights = torch.cat([torch.full((count,), older / max(count, 1)), torch.ones(recent)])
    return torch.cat([chosen, torch.arange(older, tokens)]), weights
