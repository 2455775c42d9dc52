"""Settings check themselves."""

from typing import Any

import pytest

from kvserve_api.errors import SpecError
from kvserve_profiler.settings import Settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"prefix_tokens": 15},
        {"continuation_tokens": 0},
        {"max_windows": 0},
        {"resamples": 10},
        {"confidence_percent": 100.0},
        {"confidence_percent": float("nan")},
        {"seed": -1},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    """The error names the field."""
    with pytest.raises(SpecError, match=next(iter(wrong))):
        Settings(**wrong)
