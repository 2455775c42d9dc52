"""``kvserve strategies``: what exists, what it costs, what it needs, what it gives."""

import json
import time
from pathlib import Path
from typing import Any, Final

import click
import torch
from rich.console import Console
from rich.table import Table

from kvserve_strategies.bundle import Bundle
from kvserve_strategies.pipeline import Pipeline
from kvserve_strategies.presets import PRESETS
from kvserve_strategies.registry import STAGES
from kvserve_strategies.stage import Role
from kvserve_strategies.synthetic import gaussian_cache, modelled_cache

_SHAPE: Final = (8, 256, 2, 64)
_TOKENS: Final = 512
_REPEATS: Final = 3
_UNKNOWN: Final = "–"


@click.command()
@click.option(
    "--bundle",
    "bundle_folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Calibration bundle of a model; with it calibrated presets are measured too.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
def strategies(bundle_folder: Path | None, as_json: bool) -> None:
    """List presets and stages.

    Ratio and speed are measured here and now, on one core, with synthetic keys and values: of a plausible shape, or,
    for calibrated presets, drawn from what the bundle says of the model. Real ratios depend on model and text;
    `kvserve bench codec` measures them.
    """
    bundle = None if bundle_folder is None else Bundle.open(bundle_folder)
    presets = [_describe(name, bundle) for name in PRESETS]
    stages = [
        {
            "id": stage.id,
            "role": stage.role.value,
            "lossless": stage.lossless,
            "fixed_size": stage.is_fixed_size,
            "needs_bundle": stage.calibrated,
            "summary": stage.summary,
        }
        for stage in sorted(STAGES.values(), key=lambda s: (list(Role).index(s.role), s.id))
    ]
    if as_json:
        click.echo(json.dumps({"presets": presets, "stages": stages}, indent=2))
        return
    console = Console()
    console.print(_preset_table(presets))
    console.print(_chain_table(presets))
    console.print(_stage_table(stages))


def _describe(name: str, bundle: Bundle | None) -> dict[str, Any]:
    """Return what a preset is and needs, and, where that is here, what it costs."""
    config = PRESETS[name]
    keys = Pipeline.of(config).basis_keys
    usable = bundle is not None and set(keys) <= set(bundle.basis_keys)
    pipeline = Pipeline.of(config, bundle if usable else None)
    measured = _measure(pipeline) if usable or not pipeline.calibrated else {}
    return {
        "name": name,
        "digest": pipeline.digest,
        "lossless": pipeline.lossless,
        "fixed_size": pipeline.fixed_size,
        "needs": [str(key) for key in keys],
        "layer_step": pipeline.layer_step,
        "ratio": measured.get("ratio"),
        "encode_mb_s": measured.get("encode_mb_s"),
        "decode_mb_s": measured.get("decode_mb_s"),
        "chains": {
            where: [stage.to_json() for stage in part.chain] for where, part in config.chains()
        },
    }


def _measure(pipeline: Pipeline) -> dict[str, float]:
    """Return ratio and speeds on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if pipeline.bundle is None:
            keys, values = gaussian_cache(_SHAPE)
        else:
            keys, values = modelled_cache(pipeline.bundle, pipeline.basis_keys[0], _TOKENS)
        layers, tokens, kv_heads, head_dim = keys.shape
        shape = (layers, tokens, kv_heads, head_dim)
        payload = pipeline.encode(keys, values)
        pipeline.decode(payload, shape=shape, dtype=keys.dtype)
        native_mb = 2 * keys.numel() * keys.element_size() / 1e6
        encode_s = decode_s = float("inf")
        for _ in range(_REPEATS):
            start = time.perf_counter()
            payload = pipeline.encode(keys, values)
            middle = time.perf_counter()
            pipeline.decode(payload, shape=shape, dtype=keys.dtype)
            encode_s = min(encode_s, middle - start)
            decode_s = min(decode_s, time.perf_counter() - middle)
    finally:
        torch.set_num_threads(threads)
    return {
        "ratio": round(native_mb * 1e6 / len(payload), 2),
        "encode_mb_s": round(native_mb / encode_s),
        "decode_mb_s": round(native_mb / decode_s),
    }


def _chain_text(chain: list[dict[str, Any]]) -> str:
    """Return a chain as people write it, like ``centre → step(0.5) → rans(16)``."""
    words = []
    for stage in chain:
        params = ", ".join(str(value) for key, value in stage.items() if key != "id")
        words.append(stage["id"].split(".")[1] + (f"({params})" if params else ""))
    return " → ".join(words)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _preset_table(presets: list[dict[str, Any]]) -> Table:
    table = Table(title="Presets (bfloat16, synthetic, one core)")
    table.add_column("preset", no_wrap=True)
    table.add_column("exact")
    table.add_column("fixed size")
    table.add_column("needs", overflow="fold")
    for heading in ("ratio", "encode MB/s", "decode MB/s"):
        table.add_column(heading, justify="right")
    for preset in presets:
        ratio = preset["ratio"]
        speeds = (preset["encode_mb_s"], preset["decode_mb_s"])
        table.add_row(
            preset["name"],
            _yes(preset["lossless"]),
            _yes(preset["fixed_size"]),
            ", ".join(preset["needs"]),
            _UNKNOWN if ratio is None else f"{ratio:.2f}",
            *(_UNKNOWN if speed is None else str(speed) for speed in speeds),
        )
    if any(preset["ratio"] is None for preset in presets):
        table.caption = f"{_UNKNOWN}: needs a calibration bundle; see `kvserve calibrate`, --bundle"
    return table


def _chain_table(presets: list[dict[str, Any]]) -> Table:
    table = Table(title="How presets code")
    table.add_column("preset", no_wrap=True)
    table.add_column("part")
    table.add_column("chain")
    for preset in presets:
        name = preset["name"]
        for where, chain in preset["chains"].items():
            table.add_row(name, where, _chain_text(chain))
            name = ""
    return table


def _stage_table(stages: list[dict[str, Any]]) -> Table:
    table = Table(title="Stages")
    table.add_column("id", no_wrap=True)
    for heading in ("exact", "fixed size", "bundle", "what it does"):
        table.add_column(heading)
    for stage in stages:
        table.add_row(
            stage["id"],
            _yes(stage["lossless"]),
            _yes(stage["fixed_size"]),
            _yes(stage["needs_bundle"]),
            stage["summary"],
        )
    return table
