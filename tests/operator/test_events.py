"""Events: news at once, repetitions counted."""

import datetime

from kvserve_operator.events import EventLog, event_manifest
from kvserve_operator.meta import Meta
from kvserve_operator.plan import Record

NOW = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
META = Meta(namespace="n", name="chat", uid="u")
FAILED = Record(reason="JobFailed", message="first", warning=True)


def test_once_a_minute_for_each_reason() -> None:
    """The first is told at once, what follows within the minute together when it is over, then nothing."""
    log = EventLog()
    first = log.add(META, FAILED, NOW, 0)
    assert first
    assert first.count == 1
    again = Record(reason="JobFailed", message="last", warning=True)
    assert [log.add(META, again, NOW, s) for s in (1, 30, 59)] == [None] * 3
    assert log.due(59) == []
    [series] = log.due(60)
    assert (series.count, series.record.message, series.name) == (4, "last", first.name)
    assert log.due(200) == []
    late = log.add(META, again, NOW, 200)
    assert late
    assert late.count == 5


def test_reasons_and_policies_are_apart() -> None:
    """Other reasons and other policies are told at once."""
    log = EventLog()
    assert log.add(META, FAILED, NOW, 0)
    assert log.add(META, Record(reason="Profiled", message=""), NOW, 1)
    assert log.add(Meta(namespace="n", name="other", uid="v"), FAILED, NOW, 1)


def test_an_old_series_is_forgotten() -> None:
    """What happens again after ten minutes is news, in an event of its own."""
    log = EventLog()
    first = log.add(META, FAILED, NOW, 0)
    second = log.add(META, FAILED, NOW + datetime.timedelta(minutes=11), 660)
    assert first
    assert second
    assert second.count == 1
    assert second.name != first.name


def test_the_manifest_names_the_policy() -> None:
    """The event object refers to the policy and is a warning where the reason is."""
    series = EventLog().add(META, FAILED, NOW, 0)
    assert series
    manifest = event_manifest(series, NOW)
    assert manifest["involvedObject"]["uid"] == "u"
    assert manifest["type"] == "Warning"
    assert manifest["lastTimestamp"] == "2026-01-02T00:00:00Z"
    assert manifest["metadata"]["name"].startswith("chat.")
