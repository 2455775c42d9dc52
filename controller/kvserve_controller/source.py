"""What the controller sees of the world: policies with their Pareto sets, wherever they come from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from kvserve_api.errors import SpecError
from kvserve_api.policy import Policy
from kvserve_api.profile_set import ParetoSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One policy as its source has it now.

    Attributes:
        policy: The policy; None if it can't be read.
        pareto: The Pareto set in force for it; None if there is none yet or it can't be read.
        problem: Why one of the two can't be read.
        uid: Identity; another one under the same name is another policy.
        created: When it was created, in a form that sorts; decides between policies that select the same pod.
        generation: Of the policy's spec, also of one that can't be read.
        status: The status it carries, to take up what an earlier controller published.
    """

    policy: Policy | None
    pareto: ParetoSet | None = None
    problem: SpecError | None = None
    uid: str = ""
    created: str = ""
    generation: int = 1
    status: Mapping[str, Any] = field(default_factory=dict)


Snapshot: TypeAlias = Mapping[str, Entry]
"""All policies, by ``namespace/name``."""

Publish: TypeAlias = Callable[[Snapshot], None]


class Source(Protocol):
    """Where policies and Pareto sets come from."""

    @property
    def alive_s(self) -> float:
        """When it last looked or tried to, on the monotonic clock, in seconds."""

    async def run(self, publish: Publish) -> None:
        """Publish all that is there, then again after each change, until cancelled."""
