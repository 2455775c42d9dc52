"""The families of strategies that are profiled, for the KV cache of a model and what its calibration bundle has.

Values of a grid follow what measurements show of a model's losses: below the finest step nothing more is lost, above
the coarsest the predictions are useless.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from kvserve_api.strategy import StrategyConfig
from kvserve_api.wire import KVLayout
from kvserve_profiler.space import Family, Space
from kvserve_profiler.space_plain import both, plain_families
from kvserve_profiler.space_point import Parameter, ParameterKind, Point
from kvserve_strategies.bundle import BasisKey, Bundle
from kvserve_strategies.bundle.basis import CENTRED
from kvserve_strategies.calibration.settings import DEFAULT_KEYS, FISHER
from kvserve_strategies.peers import part
from kvserve_strategies.stages import (
    Grid,
    Importance,
    Ladder,
    Mean,
    Metric,
    Pca,
    Raw,
    Recentre,
    Unrope,
)

_STEPS: Final = (0.05, 0.065, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.55, 0.75)
_CENTRED_STEPS: Final = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 0.9, 1.2)
_MEANS: Final = Parameter("means", ParameterKind.ORDINAL, (0, 0.1))
"""Step of the means of a piece, 0 for those of the calibration."""


def space_of(layout: KVLayout, bases: Mapping[BasisKey, bool] | None = None) -> Space:
    """Return the whole space for a model.

    Args:
        layout: The form of its KV cache.
        bases: The bases of its calibration bundle, and whether each has learnt what tokens matter; None without a
            calibration. See `bases_of` and `planned_bases`.
    """
    raw, *plain = plain_families(layout)
    return Space((raw, *_calibrated(layout, bases or {}), *plain))


def bases_of(bundle: Bundle) -> dict[BasisKey, bool]:
    """Return what a bundle has to build a space with."""
    entries = bundle.manifest.bases
    return {key: entries[key].features > 0 for key in bundle.basis_keys}


def planned_bases() -> dict[BasisKey, bool]:
    """Return what a bundle that is yet to be made by the default recipe will have."""
    return {key: key.space == FISHER and key.layers > 1 for key in DEFAULT_KEYS}


def _calibrated(layout: KVLayout, bases: Mapping[BasisKey, bool]) -> Iterator[Family]:
    joint = _widths(layout, [key for key in bases if (key.space, key.kinds) == (FISHER, "kv")])
    focus = {text: key for text, key in joint.items() if bases[key]}
    apart = _widths(
        layout,
        [
            key
            for key in bases
            if (key.space, key.kinds) == (CENTRED, "k")
            and BasisKey(CENTRED, "v", key.layers, key.heads) in bases
        ],
    )
    for name, keys, steps in (
        ("joint", joint, _STEPS),
        ("focus", focus, _STEPS),
        ("apart", apart, _CENTRED_STEPS),
    ):
        if keys:
            yield _components(name, keys, steps)


def _widths(layout: KVLayout, keys: list[BasisKey]) -> dict[str, BasisKey]:
    """Return keys by their widths, without those that are the same for this model."""
    found: dict[tuple[int, int], BasisKey] = {}
    for key in sorted(keys, key=lambda key: (key.layers, key.heads == 0, key.heads)):
        heads = min(key.heads or layout.kv_heads, layout.kv_heads)
        found.setdefault((min(key.layers, layout.layers), heads), key)
    return {f"{key.layers}x{key.heads}": key for key in found.values()}


def _components(name: str, keys: Mapping[str, BasisKey], steps: tuple[float, ...]) -> Family:
    """Return a family of calibrated principal components.

    That is ``joint`` (keys and values together), ``focus`` (with finer steps for tokens that matter more) or ``apart``
    (keys and values each for themselves, without a metric).
    """

    def build(point: Point) -> StrategyConfig:
        key = keys[str(point["width"])]
        quantiser = (Importance if name == "focus" else Grid)(
            step=point.number("step"), dead_zone=point.number("dead")
        )
        pca = Pca(layers=key.layers, heads=key.heads)
        metric = () if name == "apart" else (Metric(metric=FISHER),)
        means = point.number("means") if name != "apart" else 0.0
        recentre = (Recentre(step=means),) if means else ()
        chain = (Unrope(), Mean(), *metric, pca, *recentre, quantiser, Ladder())
        raw = [part("kv", Raw(), tokens=f":{point['sinks']}")]
        if recent := point.count("recent"):
            raw.append(part("kv", Raw(), tokens=f"-{recent}:"))
        coded = both(*chain).parts if name == "apart" else (part("kv", *chain),)
        return StrategyConfig(parts=(*raw, *coded))

    return Family(
        name,
        (
            Parameter("width", ParameterKind.CATEGORICAL, tuple(keys)),
            Parameter("step", ParameterKind.CONTINUOUS, steps),
            Parameter("dead", ParameterKind.CONTINUOUS, (0.0, 0.5, 1.0)),
            Parameter("sinks", ParameterKind.ORDINAL, (1, 4)),
            Parameter("recent", ParameterKind.ORDINAL, (0, 32)),
            *((_MEANS,) if name != "apart" else ()),
        ),
        build,
    )
