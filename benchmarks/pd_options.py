"""The options that ``bench-pd`` and ``bench-store`` share."""

import argparse
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
OUT: Final = ROOT / "build" / "bench"
DATA: Final = ROOT.parent / "shared" / "data"
"""Beside the repository, not part of it; only benchmarks know of it."""


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of these options.

    Args:
        description: Of the benchmark, in a line.
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", action="store_true", help="print JSON instead of tables")
    made.add_argument("--model", type=Path, help="model folder; by default SmolLM2-135M-Instruct")
    made.add_argument("--bundle", type=Path, help="calibration bundle; by default made once")
    made.add_argument("--texts", type=Path, default=DATA, help="folder with the texts of prompts")
    made.add_argument("--cache", type=Path, default=OUT / "pd", help="where profiles are kept")
    return made
