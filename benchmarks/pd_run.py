"""The engines of ``make bench-pd`` under its policies and conditions, one turn after the other."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

import pd_load
import pd_profiles
import pd_rows
import pd_servers
from kvserve_api.profile_set import DEFAULT_CLASS, NONE, ParetoSet
from kvserve_connector.config import DEFAULT_PORT as TRANSFER_PORT
from pd_load import Request, Route, Timing
from pd_plan import (
    ALONE,
    GENERATED,
    KVSERVE,
    KVSERVE_QUALITY,
    LATE,
    RAW,
    Condition,
    Moves,
    another,
)

BUDGET_BP: Final = 100
"""The quality budget of the policy, and so of what counts as the best fixed profile."""
OBJECTIVE_S: Final = 2.0
"""What most transfers of a MaximizeQuality policy shall take at most."""
PROBE_TOKENS: Final = 1000
PROBES: Final = 3
FRESH_S: Final = 45.0
"""A prefill that was measured longer ago is measured again: the machine's speed changes within minutes."""
SETTLE_S: Final = 1.2
"""vLLM's metrics page is that much behind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What a prefill took at a time.

    Attributes:
        at_s: When, on `time.perf_counter`.
        s_per_token: Of the prefill engine alone, with nothing on the link.
    """

    at_s: float
    s_per_token: float


class Run:
    """The engines, and what is compared on them.

    Args:
        pair: The engines.
        pareto: All profiles.
        documents: Tokens of the texts that prompts are made of.

    Attributes:
        probes: What prefills took, in the order of time.
        losses_bp: Of each profile.
    """

    def __init__(
        self, pair: pd_servers.Pair, pareto: ParetoSet, documents: Sequence[Sequence[int]]
    ) -> None:
        self.pair = pair
        self.probes: list[Probe] = []
        self.losses_bp = {p.name: p.loss_bp for p in pareto.classes[DEFAULT_CLASS]}
        self._documents = documents
        self._pareto = pareto
        self._front = pd_profiles.of_front(pareto, PROBE_TOKENS * pd_profiles.TOKEN_BYTES)

    def warm_up(self) -> float:
        """Send the first requests, and return what the generation of one takes, in seconds."""
        requests = pd_load.schedule(self._documents, 2, 1.0, seed=99)
        self.use(RAW)
        found = [
            timing
            for policy in (RAW, LATE, ALONE)
            for timing in self._drive(requests, self._route(policy), max_tokens=GENERATED)
        ]
        if error := next((t.error for t in found if t.error), ""):
            raise pd_servers.ServerError(f"the engines do not answer: {error}")
        return median(t.jct_s - t.ttft_s for t in found[-len(requests) :])

    def prefill_s_per_token(self, fresh_s: float = FRESH_S) -> float:
        """Return what a prefill takes alone, measured again if that is longer ago; the link must be idle."""
        if not self.probes or time.perf_counter() - self.probes[-1].at_s > fresh_s:
            requests = pd_load.schedule(self._documents, PROBES, 1.0, seed=len(self.probes))
            probes = [replace(r, prompt=(r.prompt * 2)[:PROBE_TOKENS]) for r in requests]
            found = self._drive(probes, self._route(ALONE), max_tokens=1)
            if error := next((t.error for t in found if t.error), ""):
                raise pd_servers.ServerError(f"the prefill engine does not answer: {error}")
            taken_s = median(t.ttft_s for t in found)
            probe = Probe(at_s=time.perf_counter(), s_per_token=taken_s / PROBE_TOKENS)
            self.probes.append(probe)
        return self.probes[-1].s_per_token

    def use(self, policy: str) -> None:
        """Put a policy in force."""
        use = self.pair.controller.use
        if policy == KVSERVE:
            use(self._front, quality={"maxLossBasisPoints": BUDGET_BP})
        elif policy == KVSERVE_QUALITY:
            objective = {
                "name": "transfer",
                "metric": "KVTransferTime",
                "percentile": 95,
                "thresholdMilliseconds": round(OBJECTIVE_S * 1000),
            }
            use(
                self._front,
                quality={"maxLossBasisPoints": BUDGET_BP},
                slo={"goal": "MaximizeQuality", "objectives": [objective]},
            )
        elif policy != ALONE:
            name = NONE if policy == RAW else policy.removesuffix(LATE)
            use(self._pareto, control={"mode": "Pinned", "pinnedProfile": name})

    def round(self, condition: Condition, number: int) -> tuple[list[Request], float]:
        """Return a round's requests, the same for all policies, and how many of them arrive in a second."""
        prefill_s = self.prefill_s_per_token()
        count = condition.count(prefill_s, pd_load.mean_tokens())
        # at one a second in the mean, then as many as the machine can do now
        made = pd_load.schedule(self._documents, count, 1.0, seed=1 + number)
        per_s = condition.per_s(prefill_s, sum(len(r.prompt) for r in made) / count)
        if condition.lasts_s:
            per_s = count / condition.lasts_s
        arrivals_s = condition.arrivals_s([r.at_s for r in made], per_s)
        return [replace(r, at_s=at_s) for r, at_s in zip(made, arrivals_s, strict=True)], per_s

    def turn(
        self,
        condition: Condition,
        policy: str,
        requests: Sequence[Request],
        per_s: float,
        mbit: float | None,
    ) -> pd_rows.Turn:
        """Give a policy its turn.

        Args:
            condition: Under which.
            policy: Whose turn it is.
            requests: Of the round.
            per_s: How many of them arrive in a second; 0: each waits for the one before.
            mbit: The link's rate; None unshaped.
        """
        before_s = self.prefill_s_per_token()
        self.use(policy)
        link = self.pair.link
        link.shape(Moves().mbit(0.0) if condition.moving else mbit)
        before, sent = self.pair.totals(), link.sent_bytes()
        timings = self._drive(
            requests,
            self._route(policy),
            max_tokens=GENERATED,
            one_by_one=not per_s,
            moving=condition.moving,
        )
        bytes_wire = link.sent_bytes() - sent
        link.shape(None)
        time.sleep(SETTLE_S)
        return pd_rows.Turn(
            timings=tuple(timings),
            bytes_wire=bytes_wire,
            grown=pd_rows.counted(before, self.pair.totals()),
            per_s=per_s,
            prefill_s_per_token=(before_s + self.prefill_s_per_token()) / 2,
        )

    def lossy(self) -> list[str]:
        """Return the profiles beyond the budget."""
        profiles = self._pareto.classes[DEFAULT_CLASS]
        return [p.name for p in profiles if p.loss_upper_bp > BUDGET_BP]

    def _route(self, policy: str) -> Route:
        prefill, decode = self.pair.prefill, self.pair.decode
        if policy == ALONE:
            return Route(prefill=prefill.url)
        early = None if policy.endswith(LATE) else (prefill.end.address, TRANSFER_PORT)
        return Route(prefill=prefill.url, decode=decode.url, early=early)

    def _drive(
        self,
        requests: Sequence[Request],
        route: Route,
        *,
        max_tokens: int,
        one_by_one: bool = True,
        moving: bool = False,
    ) -> list[Timing]:
        async def both() -> list[Timing]:
            mover = asyncio.create_task(self._move()) if moving else None
            try:
                return await pd_load.run(
                    requests, route, max_tokens=max_tokens, one_by_one=one_by_one
                )
            finally:
                if mover is not None:
                    mover.cancel()
                    with suppress(asyncio.CancelledError):
                        await mover

        return asyncio.run(both())

    async def _move(self) -> None:
        """Change the link's rate at the times of `Moves`."""
        moves, start_s, number = Moves(), time.monotonic(), 0
        while True:
            number += 1
            await asyncio.sleep(start_s + number * moves.phase_s - time.monotonic())
            await asyncio.to_thread(
                self.pair.link.shape, moves.mbit((number + 0.5) * moves.phase_s)
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """The time there is, on `time.perf_counter`.

    Attributes:
        starts_s: When it began.
        budget_s: How long it is.
        overtime: Beyond so many times of it nothing more is begun.
    """

    starts_s: float
    budget_s: float
    overtime: float = 1.05

    def left_s(self, share: float) -> float:
        """Return how long there is until a share of it is over; less than nothing afterwards."""
        return self.starts_s + share * self.budget_s - time.perf_counter()


def compare(
    run: Run,
    conditions: Sequence[Condition],
    clock: Clock,
    notes: list[str],
    say: Callable[[str], None],
) -> Iterator[pd_rows.Row]:
    """Yield what each policy got under each condition.

    Args:
        run: The engines.
        conditions: What to compare under.
        clock: The time there is.
        notes: Takes what was not measured, and why.
        say: Takes messages for people.
    """
    for condition in conditions:
        prefill_s = run.prefill_s_per_token(fresh_s=0.0)
        mbit = condition.link_mbit(prefill_s)
        say(
            f"{condition.name}: prefill {1e3 * prefill_s:.2f} ms a token"
            + (f", link {mbit:.1f} Mbit/s" if mbit and not condition.moving else "")
        )
        for policy, turns in _rounds(run, condition, mbit, clock, notes, say).items():
            yield pd_rows.row(
                condition,
                policy,
                turns,
                mbit=mbit,
                losses_bp=run.losses_bp,
                objective_s=OBJECTIVE_S,
            )


def _rounds(
    run: Run,
    condition: Condition,
    mbit: float | None,
    clock: Clock,
    notes: list[str],
    say: Callable[[str], None],
) -> dict[str, list[pd_rows.Turn]]:
    """Return the turns that each policy had."""
    turns: dict[str, list[pd_rows.Turn]] = {}
    turns_s: dict[str, float] = {}
    failed: set[str] = set()
    number = 0
    while another(condition, number, turns_s, clock.left_s(condition.ends)):
        requests, per_s = run.round(condition, number)
        for policy in condition.order(number):
            if policy in failed:
                continue
            began_s = time.perf_counter()
            try:
                if clock.left_s(clock.overtime) < 0:
                    raise TimeoutError("the time was up")
                turn = run.turn(condition, policy, requests, per_s, mbit)
                turns.setdefault(policy, []).append(turn)
            except (pd_servers.ServerError, OSError) as error:
                failed.add(policy)
                notes.append(f"{condition.name}, {policy}, round {number + 1}: {error}")
                say(notes[-1])
            turns_s[policy] = time.perf_counter() - began_s
        number += 1
    return turns
