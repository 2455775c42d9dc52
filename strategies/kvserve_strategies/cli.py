"""``kvserve strategies``: what exists, what it costs, what it gives."""

import json
import time
from typing import Any, Final

import click
import torch
from rich.console import Console
from rich.table import Table

from kvserve_strategies.pipeline import Pipeline
from kvserve_strategies.presets import PRESETS
from kvserve_strategies.registry import STAGES
from kvserve_strategies.stage import Role

_SHAPE: Final = (4, 512, 2, 64)
_REPEATS: Final = 3


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
def strategies(as_json: bool) -> None:
    """List presets and stages.

    Ratio and speed are measured here and now, on one core, with synthetic keys and values of a plausible shape; real
    ratios depend on the model and are what profiling is for.
    """
    presets = [_measure(name) for name in PRESETS]
    stages = [
        {
            "id": stage.id,
            "role": stage.role.value,
            "lossless": stage.lossless,
            "fixed_size": stage.is_fixed_size,
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


def _measure(name: str) -> dict[str, Any]:
    """Return what a preset is and what it costs."""
    pipeline = Pipeline.of(PRESETS[name])
    keys, values = _synthetic()
    payload = pipeline.encode(keys, values)
    native_mb = 2 * keys.numel() * keys.element_size() / 1e6
    encode_s = decode_s = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        payload = pipeline.encode(keys, values)
        middle = time.perf_counter()
        pipeline.decode(payload, shape=_SHAPE, dtype=keys.dtype)
        encode_s = min(encode_s, middle - start)
        decode_s = min(decode_s, time.perf_counter() - middle)
    return {
        "name": name,
        "digest": pipeline.digest,
        "lossless": pipeline.lossless,
        "fixed_size": pipeline.fixed_size,
        "ratio": round(native_mb * 1e6 / len(payload), 2),
        "encode_mb_s": round(native_mb / encode_s),
        "decode_mb_s": round(native_mb / decode_s),
        "chains": {
            part.kind.value: [stage.to_json() for stage in part.chain]
            for part in PRESETS[name].parts
        },
    }


def _synthetic() -> tuple[torch.Tensor, torch.Tensor]:
    """Return Gaussian keys with a mean for each channel, and Gaussian values, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    layers, _, kv_heads, head_dim = _SHAPE
    means = 3 * torch.randn(layers, 1, kv_heads, head_dim, generator=generator)
    keys = torch.randn(_SHAPE, generator=generator) + means
    return keys.bfloat16(), torch.randn(_SHAPE, generator=generator).bfloat16()


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
    for heading in ("ratio", "encode MB/s", "decode MB/s"):
        table.add_column(heading, justify="right")
    for preset in presets:
        table.add_row(
            preset["name"],
            _yes(preset["lossless"]),
            _yes(preset["fixed_size"]),
            f"{preset['ratio']:.2f}",
            str(preset["encode_mb_s"]),
            str(preset["decode_mb_s"]),
        )
    return table


def _chain_table(presets: list[dict[str, Any]]) -> Table:
    table = Table(title="How presets code")
    table.add_column("preset", no_wrap=True)
    table.add_column("keys")
    table.add_column("values")
    for preset in presets:
        chains = preset["chains"]
        table.add_row(preset["name"], _chain_text(chains["k"]), _chain_text(chains["v"]))
    return table


def _stage_table(stages: list[dict[str, Any]]) -> Table:
    table = Table(title="Stages")
    table.add_column("id", no_wrap=True)
    for heading in ("exact", "fixed size", "what it does"):
        table.add_column(heading)
    for stage in stages:
        table.add_row(
            stage["id"], _yes(stage["lossless"]), _yes(stage["fixed_size"]), stage["summary"]
        )
    return table
