"""The CRD on a real API server: what it accepts, refuses, fills in and explains."""

import copy
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import samples
from kube_api import APPLY, Api
from kvserve_api.errors import PolicyError
from kvserve_api.policy import Policy
from testcluster.cluster import Cluster

ROOT = Path(__file__).parents[2]
FULL: dict[str, Any] = {
    "model": {"name": "m", "revision": "r", "source": {"pvc": {"claimName": "c", "path": "p"}}},
    "transport": "PrefillDecode",
    "slo": {
        "goal": "MinimizeBytes",
        "objectives": [
            {"name": "a", "metric": "KVTransferTime", "thresholdMilliseconds": 5},
            {
                "name": "b",
                "metric": "TimeToFirstToken",
                "thresholdMilliseconds": 9,
                "percentile": 50,
            },
        ],
    },
    "quality": {
        "maxLossBasisPoints": 7,
        "tasks": [
            {"name": "a", "builtIn": "LastWord", "maxLossBasisPoints": 500},
            {"name": "b", "configMapRef": {"name": "t", "key": "k"}, "maxLossBasisPoints": 0},
            {
                "name": "c",
                "pvc": {"claimName": "d", "path": "a/b.jsonl"},
                "maxItems": 200,
                "maxLossBasisPoints": 134,
            },
        ],
    },
    "workloads": [
        {
            "name": "code",
            "slo": {},
            "quality": {"tasks": []},
            "evaluation": {"configMapRef": {"name": "texts", "key": "code"}},
        },
        {"name": "chat", "quality": {"maxLossBasisPoints": 3}},
    ],
    "profiling": {
        "suspend": True,
        "budget": {"maxTrials": 9, "activeDeadlineSeconds": 60},
        "job": {"parallelism": 3, "resources": {"requests": {"cpu": 1, "memory": "2.5Gi"}}},
        "evaluation": {"configMapRef": {"name": "texts", "key": "k"}},
        "onDrift": {"reprofile": False, "minIntervalSeconds": 5},
        "space": {
            "allow": "Uncalibrated",
            "include": {"families": ["minmax"], "names": ["fp8"], "stages": ["code.rans.v1"]},
            "exclude": {"families": ["split"], "names": ["kivi-2"], "stages": ["code.pack.v1"]},
        },
    },
    "control": {
        "mode": "Pinned",
        "pinnedProfile": "int8",
        "exploration": {"maxBasisPoints": 50},
        "failsafe": {"fallbackProfile": "int8", "onControllerLoss": "Revert", "leaseSeconds": 9},
    },
}


def load_reference() -> ModuleType:
    """Import the page's maker, which is no package."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "tests/crds/reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = load_reference()


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param({}, id="least"),
        pytest.param(FULL, id="most"),
        pytest.param({"control": {"mode": "Shadow"}}, id="one-nested"),
        pytest.param({"control": {}, "slo": {}, "quality": {}, "profiling": {}}, id="empty"),
        pytest.param({"profiling": {"budget": {"maxTrials": 4}, "job": {}}}, id="half-a-budget"),
    ],
)
def test_defaults_are_the_same(api: Api, spec: dict[str, Any]) -> None:
    """The API server fills in what `Policy.from_object` takes for what is not there, and nothing else."""
    sent = samples.policy_object("p", namespace=api.namespace, **spec)
    stored = api.create("kvp", sent)
    ours, theirs = Policy.from_object(sent), Policy.from_object(stored)
    assert theirs == ours
    assert stored["spec"]["control"]["failsafe"]["leaseSeconds"] == ours.control.lease_s
    assert stored["spec"]["control"]["exploration"]["maxBasisPoints"] == ours.control.exploration_bp
    assert stored["spec"]["profiling"]["budget"]["maxTrials"] == ours.profiling.max_trials


def test_example_is_accepted(api: Api) -> None:
    """The shipped example is a policy."""
    example = yaml.safe_load((ROOT / "examples/01-chat/policy.yaml").read_text())
    stored = api.create("kvp", example)
    assert Policy.from_object(stored).model.name == example["spec"]["model"]["name"]


OBJECTIVE = {"name": "a", "metric": "KVTransferTime", "thresholdMilliseconds": 5}
OTHER = {"name": "a"}
LOSS = OTHER | {"maxLossBasisPoints": 0}
TASK = OTHER | {"builtIn": "Retrieval", "maxLossBasisPoints": 406}
SELECTOR = {"matchLabels": {"a": "b"}}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("one-target", {"targets": [{"role": "Prefill", "selector": SELECTOR}]}, "one Prefill and one"),
    ("two-prefills", {"targets": [{"role": "Prefill", "selector": SELECTOR}] * 2}, "Duplicate"),
    ("no-targets", {"targets": []}, "spec.targets"),
    ("role", {"targets": [{"role": "KVStore", "selector": SELECTOR}]}, "spec.targets[0].role"),
    (
        "no-labels",
        {"targets": [{"role": "Prefill", "selector": {"matchLabels": {}}}]},
        "spec.targets[0].selector.matchLabels",
    ),
    ("pinned", {"control": {"mode": "Pinned"}}, "pinnedProfile must be set if and only if"),
    ("not-pinned", {"control": {"pinnedProfile": "x"}}, "pinnedProfile must be set if and only if"),
    (
        "objectives",
        {"slo": {"objectives": [OBJECTIVE, OBJECTIVE | {"name": "b"}]}},
        "metric and percentile must be unique",
    ),
    (
        "own-objectives",
        {
            "workloads": [
                {"name": "w", "slo": {"objectives": [OBJECTIVE, OBJECTIVE | {"name": "b"}]}}
            ]
        },
        "metric and percentile must be unique",
    ),
    ("default-class", {"workloads": [{"name": "default"}]}, "the workload class default is"),
    ("same-class", {"workloads": [{"name": "a"}, {"name": "a"}]}, "Duplicate"),
    ("class-name", {"workloads": [{"name": "A"}]}, "spec.workloads[0].name"),
    ("transport", {"transport": "KVStore"}, "spec.transport"),
    ("percentile", {"slo": {"objectives": [OBJECTIVE | {"percentile": 97}]}}, "percentile"),
    ("metric", {"slo": {"objectives": [OBJECTIVE | {"metric": "Speed"}]}}, "metric"),
    ("threshold", {"slo": {"objectives": [OBJECTIVE | {"thresholdMilliseconds": 0}]}}, "threshold"),
    ("goal", {"slo": {"goal": "Best"}}, "spec.slo.goal"),
    ("budget", {"quality": {"maxLossBasisPoints": 10_001}}, "spec.quality.maxLossBasisPoints"),
    ("negative", {"quality": {"maxLossBasisPoints": -1}}, "spec.quality.maxLossBasisPoints"),
    ("fraction", {"quality": {"maxLossBasisPoints": 1.5}}, "spec.quality.maxLossBasisPoints"),
    (
        "no-items",
        {"quality": {"tasks": [{"name": "a", "maxLossBasisPoints": 0}]}},
        "exactly one of",
    ),
    (
        "two-sources",
        {"quality": {"tasks": [TASK | {"configMapRef": {"name": "x"}}]}},
        "exactly one of",
    ),
    (
        "few-items",
        {"quality": {"tasks": [TASK | {"maxLossBasisPoints": 405}]}},
        "can't be shown with so few items",
    ),
    ("same-task", {"quality": {"tasks": [TASK, TASK]}}, "Duplicate"),
    ("other-task", {"quality": {"tasks": [TASK | {"builtIn": "Sums"}]}}, "tasks[0].builtIn"),
    ("task-name", {"quality": {"tasks": [TASK | {"name": "A"}]}}, "tasks[0].name"),
    (
        "way-out",
        {"quality": {"tasks": [OTHER | {"pvc": {"claimName": "c", "path": "a/../b"}}]}},
        "tasks[0].pvc.path",
    ),
    ("no-limit", {"quality": {"tasks": [OTHER | {"builtIn": "LastWord"}]}}, "tasks[0]"),
    ("pods", {"profiling": {"job": {"parallelism": 17}}}, "job.parallelism"),
    ("interval", {"profiling": {"onDrift": {"minIntervalSeconds": 4}}}, "minIntervalSeconds"),
    ("allow", {"profiling": {"space": {"allow": "Some"}}}, "space.allow"),
    ("family", {"profiling": {"space": {"include": {"families": ["x"]}}}}, "include.families[0]"),
    ("no-family", {"profiling": {"space": {"exclude": {"names": [""]}}}}, "exclude.names[0]"),
    (
        "two-families",
        {"profiling": {"space": {"exclude": {"families": ["fp8", "fp8"]}}}},
        "exclude.families",
    ),
    ("no-raw", {"profiling": {"space": {"exclude": {"names": ["none"]}}}}, "space.exclude.names"),
    (
        "no-fallback",
        {
            "profiling": {"space": {"exclude": {"names": ["fp8"]}}},
            "control": {"failsafe": {"fallbackProfile": "fp8"}},
        },
        "space.exclude.names",
    ),
    ("trials", {"profiling": {"budget": {"maxTrials": 3}}}, "spec.profiling.budget.maxTrials"),
    ("deadline", {"profiling": {"budget": {"activeDeadlineSeconds": 59}}}, "activeDeadlineSeconds"),
    ("lease", {"control": {"failsafe": {"leaseSeconds": 4}}}, "leaseSeconds"),
    ("explore", {"control": {"exploration": {"maxBasisPoints": 5001}}}, "maxBasisPoints"),
    ("mode", {"control": {"mode": "Auto"}}, "spec.control.mode"),
    ("no-model", {"model": {"name": ""}}, "spec.model.name"),
    ("no-claim", {"model": {"name": "m", "source": {}}}, "spec.model.source.pvc"),
    ("long", {"model": {"name": "m" * 513}}, "spec.model.name"),
    ("many", {"workloads": [{"name": f"w{n}"} for n in range(17)]}, "spec.workloads"),
]


def refusal(api: Api, value: Mapping[str, Any]) -> str:
    """Return what the API server says against an object."""
    params = {"fieldValidation": "Strict", "dryRun": "All"}
    response = api.request("POST", "kvp", json=value, params=params)
    assert response.status_code in (400, 422), response.text
    message: str = response.json()["message"]
    return message


@pytest.mark.parametrize(("spec", "part"), [pytest.param(*bad[1:], id=bad[0]) for bad in BAD])
def test_bad_objects_are_refused(api: Api, spec: dict[str, Any], part: str) -> None:
    """The API server refuses with the field or the rule's message, and so does `Policy.from_object`."""
    value = samples.policy_object("p", namespace=api.namespace, **spec)
    assert part in refusal(api, value)
    with pytest.raises(PolicyError):
        Policy.from_object(value)


@pytest.mark.parametrize(
    ("quantity", "good"),
    [("500m", True), (2, True), ("1.5Gi", True), ("2 Gi", False), ("-1", False), ("lots", False)],
)
def test_quantities(api: Api, quantity: object, good: bool) -> None:
    """Resources are quantities as Kubernetes writes them."""
    resources = {"limits": {"memory": quantity}}
    spec = {"profiling": {"job": {"resources": resources}}}
    value = samples.policy_object("p", namespace=api.namespace, **spec)
    if good:
        assert api.request("POST", "kvp", json=value, params={"dryRun": "All"}).status_code == 201
    else:
        assert "resources.limits.memory" in refusal(api, value)


def test_unknown_fields_are_refused(api: Api) -> None:
    """A typo is an error under strict validation, which kubectl asks for."""
    value = samples.policy_object("p", namespace=api.namespace, qualty={"maxLossBasisPoints": 1})
    assert "qualty" in refusal(api, value)


def test_a_long_name_is_refused(api: Api) -> None:
    """Names leave room for what children append."""
    assert "metadata.name" in refusal(api, samples.policy_object("p" * 53, namespace=api.namespace))


def test_the_model_name_is_immutable(api: Api) -> None:
    """Another model needs another policy; its revision may change."""
    api.policy("p")
    response = api.request(
        "PATCH",
        "kvp",
        "p",
        content_type="application/merge-patch+json",
        json={"spec": {"model": {"name": "other"}}},
    )
    assert response.status_code == 422
    assert "create another KVServePolicy for another model" in response.json()["message"]
    assert (
        api.patch("kvp", "p", {"spec": {"model": {"revision": "v2"}}})["metadata"]["generation"]
        == 2
    )


def test_status_has_two_writers(api: Api) -> None:
    """Operator and controller apply their parts of conditions and targets without undoing the other's."""
    api.policy("p")
    mine = condition("Accepted")
    apply_status(
        api,
        "kvserve-operator",
        {"conditions": [mine], "targets": [{"role": "Prefill", "desired": 2}]},
    )
    apply_status(
        api,
        "kvserve-controller",
        {
            "conditions": [condition("Programmed")],
            "targets": [{"role": "Prefill", "synced": 1}],
            "activeProfile": {"name": "int8", "version": "1700000000.3", "lossBasisPoints": 4},
            "history": [{"time": "2026-01-01T00:00:00Z", "to": "int8", "reason": "Started"}],
            "objectives": [{"name": "a", "observedMilliseconds": 3, "met": True}],
        },
    )
    status = (api.get("kvp", "p") or {})["status"]
    assert {c["type"] for c in status["conditions"]} == {"Accepted", "Programmed"}
    assert status["targets"] == [{"role": "Prefill", "desired": 2, "synced": 1}]
    assert status["activeProfile"]["version"] == "1700000000.3"
    apply_status(api, "kvserve-operator", {"conditions": [mine]})
    status = (api.get("kvp", "p") or {})["status"]
    assert status["targets"] == [{"role": "Prefill", "synced": 1}]
    assert "generation" not in status


def condition(kind: str) -> dict[str, Any]:
    """Return a condition that is True."""
    return {
        "type": kind,
        "status": "True",
        "reason": "Because",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }


def apply_status(api: Api, manager: str, status: dict[str, Any]) -> None:
    """Apply a part of the status of the policy ``p``."""
    value = {
        "apiVersion": "kvserve.io/v1alpha1",
        "kind": "KVServePolicy",
        "metadata": {"name": "p"},
        "status": status,
    }
    params = {"fieldManager": manager}
    response = api.request(
        "PATCH", "kvp", "p/status", content_type=APPLY, params=params, json=value
    )
    assert response.status_code == 200, response.text


def test_columns(api: Api, control_plane: Cluster) -> None:
    """``kubectl get kvp`` shows in one line what matters, progress included."""
    api.policy("p")
    apply_status(
        api,
        "kvserve-operator",
        {
            "conditions": [condition("Ready")],
            "profiling": {"progress": "37/64"},
            "synced": "2/2",
        },
    )
    apply_status(
        api,
        "kvserve-controller",
        {"activeProfile": {"name": "int8", "compressionRatio": "1.9x"}},
    )
    head, row = control_plane.kubectl("get", "kvp", "-n", api.namespace).splitlines()
    assert head.split() == [
        "NAME",
        "MODEL",
        "MODE",
        "READY",
        "REASON",
        "PROFILE",
        "SYNCED",
        "PROGRESS",
        "AGE",
    ]
    assert row.split()[:-1] == f"p {samples.MODEL} Active True Because int8 2/2 37/64".split()
    wide = control_plane.kubectl("get", "kvp", "-n", api.namespace, "-o", "wide")
    assert "1.9x" in wide
    selected = control_plane.kubectl(
        "get", "kvp", "-n", api.namespace, "--field-selector", "spec.control.mode=Off", "-o", "name"
    )
    assert selected == ""


def test_explain_teaches(control_plane: Cluster, served: str) -> None:
    """``kubectl explain`` tells unit, default and effect of a field."""
    text = " ".join(control_plane.kubectl("explain", "kvp.spec.quality.maxLossBasisPoints").split())
    assert "basis points (hundredths of a percent) of expected perplexity growth" in text
    assert "needs no new profiling run" in text


def walk(
    value: Mapping[str, Any], path: str, visit: Callable[[str, Mapping[str, Any]], None]
) -> None:
    """Visit a schema and all below it."""
    visit(path, value)
    for name, child in value.get("properties", {}).items():
        walk(child, f"{path}.{name}", visit)
    for key in ("items", "additionalProperties"):
        if isinstance(value.get(key), Mapping):
            walk(value[key], f"{path}[]", visit)


def test_every_field_is_described_and_bounded() -> None:
    """Each field has a description that is a sentence; each string, list, map and number of the spec has its limits."""
    problems: list[str] = []

    def visit(path: str, value: Mapping[str, Any]) -> None:
        if path == ".metadata":
            return
        text = value.get("description", "")
        if not text.endswith(".") or len(text) < 8:
            problems.append(f"{path}: description")
        kind = value.get("type")
        bounded = {
            "string": "enum" in value or "maxLength" in value or value.get("format") == "date-time",
            "array": "maxItems" in value,
            "integer": "enum" in value or "minimum" in value,
            "object": "properties" in value or "maxProperties" in value,
        }
        if kind in bounded and not bounded[kind] and path not in (".apiVersion", ".kind"):
            problems.append(f"{path}: bound")

    walk(REFERENCE.schema(), "", visit)
    assert problems == []


def test_the_reference_is_current() -> None:
    """The page is what the CRD makes of it; run ``python tests/crds/reference.py`` after a change."""
    assert REFERENCE.PAGE.read_text() == REFERENCE.render()


def test_python_reads_every_field_of_the_spec() -> None:
    """`Policy.from_object` knows each field that the CRD has: a policy with all of them is read without complaint."""
    paths = {
        path
        for path, value, _ in REFERENCE.fields(REFERENCE.schema()["properties"]["spec"])
        if "properties" not in value and "items" not in value and not path.endswith("*")
    }
    full = samples.policy_object("p", **copy.deepcopy(FULL))
    Policy.from_object(full)
    given: set[str] = set()
    _collect(full["spec"], "", given)
    open_maps = ("matchLabels", "requests", "limits")
    missing = {p for p in paths - given if not p.endswith(open_maps)}
    # what the list of classes can have as well is the same schema as the policy's own
    repeated = ("workloads[].slo", "workloads[].quality.tasks")
    assert {p for p in missing if not p.startswith(repeated)} == set()


def _collect(value: Any, path: str, into: set[str]) -> None:
    if isinstance(value, Mapping):
        for key, child in value.items():
            _collect(child, f"{path}.{key}" if path else key, into)
    elif isinstance(value, list):
        for child in value:
            _collect(child, f"{path}[]", into)
    else:
        into.add(path)
