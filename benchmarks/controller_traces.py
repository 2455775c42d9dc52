"""Traces that the controller's benchmark replays: bandwidths, links and arrivals of others, and where they come from.

The whole traces are read from a folder (``--data``); a few kilobytes of them are kept beside this file for quick runs.
``python benchmarks/controller_traces.py --data DIR`` writes that sample anew.
"""

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

SAMPLES: Final = Path(__file__).with_name("controller_samples.json")
FILES: Final = {
    "paper": "paper_anchors/controller_ablation.csv",
    "jct": "paper_anchors/jct_bandwidth.csv",
    "pensieve": "bw_pensieve/test_traces.csv",
    "skyplane": "bw_skyplane/throughput_grid.csv",
    "skyplane_rtt": "bw_skyplane/latency_grid.csv",
    "azure_conv": "azure_llm_2023/AzureLLMInferenceTrace_conv.csv",
    "azure_code": "azure_llm_2023/AzureLLMInferenceTrace_code.csv",
    "mooncake": "mooncake/conversation_trace.jsonl",
}
SOURCES: Final = {
    "paper": "KVServe paper's public artefact (hpdps-group/KVServe, MIT): its 60 s controller ablation, and job times",
    "pensieve": "hongzimao/pensieve (MIT), HSDPA traces of Riiser et al., MMSys 2013",
    "skyplane": "skyplane-project/skyplane (Apache-2.0), iperf3 between cloud regions",
    "azure": "Azure/AzurePublicDataset, LLM inference trace 2023 (CC BY 4.0), Patel et al., ISCA 2024",
    "mooncake": "kvcache-ai/Mooncake, FAST'25 conversation trace (Apache-2.0)",
}
SAMPLE_ARRIVALS: Final = 200
SAMPLE_SERIES: Final = ("norway_bus_1", "norway_ferry_1")
SAMPLE_LINKS: Final = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Traces:
    """All that is replayed.

    Attributes:
        paper_gbps: The paper's 60 s of bandwidth, Gbit/s, evenly spaced.
        paper_curves_s: Its curves over the same time in seconds, by name: ``full``, ``without_bandit``, ``static``.
        jct_ms: Its job times by model, Gbit/s and method.
        pensieve: By name: times in seconds and Mbit/s.
        skyplane: Links: Gbit/s and round trip in milliseconds.
        arrivals: By name: seconds and prompt tokens of each request.
        complete: Whether these are the whole traces.
    """

    paper_gbps: tuple[float, ...]
    paper_curves_s: dict[str, tuple[float, ...]]
    jct_ms: dict[str, dict[str, dict[str, float]]]
    pensieve: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]
    skyplane: tuple[tuple[float, float], ...]
    arrivals: dict[str, tuple[tuple[float, int], ...]]
    complete: bool


def missing(folder: Path) -> list[str]:
    """Return which files a folder lacks."""
    return [name for name in FILES.values() if not (folder / name).is_file()]


def read(folder: Path) -> Traces:
    """Read the whole traces."""
    paper = _rows(folder, "paper")
    jct: dict[str, dict[str, dict[str, float]]] = {}
    for row in _rows(folder, "jct"):
        by_bandwidth = jct.setdefault(row["Model"], {})
        by_bandwidth.setdefault(row["Bandwidth"], {})[row["Method"]] = float(row["JCT"])
    pensieve: dict[str, tuple[list[float], list[float]]] = {}
    for row in _rows(folder, "pensieve"):
        times, rates = pensieve.setdefault(row["trace"], ([], []))
        times.append(float(row["time_s"]))
        rates.append(float(row["mbps"]))
    return Traces(
        paper_gbps=tuple(float(row["bandwidth_gbps"]) for row in paper),
        paper_curves_s={
            name: tuple(float(row[f"{name}_s"]) for row in paper)
            for name in ("full", "without_bandit", "static")
        },
        jct_ms=jct,
        pensieve={name: (tuple(t), tuple(r)) for name, (t, r) in pensieve.items()},
        skyplane=tuple(_links(folder)),
        arrivals={
            "azure_conv": tuple(_azure(folder, "azure_conv")),
            "azure_code": tuple(_azure(folder, "azure_code")),
            "mooncake": tuple(_mooncake(folder)),
        },
        complete=True,
    )


def sampled() -> Traces:
    """Read the sample that is kept beside this file."""
    value = json.loads(SAMPLES.read_text())
    return Traces(
        paper_gbps=tuple(value["paper_gbps"]),
        paper_curves_s={name: tuple(curve) for name, curve in value["paper_curves_s"].items()},
        jct_ms=value["jct_ms"],
        pensieve={name: (tuple(t), tuple(r)) for name, (t, r) in value["pensieve"].items()},
        skyplane=tuple((gbps, rtt_ms) for gbps, rtt_ms in value["skyplane"]),
        arrivals={
            name: tuple((at_s, tokens) for at_s, tokens in value["arrivals"][name])
            for name in value["arrivals"]
        },
        complete=False,
    )


def sample_of(traces: Traces) -> dict[str, Any]:
    """Return the part of whole traces that is kept."""
    value = asdict(traces)
    del value["complete"]
    links = sorted(traces.skyplane)
    step = (len(links) - 1) / (SAMPLE_LINKS - 1)
    value["skyplane"] = [links[round(index * step)] for index in range(SAMPLE_LINKS)]
    value["pensieve"] = {name: traces.pensieve[name] for name in SAMPLE_SERIES}
    value["arrivals"] = {
        name: [(round(at_s, 3), tokens) for at_s, tokens in arrivals[:SAMPLE_ARRIVALS]]
        for name, arrivals in traces.arrivals.items()
    }
    models = ("Llama-3.1-8B-Instruct", "Qwen2.5-32B-Instruct")
    value["jct_ms"] = {name: traces.jct_ms[name] for name in models}
    return {"sources": SOURCES} | value


def _rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / FILES[name]).open(newline="") as file:
        return list(csv.DictReader(file))


def _links(folder: Path) -> Iterator[tuple[float, float]]:
    rtt_ms = {
        (row["src_region"], row["dst_region"]): float(row["avg_rtt_ms"])
        for row in _rows(folder, "skyplane_rtt")
        if row["avg_rtt_ms"]
    }
    for row in _rows(folder, "skyplane"):
        pair = (row["src_region"], row["dst_region"])
        if row["received_gbps"] and pair in rtt_ms and float(row["received_gbps"]) > 0:
            yield float(row["received_gbps"]), rtt_ms[pair]


def _azure(folder: Path, name: str) -> Iterator[tuple[float, int]]:
    begin: datetime | None = None
    for row in _rows(folder, name):
        # seven digits of a second are one more than Python reads
        time = datetime.fromisoformat(row["TIMESTAMP"][:26])
        begin = begin or time
        yield (time - begin).total_seconds(), int(row["ContextTokens"])


def _mooncake(folder: Path) -> Iterator[tuple[float, int]]:
    with (folder / FILES["mooncake"]).open() as file:
        for line in file:
            request = json.loads(line)
            yield request["timestamp"] / 1000, request["input_length"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sample."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the whole traces")
    folder = parser.parse_args(arguments).data
    SAMPLES.write_text(json.dumps(sample_of(read(folder)), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
