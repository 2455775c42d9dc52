"""The latest decisions of a policy's pods."""

from typing import Any

from kvserve_api.decision import decide
from kvserve_api.latency import Link
from kvserve_api.policy import Policy
from kvserve_api.rpc.messages import decision_to_message
from kvserve_api.table import DecisionTable, Version
from kvserve_controller.compile import compile_table
from kvserve_controller.ledger import MAX_DECISIONS, MAX_MESSAGES, MAX_TABLES, Ledger
from samples import pareto, policy_object


def table(counter: int = 1) -> DecisionTable:
    """Return a table of the usual policy."""
    return compile_table(
        Policy.from_object(policy_object()),
        pareto(),
        version=Version(epoch=1, counter=counter),
        prior_bytes_per_s=125e6,
    )


def message(wall_s: float = 1.0, counter: int = 1) -> Any:
    """Return the message of a decision by that table."""
    link = Link(bytes_per_s=1e7)
    return decision_to_message(
        decide(table(counter), "default", native_bytes=10_000_000, link=link, wall_s=wall_s)
    )


def test_latest_first_with_what_led_to_them() -> None:
    """Decisions come newest first, with every candidate as it was held to be."""
    ledger = Ledger()
    ledger.offered(table())
    assert ledger.take("p-0", [message(1.0), message(3.0)]) == 0
    assert ledger.take("p-1", [message(2.0)]) == 0
    found = ledger.explain(2)
    assert [(each["pod"], each["time_s"]) for each in found] == [("p-0", 3.0), ("p-1", 2.0)]
    verdicts = {each["name"]: each["verdict"] for each in found[0]["candidates"]}
    assert verdicts == {"rans": "Worse", "int4": "Chosen", "int8": "Worse", "none": "Worse"}


def test_nonsense_is_counted() -> None:
    """What can't have been decided, and what is too much, is not kept but counted."""
    ledger = Ledger()
    bad = message()
    bad.bytes_per_s = -1.0
    assert ledger.take("p", [bad, message()]) == 1
    assert ledger.take("p", [message()] * (MAX_MESSAGES + 5)) == 5


def test_memory_is_bounded() -> None:
    """Only so many decisions and tables are kept; a decision by a forgotten table is told as the pod told it."""
    ledger = Ledger()
    for counter in range(MAX_TABLES + 1):
        ledger.offered(table(counter))
    for index in range(MAX_DECISIONS + 10):
        ledger.take("p", [message(float(index), counter=index % 2)])
    found = ledger.explain(1000)
    assert len(found) == MAX_DECISIONS
    assert {"candidates" in each for each in found if each["version"] == "1.0"} == {False}
    assert {"candidates" in each for each in found if each["version"] == "1.1"} == {True}
