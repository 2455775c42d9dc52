"""Turns of policies, without engines."""

import math
import time
from collections.abc import Sequence
from typing import cast

from pd_load import Request, Timing
from pd_plan import Condition
from pd_rows import Turn
from pd_run import Clock, Run, compare
from pd_servers import ServerError


class Engines:
    """Stands in for `Run`: each request of round n takes n + 1 seconds, and some turns fail.

    Args:
        broken: Policies and the rounds in which they fail.
    """

    def __init__(self, broken: Sequence[tuple[str, int]] = ()) -> None:
        self.losses_bp: dict[str, float] = {}
        self.turns: list[tuple[str, int]] = []
        self._broken = broken
        self._number = 0

    def prefill_s_per_token(self, fresh_s: float = 0.0) -> float:
        """Return a millisecond."""
        return 1e-3

    def round(self, condition: Condition, number: int) -> tuple[list[Request], float]:
        """Return two requests."""
        self._number = number
        return [Request(at_s=0.0, prompt=(1,)), Request(at_s=1.0, prompt=(2,))], 1.0

    def turn(
        self,
        condition: Condition,
        policy: str,
        requests: Sequence[Request],
        per_s: float,
        mbit: float | None,
    ) -> Turn:
        """Return what a policy got."""
        self.turns.append((policy, self._number))
        if (policy, self._number) in self._broken:
            raise ServerError("it did not take the policy")
        taken_s = self._number + 1.0
        return Turn(
            timings=tuple(Timing(at_s=r.at_s, tokens=1, jct_s=taken_s) for r in requests),
            bytes_wire=1,
            grown={},
            per_s=per_s,
            prefill_s_per_token=1e-3,
        )


CONDITION = Condition(name="it", policies=("a", "b"), requests=2, rounds=3, ends=1.0, load=0.3)
ENDLESS = Clock(starts_s=time.perf_counter(), budget_s=math.inf)


def compared(engines: Engines, clock: Clock = ENDLESS) -> tuple[dict[str, list[float]], list[str]]:
    """Return the completion times of each policy, and the notes."""
    notes: list[str] = []
    rows = compare(cast("Run", engines), [CONDITION], clock, notes, lambda text: None)
    return {row["policy"]: row["jct_each_s"] for row in rows}, notes


def test_rounds_go_on_while_there_is_time() -> None:
    """All rounds that are wanted come, and the policies change places."""
    engines = Engines()
    assert compared(engines) == ({name: [1.0, 1.0, 2.0, 2.0, 3.0, 3.0] for name in "ab"}, [])
    assert engines.turns == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]


def test_the_first_round_comes_even_late() -> None:
    """A condition whose time is over has one round."""
    clock = Clock(starts_s=time.perf_counter() - 1000, budget_s=999.0)
    assert compared(Engines(), clock) == ({"a": [1.0, 1.0], "b": [1.0, 1.0]}, [])


def test_nothing_begins_long_after_the_time() -> None:
    """What is not measured for want of time is noted."""
    clock = Clock(starts_s=time.perf_counter() - 1000, budget_s=500.0)
    assert compared(Engines(), clock) == (
        {},
        ["it, a, round 1: the time was up", "it, b, round 1: the time was up"],
    )


def test_a_policy_that_fails_keeps_what_it_got() -> None:
    """It has no more turns, so that its requests stay the others' first."""
    engines = Engines(broken=[("a", 1)])
    assert compared(engines) == (
        {"a": [1.0, 1.0], "b": [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]},
        ["it, a, round 2: it did not take the policy"],
    )
    assert ("a", 2) not in engines.turns
