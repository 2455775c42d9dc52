"""What a run of ``make bench-store`` amounts to: times against computing, the claims, and the table. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pd_rows import percentiles

RECOMPUTE: Final = "recompute"
RAW: Final = "raw"
KVSERVE: Final = "kvserve"
LMCACHE: Final = "lmcache"
"""LMCache's own connector and server with the same Redis."""
FLOOR: Final = "floor"
"""The new tokens alone, without a prefix: no store can be faster."""
TIMES_RECOMPUTE: Final = 32.8
"""The paper's largest gain over computing anew."""
LEAST_TIMES: Final = 0.95
"""What deciding between fetching and computing may cost where computing is as fast."""

Row = dict[str, Any]


def row_of(store: str, mbit: float | None, prefix: int, mode: str, seconds: Sequence[float]) -> Row:
    """Return one mode over one link.

    Args:
        store: The kind of store.
        mbit: The link's rate; None unshaped.
        prefix: Tokens that may be in the store.
        mode: What is measured.
        seconds: To the first token, of each request.
    """
    return {
        "store": store,
        "bandwidth_mbit": mbit,
        "prefix_tokens": prefix,
        "mode": mode,
        "requests": len(seconds),
        "ttft_s": percentiles(seconds),
    }


def vs_recompute(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Return for each link, prefix and mode how many times as long computing takes to the first token, by medians."""
    computed = {
        (row["store"], row["bandwidth_mbit"], row["prefix_tokens"]): row["ttft_s"]["p50"]
        for row in rows
        if row["mode"] == RECOMPUTE
    }
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        key = (row["store"], row["bandwidth_mbit"], row["prefix_tokens"])
        if row["mode"] == RECOMPUTE or key not in computed:
            continue
        link = f"{row['store']} {link_name(row['bandwidth_mbit'])}"
        times = computed[key] / row["ttft_s"]["p50"]
        found.setdefault(link, {}).setdefault(str(row["prefix_tokens"]), {})[row["mode"]] = times
    return found


def claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the targets with what was measured."""
    found = []
    against = vs_recompute(rows)
    at = against.get(f"redis {link_name(1000.0)}", {}).get("2000", {})
    if KVSERVE in at:
        times = at[KVSERVE]
        text = "1 Gbit/s, 2,000 tokens: median TTFT, computing over KVServe"
        found.append(
            {
                "claim": text,
                "value": times,
                "target": f"> {TIMES_RECOMPUTE}",
                "holds": times > TIMES_RECOMPUTE,
            }
        )
    if KVSERVE in at and LMCACHE in at:
        times = at[KVSERVE] / at[LMCACHE]
        found.append(
            {
                "claim": "the same: LMCache over KVServe",
                "value": times,
                "target": "> 1",
                "holds": times > 1,
            }
        )
    slower = [
        modes[KVSERVE] for link in against.values() for modes in link.values() if KVSERVE in modes
    ]
    if slower:
        text = "every link and prefix: least of computing over KVServe (it computes where that is faster)"
        found.append(
            {
                "claim": text,
                "value": min(slower),
                "target": f">= {LEAST_TIMES}",
                "holds": min(slower) >= LEAST_TIMES,
            }
        )
    return found


def link_name(mbit: float | None) -> str:
    """Return a link's name."""
    return "unshaped" if mbit is None else f"{mbit:g} Mbit/s"


def table(document: Mapping[str, Any]) -> Table:
    """Return a line for each link and prefix, a column for each mode."""
    modes = list(dict.fromkeys(row["mode"] for row in document["runs"]))
    drawn = Table(
        box=SIMPLE_HEAD,
        title="median seconds to the first token, and computing's over it",
        title_justify="left",
    )
    for heading in ("link", "prefix"):
        drawn.add_column(heading, no_wrap=True)
    for mode in modes:
        drawn.add_column(mode, justify="right", no_wrap=True)
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for row in document["runs"]:
        link = f"{row['store']} {link_name(row['bandwidth_mbit'])}"
        times = (
            document["vs_recompute"]
            .get(link, {})
            .get(str(row["prefix_tokens"]), {})
            .get(row["mode"])
        )
        text = f"{row['ttft_s']['p50']:.3f}" + ("" if times is None else f" ({times:.1f})")
        cells.setdefault((link, row["prefix_tokens"]), {})[row["mode"]] = text
    for (link, prefix), by_mode in cells.items():
        drawn.add_row(link, f"{prefix:,}", *(by_mode.get(mode, "") for mode in modes))
    return drawn
