"""Transform and coder in one call, as a pipeline uses it."""

from pathlib import Path

import pytest
import torch
from tests.strategies.calibrated import grid, joint

from bundles import small_cache, write_small_bundle
from kvserve_strategies import Pipeline, fused


def test_a_wrong_guess_costs_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many channels were thought to be not all zero, the payload is the same."""
    keys, values = small_cache(3, 300, torch.float32)
    pipeline = Pipeline.of(joint(*grid(0.3)), write_small_bundle(tmp_path / "bundle"))
    expected = bytes(pipeline.encode(keys, values))
    cut = fused.stream_groups  # type: ignore[attr-defined]
    for more in (0, 1, 7):
        monkeypatch.setattr(fused, "stream_groups", lambda *a, more=more: cut(*a) + more)
        assert bytes(pipeline.encode(keys, values)) == expected
