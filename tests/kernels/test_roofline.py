"""The page about GPU bounds shows what the script computes."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENDS = ("_ref", "_cpu", "_triton")


def test_page_shows_what_the_script_prints() -> None:
    """Every figure in the tables of docs/roofline.md follows from the recorded counts."""
    script = runpy.run_path(str(ROOT / "benchmarks/roofline.py"))
    text, result = script["tables"](json.loads(script["BUDGETS"].read_text()))
    assert text in (ROOT / "docs/roofline.md").read_text()
    assert result["computed_not_measured"] is True


def test_a_bound_is_what_the_scarcest_resource_allows() -> None:
    """One multiprocessor at 1 GHz does 12.8e9 values of ten instructions, and 1e9 of eight bytes at 8 GB/s."""
    script = runpy.run_path(str(ROOT / "benchmarks/roofline.py"))
    gpu = script["Gpu"]("X", 80, 1, 1e9, 8e9, {"int8": 1e12}, 64)
    counts = dict.fromkeys(("integer", "multiply", "float", "special", "memory"), 0.0)
    counts |= {"instructions": 10.0, "integer": 4.0}
    kernel = {"counts": {"80": counts}, "nbytes": 8.0, "tensor": (1e3, "int8"), "lines": 2.0}
    assert script["limits"](kernel, gpu) == {
        "issue": 12.8e9,
        "integer": 16e9,
        "bandwidth": 1e9,
        "tensor": 1e9,
    }
    assert script["gathers_per_s"](kernel, gpu) == 0.5e9
    rate = script["chain"]({"k": 2.0}, {"k": kernel}, gpu, worst=True)
    assert rate == pytest.approx(0.25e9)


def test_page_lists_the_operations() -> None:
    """Each operation that has a definition is in the page's table, with the paths that its folder holds."""
    package = ROOT / "kernels/kvserve_kernels"
    found = {
        folder.parent.name: ["✓" if any(folder.parent.glob(f"*{end}.py")) else "–" for end in ENDS]
        for folder in package.glob("*/*_ref.py")
    }
    lines = (ROOT / "docs/roofline.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:2] == "| "]
    listed = {row[0]: row[2:] for row in rows if len(row) == 5 and row[2] in ("✓", "–")}
    assert listed == found
