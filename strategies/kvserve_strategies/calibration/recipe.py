"""The recipe: from a model and windows of text to everything that a bundle holds.

Each window is read twice: its prefix gives a KV cache, whose moments are added up, and its continuation gives samples
of what errors in that cache cost. Of every window some tokens are kept, to learn which tokens matter.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from kvserve_api.errors import SpecError
from kvserve_api.wire import KVLayout
from kvserve_strategies.bundle import Basis, BasisKey, Block, Contents, Group, Metric, Rope
from kvserve_strategies.bundle.basis import CENTRED
from kvserve_strategies.calibration.bases import (
    LEAST_SIGMA,
    components,
    pruned,
    scaled,
    shrunk_to_layers,
)
from kvserve_strategies.calibration.fisher import Information, gradients, token_costs
from kvserve_strategies.calibration.importance import COMPONENTS, features, fitted
from kvserve_strategies.calibration.metrics import (
    query_metric,
    query_moments,
    roots,
    sensitivities,
    shrunk,
)
from kvserve_strategies.calibration.protocol import CalibrationModel
from kvserve_strategies.calibration.statistics import SIDES, Moments, columns, pair

RECIPE: Final = "kvserve.io/recipe/v1"
QUERY: Final = "query"
FISHER: Final = "fisher"
DEFAULT_KEYS: Final = (
    BasisKey(FISHER, "kv", 1, 1),
    BasisKey(FISHER, "kv", 1, 0),
    BasisKey(FISHER, "kv", 3, 0),
    BasisKey(FISHER, "kv", 10, 0),
    BasisKey(CENTRED, "k", 3, 0),
    BasisKey(CENTRED, "v", 3, 0),
)
Report: TypeAlias = Callable[[str, int, int], None]
_PREFIX_TOKENS: Final = 1024
_CONTINUATION_TOKENS: Final = 256
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to calibrate.

    Attributes:
        keys: The bases to make.
        seed: Of everything random.
        prefix_tokens: Tokens of a window whose cache is looked at.
        continuation_tokens: Tokens after them, whose prediction errors in the cache spoil.
        sinks: First tokens of a text that are left out: attention rests on them, their keys and values are like no
            other's, and strategies keep them apart.
        samples: Continuations drawn of each window.
        kept: Tokens kept of each window to learn which tokens matter.
        recent: Last tokens that are among those kept.
        shrinkage: Share of the identity that is mixed into the Fisher metric.
    """

    keys: tuple[BasisKey, ...] = DEFAULT_KEYS
    seed: int = 0
    prefix_tokens: int = _PREFIX_TOKENS
    continuation_tokens: int = _CONTINUATION_TOKENS
    sinks: int = 4
    samples: int = 2
    kept: int = 256
    recent: int = 32
    shrinkage: float = 0.02

    @classmethod
    def fitting(
        cls, max_positions: int | None, *, keys: tuple[BasisKey, ...], seed: int = 0
    ) -> Self:
        """Return the defaults, with windows that a model of so many positions can read."""
        whole = _PREFIX_TOKENS + _CONTINUATION_TOKENS
        limit = min(max_positions or whole, whole)
        continuation = limit * _CONTINUATION_TOKENS // whole
        return cls(
            keys=keys,
            seed=seed,
            prefix_tokens=limit - continuation,
            continuation_tokens=continuation,
        )

    def __post_init__(self) -> None:
        for name, minimum in (("samples", 1), ("continuation_tokens", 1), ("recent", 1)):
            if getattr(self, name) < minimum:
                raise SpecError(name, f"must be at least {minimum}, got {getattr(self, name)}")
        if self.prefix_tokens <= self.sinks + 1:
            raise SpecError("prefix_tokens", f"must be more than {self.sinks + 1}")
        for key in self.keys:
            if key.space not in (CENTRED, QUERY, FISHER):
                raise SpecError("keys", f"no metric is named {key.space!r}")

    @property
    def window_tokens(self) -> int:
        """Tokens of a window."""
        return self.prefix_tokens + self.continuation_tokens

    def to_json(self) -> dict[str, Any]:
        """Return the settings as an object."""
        return {
            "keys": [str(key) for key in self.keys],
            "prefix_tokens": self.prefix_tokens,
            "continuation_tokens": self.continuation_tokens,
            "sinks": self.sinks,
            "samples": self.samples,
            "kept": self.kept,
            "recent": self.recent,
            "shrinkage": self.shrinkage,
        }


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


Roots: TypeAlias = dict[str, tuple[torch.Tensor, torch.Tensor]]


def calibrate(
    model: NamedModel,
    windows: Sequence[Sequence[int]],
    settings: Settings,
    report: Report = lambda *_: None,
) -> Contents:
    """Calibrate a model.

    Args:
        model: The model.
        windows: Token ids, each of `Settings.window_tokens`.
        settings: How.
        report: Is told how far it is.

    Returns:
        What a bundle holds; the provenance is empty.

    Raises:
        SpecError: There is no window.
    """
    if not windows:
        raise SpecError("windows", "must be at least one")
    ropes = tuple(model.rope_of(layer) for layer in range(model.layers))
    found = _read(model, ropes, windows, settings, report)
    metrics = _metrics(found, ropes, settings)
    metric_roots = {name: roots(metric) for name, metric in metrics.items()}
    bases = {
        key: _basis(key, model.layout, found, metric_roots, report)
        for key in dict.fromkeys(settings.keys)
    }
    return Contents(
        model_fingerprint=model.fingerprint,
        layout=model.layout,
        ropes=ropes,
        means=_sides(found.moments.means),
        deviations=_sides(found.moments.deviations),
        metrics={
            name: {
                side: Metric(_array(pair_[0][index]), _array(pair_[1][index]))
                for index, side in enumerate(SIDES)
            }
            for name, pair_ in metric_roots.items()
        },
        bases=bases,
    )


def _read(
    model: NamedModel,
    ropes: tuple[Rope | None, ...],
    windows: Sequence[Sequence[int]],
    settings: Settings,
    report: Report,
) -> Statistics:
    """Read all windows."""
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


def _metrics(
    found: Statistics, ropes: tuple[Rope | None, ...], settings: Settings
) -> dict[str, torch.Tensor]:
    """Return the metrics by name, each ``[2, layers, kv_heads, head_dim, head_dim]``."""
    fisher = found.information.mean
    by_queries = torch.stack(
        [
            query_metric(moments, rope, settings.prefix_tokens)
            for moments, rope in zip(found.queries, ropes, strict=True)
        ]
    )
    plain = torch.eye(fisher.shape[-1]).expand_as(by_queries)
    query = torch.stack(
        [
            metric * sensitivities(fisher[side], metric)[:, None, None, None]
            for side, metric in enumerate((by_queries, plain))
        ]
    )
    return {QUERY: query, FISHER: shrunk(fisher, settings.shrinkage)}


def _basis(
    key: BasisKey, layout: KVLayout, found: Statistics, metric_roots: Roots, report: Report
) -> Basis:
    """Return the basis of a key, with the weights of importance in the Fisher metric's space."""
    blocks = key.blocks(layout)
    everything: list[tuple[torch.Tensor, torch.Tensor]] = []
    for index, (block, covariance) in enumerate(
        zip(blocks, found.moments.covariances(key), strict=True)
    ):
        report(f"basis {key}", index, len(blocks))
        covariance = shrunk_to_layers(covariance, key, block, found.moments.tokens)
        root = None if key.space == CENTRED else metric_roots[key.space][0]
        if root is not None:
            covariance = scaled(covariance, root, key.kinds, block)
        rows, sigma = components(covariance)
        everything.append(_elsewhere(rows, sigma, block, key, found, root))
    energy = torch.cat([sigma for _, sigma in everything]).double().square().mean()
    scale = float(energy.sqrt())
    groups = tuple(pruned(rows, sigma, LEAST_SIGMA * scale) for rows, sigma in everything)
    weights: tuple[NDArray[np.float32], ...] = ()
    # narrow bases are for speed: there a step for each token would cost more time than all else
    if key.space == FISHER and key.layers > 1:
        weights = tuple(
            _array(_importance(group, block, key, found, metric_roots[FISHER]))
            for group, block in zip(groups, blocks, strict=True)
        )
    report(f"basis {key}", len(blocks), len(blocks))
    return Basis(scale=scale, groups=groups, importance=weights)


def _elsewhere(
    rows: torch.Tensor,
    sigma: torch.Tensor,
    block: Block,
    key: BasisKey,
    found: Statistics,
    root: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return components with their deviations in windows that they were not fitted to, again by falling deviation.

    The least eigenvalues of a covariance of few tokens are far below the variances that other texts have in these
    directions: components would be left out that matter, and the others would get thresholds of the wrong size.
    """
    windows = [kept for kept in found.kept if kept.held_out]
    if not windows:
        return rows, sigma
    energy = torch.zeros(len(rows), dtype=torch.float64)
    for kept in windows:
        flat = _in_metric(kept, block, key, found, root)
        energy += kept.weights.double() @ (flat @ rows.T).double().square()
    tokens = sum(float(kept.weights.sum()) for kept in windows)
    honest = (energy / tokens).sqrt().float()
    order = honest.argsort(descending=True, stable=True)
    return rows[order], honest[order]


def _in_metric(
    kept: Kept, block: Block, key: BasisKey, found: Statistics, root: torch.Tensor | None
) -> torch.Tensor:
    """Return the tokens kept of a window as rows ``[tokens, width]`` in the metric's coordinates."""
    layers, heads = (slice(r.start, r.stop) for r in block)
    # only the block's own part: a window has as many channels as the whole model
    x = kept.values[:, layers, :, heads].float() - found.moments.means[:, layers, None, heads]
    if root is not None:
        x = torch.einsum("slthd,slhcd->slthc", x, root[:, layers, heads])
    local = Block(range(len(block.layers)), range(len(block.heads)))
    return columns(x, key.kinds, local)


def _importance(
    group: Group,
    block: Block,
    key: BasisKey,
    found: Statistics,
    root: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Return the weights of a group's features that tell how much a token matters there."""
    leading = min(COMPONENTS, len(group.sigma))
    rows = torch.from_numpy(group.rows[:leading].astype(np.float32))
    inverse_sigma = 1 / torch.from_numpy(group.sigma[:leading]).clamp(min=1e-30)
    sides = [SIDES.index(kind) for kind in key.kinds]
    layers, heads = (slice(r.start, r.stop) for r in block)
    inputs, costs = [], []
    for kept in found.kept:
        flat = _in_metric(kept, block, key, found, root[0])
        scores = torch.zeros(len(flat), COMPONENTS)
        scores[:, :leading] = flat @ rows.T * inverse_sigma
        inputs.append(features(scores, kept.ages))
        costs.append(
            _mean(
                token_costs(sample[:, layers, :, heads].float(), root[1][:, layers, heads])[sides]
                for sample in kept.gradients
            )
        )
    weights = torch.cat([kept.weights for kept in found.kept])
    return fitted(torch.cat(inputs), torch.cat(costs), weights)


def _mean(samples: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the mean cost of each token over samples, kinds, layers and heads."""
    return torch.stack([sample.mean(dim=(0, 1, 3)) for sample in samples]).mean(dim=0)


def _sides(tensor: torch.Tensor) -> dict[str, NDArray[np.float32]]:
    return {side: _array(tensor[index]) for index, side in enumerate(SIDES)}


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.float().contiguous().numpy().copy()
    return array
