"""GPU kernels compile for A100, H100 and B200 to machine code that keeps within the recorded budget."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvserve_kernels import aot
from kvserve_kernels.aot_cases import CASES

ROOT = Path(__file__).parents[2]
BUDGETS: dict[str, Any] = json.loads((ROOT / "kernels/kvserve_kernels/budgets.json").read_text())
ARCHITECTURES = pytest.mark.parametrize("architecture", aot.ARCHITECTURES, ids=lambda a: f"sm_{a}")
# a fused product and sum would round once instead of twice, and levels differ from the CPU's
UNFUSED = (
    "linear.prepare",
    "linear.quantise",
    "rotate.undo",
    "hadamard.transform",
    "mean.turned",
    "predict.apply",
)


def test_budgets_cover_the_kernels() -> None:
    """Every kernel has a budget, and every budget a kernel."""
    assert list(BUDGETS["kernels"]) == [case.name for case in CASES]


@pytest.mark.slow
@ARCHITECTURES
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_budget(case: aot.Case, architecture: int) -> None:
    """Registers and instructions do not exceed what is recorded, and nothing is spilled."""
    recorded = BUDGETS["kernels"][case.name]["counts"][str(architecture)]
    counts = aot.count(case, architecture).to_json()
    assert counts["spilled_nbytes"] == 0
    assert counts["registers"] <= recorded["registers"]
    assert counts["instructions"] <= recorded["instructions"]


@pytest.mark.slow
@ARCHITECTURES
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in UNFUSED], ids=lambda case: case.name
)
def test_arithmetic_is_as_defined(case: aot.Case, architecture: int) -> None:
    """Where bytes depend on it, no product is fused with a sum, and subnormal numbers are not flushed to zero."""
    listing, _ = aot.disassemble(case, architecture)
    assert "FMUL" in listing
    assert "FFMA" not in listing
    assert not re.search(r"F(MUL|ADD)2?\.FTZ", listing)


def test_decoder_is_short() -> None:
    """Where streams or groups share what a channel costs, a level takes at most 32 instructions to decode."""
    for name in ("rans.decode.4", "rans.decode.groups"):
        for counts in BUDGETS["kernels"][name]["counts"].values():
            assert counts["instructions"] <= 32
