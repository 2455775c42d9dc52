"""The recipe: from a model and windows of text to everything that a bundle holds.

Each window is read twice: its prefix gives a KV cache, whose moments are added up, and its continuation gives samples
of what errors in that cache cost. Of every window some tokens are kept, to learn which tokens matter.
"""

from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

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
from kvserve_strategies.calibration.fisher import token_costs
from kvserve_strategies.calibration.importance import COMPONENTS, features, fitted
from kvserve_strategies.calibration.metrics import query_metric, roots, sensitivities, shrunk
from kvserve_strategies.calibration.settings import FISHER, QUERY, Settings
from kvserve_strategies.calibration.statistics import SIDES, columns
from kvserve_strategies.calibration.windows import (
    Kept,
    NamedModel,
    Report,
    Statistics,
    read_windows,
)

RECIPE: Final = "kvserve.io/recipe/v1"
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
    found = read_windows(model, ropes, windows, settings, report)
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
