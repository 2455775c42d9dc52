"""The tables of ``make bench-pd``, and what machine they are of."""

import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvserve_profiler.cost import device_kind
from pd_plan import LOAD


def machine() -> dict[str, Any]:
    """Return what figures depend on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    name = next(
        (line.partition(":")[2].strip() for line in info if line.startswith("model name")), ""
    )
    return {
        "processor": name,
        "device": device_kind(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def run_table(document: Mapping[str, Any]) -> Table:
    """Return a line for each condition and policy."""
    table = Table(
        box=SIMPLE_HEAD,
        title="seconds as the client sees them, MB on the wire, prefill of a token alone; * beyond the quality budget",
        title_justify="left",
    )
    table.add_column("link", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    headings = (
        "requests",
        "TTFT p50",
        "p95",
        "JCT p50",
        "p95",
        "mean",
        "raw over it",
        "MB",
        "prefill ms",
        "loss bp",
    )
    for heading in (*headings, "errors"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("used", overflow="fold")
    last = ""
    for row in document["runs"]:
        if last and row["condition"] != last:
            table.add_section()
        gain = document["vs_raw"].get(row["condition"], {}).get(row["policy"])
        mark = "*" if row["policy"] in document["beyond_budget"] else ""
        used = row["profiles"] if row["policy"].startswith("kvserve") else {}
        table.add_row(
            row["condition"] if row["condition"] != last else "",
            row["policy"] + mark,
            str(row["requests"]),
            *(f"{row['ttft_s'][name]:.2f}" for name in ("p50", "p95")),
            *(f"{row['jct_s'][name]:.2f}" for name in ("p50", "p95", "mean")),
            "" if gain is None else f"{gain:.2f}",
            f"{row['bytes_wire'] / 1e6:.1f}",
            f"{1e3 * row['prefill_s_per_token']:.2f}",
            f"{row['loss_bp']:.1f}",
            f"{row['errors']}"
            + (f" + {row['recomputed']} recomputed" if row["recomputed"] else ""),
            ", ".join(f"{name} {count}" for name, count in used.items()),
        )
        last = row["condition"]
    return table


def claim_table(document: Mapping[str, Any]) -> Table:
    """Return the targets, with what was measured, and how surely where that is known."""
    table = Table(box=SIMPLE_HEAD)
    for heading in ("target", "measured", "90 %", "wanted", ""):
        table.add_column(heading, justify="left" if heading == "target" else "right")
    for one in document["claims"]:
        table.add_row(
            one["claim"],
            "∞" if one["value"] is None else f"{one['value']:.3f}",
            interval(one, "{:.3f}".format),
            one["target"],
            one.get("verdict") or ("holds" if one["holds"] else "missed"),
        )
    return table


def interval(found: Mapping[str, Any], text: Callable[[float], str]) -> str:
    """Return where a figure's interval begins and ends; nothing if there is none.

    Args:
        found: Has ``low`` and ``high``, or not; None for what is infinite, both None for what is not known.
        text: Of a number.
    """
    low, high = found.get("low"), found.get("high")
    if low is None:
        return ""
    return f"{text(low)} to {'∞' if high is None else text(high)}"


def model_table(document: Mapping[str, Any]) -> Table:
    """Return what the model says of GPUs."""
    found = document["modelled"]
    error = found["measured_over_modelled"]
    assumed = found["assumptions"]
    table = Table(
        box=SIMPLE_HEAD,
        title=f"MODELLED, not measured: {assumed['model']}, {min(assumed['tokens'])} to "
        f"{max(assumed['tokens'])} tokens, prefill {LOAD:.0%} busy; median JCT in seconds, and raw's over it",
        title_justify="left",
        caption=""
        if error is None
        else f"on this machine, measured over modelled: {error:.2f} in the median",
        caption_justify="left",
    )
    policies = list(dict.fromkeys(row["policy"] for row in found["gpus"]))
    table.add_column("GPU")
    table.add_column("Gbit/s", justify="right")
    for policy in policies:
        table.add_column(policy, justify="right")
    cells: dict[tuple[str, float], list[str]] = {}
    for row in found["gpus"]:
        cells.setdefault((row["gpu"], row["bandwidth_gbit"]), []).append(
            f"{row['jct_p50_s']:.2f} ({row['vs_raw']:.1f})"
        )
    for (gpu, gbit), values in cells.items():
        table.add_row(gpu, f"{gbit:g}", *values)
    return table
