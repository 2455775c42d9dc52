"""Recent transfers, and the profile in use."""

from collections import Counter
from typing import Any

import pytest

from kvserve_api.policy import Metric
from kvserve_api.table import Version
from kvserve_controller.activity import MAX_SWITCHES, Activity, Cause
from kvserve_controller.report import Report
from kvserve_controller.window import MAX_TRANSFERS, WINDOW_S, Window
from podclient import transfer_report

ALL = frozenset({"none", "int4", "int8"})
V1 = Version(epoch=1, counter=1)


def report(profile: str = "int4", **fields: Any) -> Report:
    """Return a report."""
    return Report.read(transfer_report(profile, **fields))


def test_percentiles() -> None:
    """Percentiles are by nearest rank, of the class and metric asked for, within the window."""
    window = Window(["default", "code"])
    for n in range(1, 101):
        window.add(report(total_s=n / 1000, model_s=1.0), now_s=1000.0)
    window.add(report(workload="code", total_s=9.0), now_s=1000.0)
    kv, first = Metric.KV_TRANSFER_TIME, Metric.TIME_TO_FIRST_TOKEN
    assert window.percentile_s("default", kv, 95, 1000.0) == 0.095
    assert window.percentile_s("default", kv, 50, 1000.0) == 0.050
    assert window.percentile_s("default", first, 99, 1000.0) == pytest.approx(1.099)
    assert window.percentile_s("default", None, 50, 1000.0) == 1.0
    assert window.percentile_s("code", kv, 50, 1000.0) == 9.0
    assert window.percentile_s("default", kv, 50, 1000.0 + WINDOW_S) is None


def test_window_is_bounded() -> None:
    """However many transfers are reported, so many are kept."""
    window = Window(["default"])
    for n in range(MAX_TRANSFERS + 100):
        window.add(report(workload=f"w{n % 7}"), now_s=1.0)
    assert window.usage(1.0).total() == MAX_TRANSFERS


def test_usage_is_recent() -> None:
    """In dense traffic the last seconds count, in thin traffic the last five transfers."""
    window = Window(["default"])
    for n in range(100):
        window.add(report("int4" if n < 95 else "int8"), now_s=float(n))
    assert window.usage(99.0) == Counter(int4=5, int8=5)
    assert window.usage(200.0) == Counter(int8=5)
    assert window.usage(99.0 + WINDOW_S) == Counter()


def update(activity: Activity, usage: dict[str, int], **changes: Any) -> None:
    """Tell an activity what was used."""
    arguments: dict[str, Any] = {
        "possible": ALL,
        "predicted": "int4",
        "goodput_bytes_per_s": 125e6,
        "version": V1,
        "settled": True,
        "wall_s": 0.0,
    }
    activity.update(Counter(usage), **(arguments | changes))


def test_prediction_until_there_is_traffic() -> None:
    """The first profile is the predicted one; without traffic it is not doubted."""
    activity = Activity()
    update(activity, {})
    update(activity, {}, predicted="int8")
    assert [(s.before, s.after, s.cause) for s in activity.history] == [("", "int4", Cause.STARTED)]
    assert activity.history[0].time == "1970-01-01T00:00:00Z"


def test_majority_takes_over() -> None:
    """Another profile takes over when more than half of the transfers use it, not before."""
    activity = Activity()
    update(activity, {})
    update(activity, {"int4": 2, "int8": 2})
    assert activity.profile == "int4"
    update(activity, {"int4": 1, "int8": 2})
    assert activity.profile == "int8"


@pytest.mark.parametrize(
    ("cause", "goodput", "expected"),
    [
        (None, 125e6, Cause.TRAFFIC),
        (None, 6e6, Cause.LINK_SLOWER),
        (None, 300e6, Cause.LINK_FASTER),
        (Cause.LEARNED, 125e6, Cause.LEARNED),
        (Cause.LEARNED, 6e6, Cause.LINK_SLOWER),
        (Cause.POLICY, 6e6, Cause.POLICY),
    ],
)
def test_switch_is_explained(cause: Cause | None, goodput: float, expected: Cause) -> None:
    """What a person changed explains a switch, else the link, else what was learned, else the traffic."""
    activity = Activity()
    update(activity, {})
    for _ in range(10):
        activity.observe_goodput(125e6)
    if cause is not None:
        activity.compiled(cause)
    update(activity, {"int8": 5}, goodput_bytes_per_s=goodput, settled=False)
    assert activity.history[0].cause is expected


def test_settled_cause_explains_nothing_later() -> None:
    """A table that changed nothing doesn't explain a switch long after it."""
    activity = Activity()
    update(activity, {})
    activity.compiled(Cause.POLICY)
    update(activity, {"int4": 5}, settled=True)
    activity.observe_goodput(125e6)
    update(activity, {"int8": 5}, settled=True)
    assert activity.history[0].cause is Cause.TRAFFIC


def test_impossible_profile_is_left_at_once() -> None:
    """What the table in force can't lead to is not in use, whatever old transfers used."""
    activity = Activity()
    update(activity, {})
    activity.compiled(Cause.POLICY)
    update(activity, {"int4": 5}, possible=frozenset({"int8"}), predicted="int8")
    assert (activity.profile, activity.history[0].cause) == ("int8", Cause.POLICY)


def test_history_is_bounded_and_survives() -> None:
    """The ten latest switches are kept, newest first, and taken up from a published status."""
    activity = Activity()
    for n in range(30):
        update(activity, {"int4" if n % 2 else "int8": 5}, wall_s=float(n))
    assert len(activity.history) == MAX_SWITCHES
    assert activity.history[0].time == "1970-01-01T00:00:29Z"
    published = {"history": [switch.to_json() for switch in activity.history]}
    again = Activity.restore(published)
    assert again.history == activity.history
    update(again, {}, predicted="int8")
    assert again.history == activity.history


@pytest.mark.parametrize("status", [None, {"history": 3}, {"history": [{"to": 1}]}, {}])
def test_unreadable_history_is_dropped(status: Any) -> None:
    """A status nobody can read starts a new history."""
    assert Activity.restore(status).history == ()
