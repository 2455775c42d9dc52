"""The latest decisions of one policy's pods, and the tables that explain them; both bounded."""

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any, Final

from kvserve_api.decision import Decision, explained
from kvserve_api.errors import SpecError
from kvserve_api.rpc.messages import decision_from_message
from kvserve_api.table import DecisionTable, Version

MAX_DECISIONS: Final = 256
MAX_TABLES: Final = 16
"""Decisions by older tables are told without what the candidates were held to be."""
MAX_MESSAGES: Final = 100
"""Most decisions of one message that are read."""


class Ledger:
    """What was decided lately, by whom, and by which table."""

    def __init__(self) -> None:
        self._decisions: deque[tuple[str, Decision]] = deque(maxlen=MAX_DECISIONS)
        self._tables: OrderedDict[Version, DecisionTable] = OrderedDict()

    def offered(self, table: DecisionTable) -> None:
        """Keep a table that pods will decide by."""
        self._tables[table.version] = table
        while len(self._tables) > MAX_TABLES:
            self._tables.popitem(last=False)

    def take(self, pod: str, messages: Sequence[Any]) -> int:
        """Take up the ``Decision`` messages of a pod.

        Returns:
            How many can't have been made, or were too many.
        """
        refused = max(0, len(messages) - MAX_MESSAGES)
        for message in messages[:MAX_MESSAGES]:
            try:
                self._decisions.append((pod, decision_from_message(message)))
            except SpecError:
                refused += 1
        return refused

    def explain(self, limit: int) -> list[dict[str, Any]]:
        """Return the latest decisions with all that led to them, newest first, at most so many."""
        latest = sorted(self._decisions, key=lambda entry: -entry[1].wall_s)[:limit]
        return [
            {"pod": pod} | explained(self._tables.get(decision.version), decision)
            for pod, decision in latest
        ]
