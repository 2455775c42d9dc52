"""Fetch a prefix from a store, or compute it again: whichever is there sooner.

Computing ``n`` tokens behind ``c`` others costs ``a + b*n + d*n*(c + n/2)`` seconds: a step's fixed part, the part that
grows with tokens, and attention's, which grows with what each token looks back on. Fetching costs what
`kvserve_api.latency` says of a transfer that is coded already. A prefix is fetched as a whole or not at all: its first
tokens are the cheapest to compute, each further one costs more, while each costs the same to fetch; so if a part is
worth it, all of it is.

What is not known yet is hoped to be fast, at a bounded risk: a fetch may take as long as computing instead would have
(or `RISK_S`, before that is known), then what has arrived is kept and the rest is computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

RISK_S: Final = 5.0
"""What a fetch may take before it is known how fast this engine computes."""
LEAST_S: Final = 0.25
"""What any fetch may take: shorter times are those of schedulers."""
MEMORY_STEPS: Final = 32.0
"""A step counts with a weight that falls by a factor e in so many later ones."""
LEAST_TOKENS: Final = 256
"""So many tokens must have been computed before the speed counts as known."""
_SCALE: Final = np.array([1.0, 1e3, 1e6])
_RIDGE: Final = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """How fast an engine computes prompts.

    Attributes:
        step_s: Seconds of a step, whatever is in it.
        token_s: Seconds of each token.
        attention_s: Seconds of each pair of a token and one that it looks back on.
    """

    step_s: float
    token_s: float
    attention_s: float

    def seconds(self, tokens: range) -> float:
        """Return what it takes to compute these tokens of a prompt, in seconds."""
        return self.step_s + self.token_s * len(tokens) + self.attention_s * looks_back(tokens)


def looks_back(tokens: range) -> float:
    """Return how many pairs of a token and one before it computing these tokens has."""
    return len(tokens) * (tokens.start + len(tokens) / 2)


class Speedometer:
    """Learns an engine's speed from its steps: weighted least squares that forgets, with no negative costs.

    A step counts by its seconds for each token: a long one must not hide the short ones.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._moments = np.zeros((3, 3))
        self._products = np.zeros(3)

    def observe(self, seconds: float, parts: Sequence[range]) -> None:
        """Take note of a step.

        Args:
            seconds: What it took.
            parts: For each request in it which of its tokens were computed.
        """
        tokens = sum(map(len, parts))
        if not seconds > 0 or not tokens:
            return
        row = np.array([1.0, tokens, sum(map(looks_back, parts))]) / _SCALE / tokens
        fade = np.exp(-1 / MEMORY_STEPS)
        self._moments = self._moments * fade + np.outer(row, row)
        self._products = self._products * fade + row * (seconds / tokens)
        self._tokens += tokens

    @property
    def speed(self) -> Speed | None:
        """The engine's speed; None while too little is known."""
        if self._tokens < LEAST_TOKENS:
            return None
        used = [0, 1, 2]
        while True:
            moments = self._moments[np.ix_(used, used)]
            ridge = _RIDGE * np.trace(moments) * np.eye(len(used))
            found = np.linalg.solve(moments + ridge, self._products[used])
            if (found >= 0).all() or len(used) == 1:
                break
            del used[int(found.argmin())]
        costs = np.zeros(3)
        costs[used] = np.maximum(found, 0)
        step_s, token_s, attention_s = (costs / _SCALE).tolist()
        return Speed(step_s=step_s, token_s=token_s, attention_s=attention_s)


class Why(StrEnum):
    """What decided; a label of metrics."""

    FETCH_FASTER = "FetchFaster"
    RECOMPUTE_FASTER = "RecomputeFaster"
    UNMEASURED = "Unmeasured"
    ALWAYS = "AlwaysFetch"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What to do with a prefix that is in a store.

    Attributes:
        fetch: Whether to fetch it.
        why: What decided.
        fetch_s: What fetching is expected to take.
        recompute_s: What computing is expected to take; None if that is not known.
        limit_s: What fetching may take.
    """

    fetch: bool
    why: Why
    fetch_s: float
    recompute_s: float | None
    limit_s: float


def decide(
    *,
    fetch_s: float,
    measured: bool,
    tokens: range,
    speed: Speed | None,
    most_s: float,
    always: bool = False,
) -> Verdict:
    """Decide.

    Args:
        fetch_s: What fetching is expected to take, in seconds.
        measured: Whether that was measured lately, not hoped.
        tokens: What would be fetched.
        speed: Of the engine; None if it is not known.
        most_s: What any fetch may take.
        always: Whether to fetch what is there whatever it costs.
    """
    if always:
        return Verdict(
            fetch=True, why=Why.ALWAYS, fetch_s=fetch_s, recompute_s=None, limit_s=most_s
        )
    if speed is None:
        return Verdict(
            fetch=True,
            why=Why.UNMEASURED,
            fetch_s=fetch_s,
            recompute_s=None,
            limit_s=min(most_s, RISK_S),
        )
    # the tokens behind are computed in a step of their own anyway, so its fixed part is not saved
    recompute_s = speed.seconds(tokens) - speed.step_s
    faster = fetch_s < recompute_s
    why = Why.RECOMPUTE_FASTER if not faster else Why.FETCH_FASTER if measured else Why.UNMEASURED
    return Verdict(
        fetch=faster,
        why=why,
        fetch_s=fetch_s,
        recompute_s=recompute_s,
        limit_s=min(most_s, max(LEAST_S, recompute_s)),
    )
