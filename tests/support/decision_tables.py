"""Decision tables and links to try the selection law on: usual ones, and any."""

import math
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from kvserve_api.latency import NO_LOAD, Link, Load, StageCost
from kvserve_api.policy import Goal, Mode
from kvserve_api.profile_set import NONE, Profile
from kvserve_api.table import (
    CERTAIN,
    Candidate,
    ClassRule,
    DecisionTable,
    Doubt,
    OnControllerLoss,
    Version,
)
from samples import INT4, INT8, RANS, RAW, profile

MBIT = 125_000.0
SIZE = 50_000_000


def table(
    *profiles: Profile,
    goal: Goal = Goal.MINIMIZE_LATENCY,
    deadline_s: float = math.inf,
    mode: Mode = Mode.ACTIVE,
    pinned: str | None = None,
    fallback: str = NONE,
    hysteresis: float = 0.0,
    doubt: Doubt = CERTAIN,
    **rule: Any,
) -> DecisionTable:
    """Return a table of one rule over the given profiles, or four usual ones."""
    chosen = profiles or (RANS, INT4, INT8, RAW)
    return DecisionTable(
        version=Version(epoch=1, counter=1),
        policy="default/chat",
        mode=mode,
        candidates={
            p.name: Candidate(
                name=p.name,
                strategy=p.strategy,
                ratio=p.ratio,
                loss_upper_bp=p.loss_upper_bp,
                encode=p.encode,
                decode=p.decode,
                doubt=doubt,
            )
            for p in chosen
        },
        rules={
            "default": ClassRule(
                goal=goal, candidates=tuple(p.name for p in chosen), deadline_s=deadline_s, **rule
            )
        },
        pinned=pinned,
        fallback=fallback,
        ttl_s=60.0,
        on_controller_loss=OnControllerLoss.HOLD_LAST_GOOD,
        prior_bytes_per_s=125e6,
        hysteresis=hysteresis,
    )


@st.composite
def tables(draw: st.DrawFn, goal: Goal | None = None) -> DecisionTable:
    """Draw a table of up to eight random profiles."""
    others = [
        replace(
            profile(
                f"p{n}",
                ratio=draw(st.floats(1.1, 20)),
                loss_bp=draw(st.floats(0, 100)),
                encode_bytes_per_s=draw(st.floats(1e7, 1e10)),
                decode_bytes_per_s=draw(st.floats(1e7, 1e10)),
            ),
            encode=StageCost(
                floor_s=draw(st.floats(0, 0.01)), bytes_per_s=draw(st.floats(1e7, 1e10))
            ),
        )
        for n in range(draw(st.integers(0, 7)))
    ]
    return table(
        *others,
        RAW,
        goal=goal or draw(st.sampled_from(list(Goal))),
        deadline_s=draw(st.floats(1e-3, 100) | st.just(math.inf)),
    )


sizes = st.integers(1, 1 << 32)
links = st.builds(
    Link,
    bytes_per_s=st.floats(1e4, 1e11),
    backlog_bytes=st.floats(0, 1e9),
    rtt_s=st.floats(0, 0.1),
)
# no transfers bring no bytes: 0 arrivals say that nothing is known
loads = st.just(NO_LOAD) | st.builds(
    Load, arrivals_per_s=st.floats(1e-6, 50), native_bytes_per_s=st.floats(0, 1e9)
)
busy_links = st.builds(
    Link,
    bytes_per_s=st.floats(1e5, 1e10),
    backlog_bytes=st.floats(0, 1e9),
    rtt_s=st.floats(0, 0.1),
    encode_backlog_s=st.floats(0, 10),
    decode_backlog_s=st.floats(0, 10),
    load=loads,
    encoder_load=loads,
    encode_factor=st.floats(0.1, 10),
    encode_delays=st.floats(0, 10),
    decode_delays=st.floats(0, 10),
    hidden_s=st.just(0.0) | st.floats(0, 10),
)
