"""The inputs of a profiling run."""

from dataclasses import replace
from typing import Any

import pytest

from kvserve_api.errors import SpecError
from kvserve_api.names import child_name
from kvserve_api.policy import Policy
from kvserve_api.run import RunInputs
from samples import policy_object


def inputs(text: str | None = None, image: str = "", **spec: Any) -> RunInputs:
    """Return the inputs of a policy's run."""
    policy = Policy.from_object(policy_object(**spec))
    return RunInputs.of_policy(policy, text_digests={"default": text}, image=image)


TASK = {"name": "a", "builtIn": "Retrieval", "maxLossBasisPoints": 500}


def test_round_trip() -> None:
    """Inputs read back equal from their canonical JSON."""
    first = inputs("sha256:00", workloads=[{"name": "code"}], model={"name": "m", "revision": "r"})
    assert RunInputs.parse(first.canonical()) == first
    asked = inputs(quality={"tasks": [TASK, TASK | {"name": "b"}]})
    assert RunInputs.parse(asked.canonical()) == asked
    cut = inputs(
        profiling={"space": {"allow": "Lossless", "exclude": {"stages": ["code.rans.v1"]}}}
    )
    assert RunInputs.parse(cut.canonical()) == cut
    stored = replace(first, artifacts="file:///a")
    assert RunInputs.parse(stored.canonical()) == stored


@pytest.mark.parametrize(
    ("other", "same"),
    [
        pytest.param(inputs(quality={"maxLossBasisPoints": 7}), True, id="budget"),
        pytest.param(inputs(control={"mode": "Off"}), True, id="mode"),
        pytest.param(inputs(model={"name": "other"}), False, id="model"),
        pytest.param(inputs("sha256:00"), False, id="text"),
        pytest.param(inputs(workloads=[{"name": "code"}]), False, id="class"),
        pytest.param(inputs(profiling={"budget": {"maxTrials": 5}}), False, id="trials"),
        pytest.param(inputs(image="profiler:2"), False, id="image"),
        pytest.param(inputs(profiling={"job": {"parallelism": 2}}), False, id="pods"),
        pytest.param(replace(inputs(), drift_runs=1), False, id="drift"),
        pytest.param(inputs(profiling={"space": {"allow": "Lossless"}}), False, id="space"),
        pytest.param(inputs(profiling={"space": {"allow": "Any"}}), True, id="whole-space"),
        pytest.param(replace(inputs(), artifacts="s3://b"), False, id="store"),
        pytest.param(
            inputs(model={"name": "test/model", "source": {"pvc": {"claimName": "c"}}}),
            False,
            id="source",
        ),
    ],
)
def test_digest_says_whether_to_profile_again(other: RunInputs, same: bool) -> None:
    """What decides the result changes the digest; what only decides its use does not."""
    assert (other.digest == inputs().digest) == same


@pytest.mark.parametrize(
    "document",
    [b"", b"{}", b"[1]", b'{"schema":"x"}', inputs().canonical().replace(b"seed", b"sed")],
)
def test_bad_inputs_are_refused(document: bytes) -> None:
    """What is no run's inputs is a typed error."""
    with pytest.raises(SpecError):
        RunInputs.parse(document)


def test_child_names_are_labels() -> None:
    """A child's name is a DNS label, whatever the policy's name, and tells runs apart."""
    digest = "sha256:" + "0123456789" * 6
    assert child_name("chat", "job", digest) == "chat-job-0123456789"
    long = child_name("a" * 46 + "-.bbbb", "pareto", digest)
    assert len(long) <= 63
    assert long.startswith("a" * 45)
    assert long.endswith("a-pareto-0123456789")


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"maxLossBasisPoints": 900}, True),
        ({"maxItems": 65}, False),
        ({"builtIn": "LastWord"}, False),
    ],
)
def test_tasks_are_inputs_and_their_budgets_are_not(change: dict[str, Any], same: bool) -> None:
    """Other items are another run; a run without tasks is the one it always was."""
    asked = inputs(quality={"tasks": [TASK]})
    other = inputs(quality={"tasks": [TASK | change]})
    assert (other.digest == asked.digest) == same
    assert asked.digest != inputs().digest
    assert "tasks" not in inputs().canonical().decode()
