"""What is expected of candidates: the best is found without a look at all."""

import numpy as np
import pytest

from kvserve_profiler.acquisition import AT_ONCE, expected_improvement, most_improving
from kvserve_profiler.pool import FloatArray, IntArray

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("slack", [0.0, 0.3, 9.0], ids=["exact bounds", "close", "useless"])
def test_the_best_is_found_from_bounds(slack: float) -> None:
    """Whatever the bounds are, the best is found, and no more is looked at than they call for."""
    gain = RNG.random(5 * AT_ONCE)
    bound = gain + slack * RNG.random(len(gain))
    out = RNG.permutation(len(gain))[:AT_ONCE]
    bound[out] = -1.0
    looked: list[int] = []

    def improvement(some: IntArray) -> FloatArray:
        looked.extend(some.tolist())
        return gain[some]

    some, found = most_improving(improvement, bound)
    allowed = np.setdiff1d(np.arange(len(gain)), out)
    assert some.tolist() == looked
    assert some[found.argmax()] == allowed[gain[allowed].argmax()]
    assert not set(looked) & set(out.tolist())
    assert len(looked) <= (bound >= found.max()).sum() + AT_ONCE


def test_a_front_that_is_rounded_down_leaves_no_less_to_gain() -> None:
    """So what is gained over it bounds what is gained over the front itself; points that others beat don't count."""
    front, known = RNG.random((30, 3)) * (3, 6, 4), RNG.random((40, 2)) * (4, 5)
    mean, deviation = RNG.random(40) * 6, 0.1 + RNG.random(40)
    exact = expected_improvement(front, known, mean, deviation, best=6.0)
    rounded = np.column_stack([front[:, 0], np.floor(front[:, 1]), front[:, 2]])
    assert (expected_improvement(rounded, known, mean, deviation, best=6.0) >= exact - 1e-12).all()
    worse = np.vstack([front, front * 0.9])
    again = expected_improvement(worse, known, mean, deviation, best=6.0)
    assert again == pytest.approx(exact)
