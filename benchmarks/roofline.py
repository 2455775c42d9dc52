"""What the GPU kernels' instruction counts allow on real GPUs: bounds that are computed, not measurements.

Reads the counts in kernels/kvserve_kernels/budgets.json, prints the tables of docs/roofline.md and writes
build/bench/roofline.json. With ``--record`` it compiles the kernels and writes the counts first (two minutes).
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
BUDGETS: Final = ROOT / "kernels/kvserve_kernels/budgets.json"


@dataclass(frozen=True, slots=True)
class Gpu:
    """Published figures of a GPU.

    Attributes:
        name: Short name.
        architecture: Compute capability times ten.
        multiprocessors: Their number.
        clock_hz: The clock at which the published peak of bfloat16 is reached.
        bytes_per_s: Bandwidth of main memory.
        tensor_per_s: Dense operations of tensor cores a second, by type.
        float_lanes: Results of float32 arithmetic a multiprocessor and clock.
    """

    name: str
    architecture: int
    multiprocessors: int
    clock_hz: float
    bytes_per_s: float
    tensor_per_s: dict[str, float]
    float_lanes: int


# NVIDIA's data sheets of A100 SXM 80 GB, H100 SXM and B200, and the A100, H100 and Blackwell architecture papers
GPUS: Final = (
    Gpu("A100", 80, 108, 1.41e9, 2.039e12, {"bfloat16": 312e12, "int8": 624e12}, 64),
    Gpu("H100", 90, 132, 1.83e9, 3.35e12, {"bfloat16": 989e12, "int8": 1979e12}, 128),
    Gpu("B200", 100, 148, 1.85e9, 7.7e12, {"bfloat16": 2250e12, "int8": 4500e12}, 128),
)
# instructions of 32 lanes: four schedulers a multiprocessor
ISSUE_LANES: Final = 128
# results a multiprocessor and clock: "Throughput of Native Arithmetic Instructions" in NVIDIA's CUDA C++ Programming
# Guide for compute capability 8.0 and 9.0; 10.0 is taken to be as 9.0
LANES: Final = {"integer": 64, "multiply": 64, "special": 16, "memory": 32}
NATIVE_NBYTES: Final = 2


def limits(kernel: dict[str, Any], gpu: Gpu) -> dict[str, float]:
    """Return what each resource allows, in values (or levels) a second."""
    counts = kernel["counts"][str(gpu.architecture)]
    clocks_per_s = gpu.multiprocessors * gpu.clock_hz
    lanes = LANES | {"float": gpu.float_lanes}
    found = {"issue": ISSUE_LANES * clocks_per_s / counts["instructions"]}
    found |= {pipe: n * clocks_per_s / counts[pipe] for pipe, n in lanes.items() if counts[pipe]}
    found["bandwidth"] = gpu.bytes_per_s / kernel["nbytes"]
    if kernel["tensor"]:
        operations, kind = kernel["tensor"]
        found["tensor"] = gpu.tensor_per_s[kind] / operations
    return found


def gathers_per_s(kernel: dict[str, Any], gpu: Gpu) -> float:
    """Return values a second if a gather takes a clock for each cache line, which is its worst."""
    if not kernel["lines"]:
        return float("inf")
    return float(gpu.multiprocessors * gpu.clock_hz / kernel["lines"])


def chain(parts: dict[str, float], kernels: dict[str, Any], gpu: Gpu, *, worst: bool) -> float:
    """Return values a second of kernels that run one after the other.

    Args:
        parts: For each kernel how many of its own units a native value has.
        kernels: By name.
        gpu: On which GPU.
        worst: Whether gathers take a clock for each line.
    """
    seconds = 0.0
    for name, share in parts.items():
        rate = min(limits(kernels[name], gpu).values())
        if worst:
            rate = min(rate, gathers_per_s(kernels[name], gpu))
        seconds += share / rate
    return 1 / seconds


def tables(budgets: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the tables as Markdown, and all figures."""
    kernels = budgets["kernels"]
    lines = ["| kernel | registers | instructions | of them integer | bytes | A100 | H100 | B200 |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    result: dict[str, Any] = {"computed_not_measured": True, "gpus": [asdict(g) for g in GPUS]}
    result["kernels"], result["chains"] = {}, {}
    for name, kernel in kernels.items():
        counts = list(kernel["counts"].values())
        registers = " · ".join(str(c["registers"]) for c in counts)
        if not kernel["counted"]:
            lines.append(f"| {name} | {registers} | | | | | | |")
            continue
        bounds = {gpu.name: limits(kernel, gpu) for gpu in GPUS}
        result["kernels"][name] = bounds
        cells = [
            name,
            registers,
            " · ".join(f"{c['instructions']:.1f}" for c in counts),
            " · ".join(f"{c['integer']:.1f}" for c in counts),
            f"{kernel['nbytes']:.2f}",
        ]
        for bound in bounds.values():
            binding = min(bound, key=lambda resource, of=bound: of[resource])  # type: ignore[misc]
            cells.append(f"{bound[binding] / 1e9:,.0f} {binding}")
        lines.append("| " + " | ".join(cells) + " |")
    live = budgets["live"]
    chains = {
        "encode": {
            "linear.prepare": 1.0,
            "linear.quantise": 1.0,
            "ladder.price": live,
            "rans.encode.4": live,
            "rans.gather": live,
        },
        "decode": {"rans.decode.4": live, "linear.dequantise": live, "linear.expand": 1.0},
    }  # fmt: skip
    lines += ["", "| GB/s of native cache | A100 | H100 | B200 |", "|---|---|---|---|"]
    for name, parts in chains.items():
        for worst in (False, True):
            rates = [chain(parts, kernels, gpu, worst=worst) * NATIVE_NBYTES for gpu in GPUS]
            title = name + (", gathers at their worst" if worst else "")
            result["chains"][title] = dict(zip([g.name for g in GPUS], rates, strict=True))
            lines.append(f"| {title} | " + " | ".join(f"{r / 1e9:,.0f}" for r in rates) + " |")
    return "\n".join(lines), result


def record() -> None:
    """Compile the kernels and write the counts."""
    import triton

    from kvserve_kernels import aot, aot_cases
    from kvserve_kernels.linear import linear_aot

    kernels = {
        case.name: {
            "per": case.per,
            "counted": case.counted,
            "nbytes": case.nbytes,
            "lines": round(case.lines, 4),
            "tensor": list(case.tensor) if case.tensor else None,
            "counts": {str(a): aot.count(case, a).to_json() for a in aot.ARCHITECTURES},
        }
        for case in aot_cases.CASES
    }
    whole = {
        "triton": triton.__version__,
        "live": linear_aot.COMPONENTS / linear_aot.WIDTH,
        "kernels": kernels,
    }
    BUDGETS.write_text(json.dumps(whole, indent=1) + "\n")


def main() -> None:
    """Print the tables, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="count anew first")
    if parser.parse_args().record:
        record()
    text, result = tables(json.loads(BUDGETS.read_text()))
    print(text)
    out = ROOT / "build/bench/roofline.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
