"""The whole loop on a real node: what `make demo` does, and what must hold around it.

One run of the demo's steps serves all tests here; they look at what it left and then break things, in this order.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from demo import chat
from demo.forward import forward
from demo.job import NAMESPACE, POLICY, SYSTEM, Job, Settings
from demo.load import Answer, ask
from kvserve_api import telemetry
from kvserve_api.names import LABEL_POLICY
from kvserve_api.profile_set import ParetoSet
from otlp_receiver import Receiver, Span
from testcluster.cluster import Cluster, existing_cluster
from testcluster.errors import UnavailableHereError

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = 5
KINDS = "jobs,configmaps,serviceaccounts,roles,rolebindings,pods"


def _object(kind: str, name: str, **parts: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, **parts}


ITEMS = _object(
    "ConfigMap",
    "items",
    data={
        "items.jsonl": "\n".join(
            json.dumps(
                {"task": "multiple-choice", "question": asked, "choices": words, "answer": 0}
            )
            for asked, words in (
                ("The capital of France is", ["Paris", "bread"]),
                ("Water is made of hydrogen and", ["oxygen", "letters"]),
                ("The opposite of hot is", ["cold", "table"]),
                ("Two and two make", ["four", "river"]),
            )
        )
    },
)

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(900)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """A cluster on which the demo has run, and what it reported."""

    cluster: Cluster
    report: dict[str, Any]
    receiver: Receiver

    def policy(self) -> dict[str, Any]:
        """Return the policy as it is now."""
        text = self.cluster.kubectl("get", "kvp", POLICY, "-n", NAMESPACE, "-o", "json")
        policy: dict[str, Any] = json.loads(text)
        return policy

    def children(self) -> list[str]:
        """Return the names of all objects that carry the policy's label."""
        selector = f"{LABEL_POLICY}={POLICY}"
        names = self.cluster.kubectl("get", KINDS, "-n", NAMESPACE, "-l", selector, "-o", "name")
        return sorted(names.split())


@pytest.fixture(scope="module")
def loop(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    """The demo's steps, run once."""
    if existing_cluster() is not None:
        pytest.skip(
            "runs pods from this machine's environment, which an existing cluster can't see"
        )
    try:
        host_ip = cluster.own.host_ip
    except UnavailableHereError as error:
        pytest.skip(str(error))
    policy = yaml.safe_load((ROOT / chat.EXAMPLE / "policy.yaml").read_text())
    task = {"name": "facts", "configMapRef": {"name": "items"}, "maxLossBasisPoints": 9000}
    # wide enough for a profile that is far smaller and slower than others: then links of two rates want two
    policy["spec"]["quality"] |= {"tasks": [task], "maxLossBasisPoints": 600}
    file = tmp_path_factory.mktemp("policy") / "policy.yaml"
    file.write_text(yaml.safe_dump(policy))
    with Receiver(host_ip) as receiver:
        settings = Settings(
            root=ROOT,
            out=tmp_path_factory.mktemp("demo"),
            fast_mbit=1000,
            slow_mbit=50,
            max_tokens=8,
            otlp_endpoint=receiver.endpoint,
            prompts=PROMPTS,
            # enough to believe in a twentieth, whichever profile was used before
            slowed_rounds=3,
            policy=file,
        )
        chat.apply(cluster, [_object("Namespace", NAMESPACE), ITEMS], NAMESPACE)
        model = chat.convert_model(ROOT)
        artifacts = tmp_path_factory.mktemp("artifacts")
        chat.apply(cluster, chat.volumes(model, artifacts, NAMESPACE), NAMESPACE)
        with Path(os.devnull).open("w") as nowhere:
            report = Job(settings, Console(file=nowhere)).run_on(cluster, shaped=True)
        # for who looks into a failure
        (settings.out / "report.json").write_text(json.dumps(report, indent=2))
        yield Loop(cluster=cluster, report=report, receiver=receiver)
        with contextlib.suppress(Exception):
            cluster.helm("uninstall", "kvserve", "-n", SYSTEM)


def test_the_profile_follows_the_bandwidth(loop: Loop) -> None:
    """Raw requests move every byte; under KVServe fewer, and a slow link gets a stronger profile than a fast one."""
    ratios = {row["profile"]: row["ratio"] for row in loop.report["pareto"]}
    slow_raw, raw, *ours = loop.report["phases"]
    for phase in (slow_raw, raw):
        assert phase["profiles"] == {"none": PROMPTS}
        assert phase["bytes_raw"] <= phase["bytes_wire"] < 1.01 * phase["bytes_raw"]
    fast, slow, again, _ = ours
    for phase in (fast, slow, again):
        assert sum(phase["profiles"].values()) == PROMPTS
        assert phase["bytes_raw"] == raw["bytes_raw"]
        assert phase["bytes_wire"] < phase["bytes_raw"]
    strongest = max(slow["profiles"], key=lambda name: ratios[name])
    # after a rise the first transfers still go by the slow link, so that one of the two fast phases may see no other
    weaker = {name for phase in (fast, again) for name in phase["profiles"]}
    assert ratios[strongest] > min(ratios[name] for name in weaker)
    assert slow["why"]["profile"] == strongest
    started, *switches = loop.report["profile_switches"]
    assert started["reason"] == "Started"
    assert switches
    assert all(switch["from"] != switch["to"] for switch in switches)


def test_the_profile_follows_a_slowed_coder(loop: Loop) -> None:
    """Encoding threads with a twentieth of a processor lead to a profile that codes less, and the decision says why."""
    again, slowed = loop.report["phases"][-2:]
    assert slowed["coder_share"] == 0.05
    before, after = (
        {each["name"]: each for each in phase["why"]["candidates"]} for phase in (again, slowed)
    )
    used, chosen = again["why"]["profile"], slowed["why"]["profile"]
    assert chosen != used
    # the last decision may be of what is left of a transfer, so seconds alone say nothing
    earlier_s, later_s = (
        seen[used]["encode_s"] / phase["why"]["native_bytes"]
        for seen, phase in ((before, again), (after, slowed))
    )
    assert later_s > 3 * earlier_s
    assert after[chosen]["encode_s"] < after[used]["encode_s"]
    assert after[chosen]["total_s"] < after[used]["total_s"]


def test_a_calibrated_profile_crosses_the_slow_link(loop: Loop) -> None:
    """The Job calibrates, both pods fetch the bundle, and the slow link gets it; the text stays mostly the same."""
    calibrated = {row["profile"] for row in loop.report["pareto"] if row["calibrated"]}
    assert calibrated
    slow = loop.report["phases"][3]
    assert slow["bandwidth_mbit"] == 50
    assert calibrated & set(slow["profiles"])
    assert loop.report["best_ratio"] > loop.report["best_ratio_uncalibrated"]
    assert loop.report["text_agreement"] > 0.5


def test_the_profiles_answered_the_policys_task(loop: Loop) -> None:
    """The Job read the items from the ConfigMap, and each lossy profile of the set has a score of all of them."""
    name = loop.policy()["status"]["pareto"]["configMapRef"]["name"]
    text = loop.cluster.kubectl("get", "configmap", name, "-n", NAMESPACE, "-o", "json")
    pareto = ParetoSet.parse(json.loads(text)["data"]["pareto.json"].encode())
    lossy = [profile for profile in pareto.profiles("default") if not profile.lossless]
    assert lossy
    assert {profile.tasks["facts"].items for profile in lossy} == {4}
    assert pareto.provenance["windows"] == {"default": "held out"}


def test_every_profile_in_use_is_within_the_budget(loop: Loop) -> None:
    """The upper confidence limit of each profile that was used is below the policy's budget."""
    budget = loop.policy()["spec"]["quality"]["maxLossBasisPoints"]
    upper = {row["profile"]: row["loss_bp_upper"] for row in loop.report["pareto"]}
    used = {name for phase in loop.report["phases"] for name in phase["profiles"]}
    assert {name: upper[name] for name in used if upper[name] > budget} == {}


def test_kubectl_get_tells_the_story(loop: Loop) -> None:
    """One line says whether it works, which profile, on how many pods and how far profiling is."""
    header, row, *_ = loop.cluster.kubectl("get", "kvp", "-n", NAMESPACE).splitlines()
    columns = header.split()
    assert columns[0] == "NAME"
    assert {"MODE", "READY", "PROFILE", "SYNCED", "PROGRESS"} <= set(columns)
    values = dict(zip(columns, row.split(), strict=False))
    assert (values["NAME"], values["READY"], values["SYNCED"]) == ("chat", "True", "2/2")
    done, _, total = values["PROGRESS"].partition("/")
    assert done == total


def test_one_trace_goes_from_prefill_to_decode(loop: Loop) -> None:
    """A request's prefill, encode, wire and decode are spans of one trace, from both pods."""
    wanted = {
        telemetry.SPAN_PREFILL,
        telemetry.SPAN_ENCODE,
        telemetry.SPAN_WIRE,
        telemetry.SPAN_DECODE,
    }

    def complete() -> list[list[Span]]:
        traces: dict[str, list[Span]] = {}
        for span in loop.receiver.spans:
            traces.setdefault(span.trace_id, []).append(span)
        return [spans for spans in traces.values() if wanted <= {span.name for span in spans}]

    assert loop.receiver.wait_for(lambda: len(complete()) >= 3, timeout_s=30.0)
    services = {span.service for span in complete()[0] if span.name in wanted}
    assert services == {"chat-prefill", "chat-decode"}


def test_every_part_sends_its_metrics(loop: Loop) -> None:
    """Operator, controller and both pods report, under the names and units of the api package."""
    wanted = {
        telemetry.TRANSFER_WIRE_BYTES,
        telemetry.SELECTIONS,
        telemetry.CONTROLLER_PUSHES,
        telemetry.RECONCILES,
    }

    def missing() -> set[tuple[str, str]]:
        seen = {(point.name, point.unit) for point in loop.receiver.points}
        return {(instrument.name, instrument.unit) for instrument in wanted} - seen

    loop.receiver.wait_for(lambda: not missing(), timeout_s=75.0)
    assert missing() == set()


def test_a_killed_controller_loses_no_request(loop: Loop) -> None:
    """Requests that run while the controller is killed and comes back are all answered, and both pods sync again."""
    answers: list[Answer | Exception] = []

    def client(router: str) -> None:
        for number in range(4):
            try:
                answers.append(ask(router, chat.MODEL, str(number), "word " * 200, max_tokens=4))
            except Exception as error:
                answers.append(error)

    with forward(loop.cluster, "service/chat-router", 8000, namespace=NAMESPACE) as router:
        thread = threading.Thread(target=client, args=(router,))
        thread.start()
        time.sleep(0.5)
        loop.cluster.kubectl(
            "delete", "pod", "-n", SYSTEM, "-l", "app.kubernetes.io/component=controller",
            "--grace-period=0", "--force",
        )  # fmt: skip
        thread.join(timeout=120)
    assert [type(answer) for answer in answers] == [Answer] * 4
    before = loop.policy()["status"]["activeProfile"]["version"]
    deadline_s = time.monotonic() + 60.0
    while time.monotonic() < deadline_s:
        status = loop.policy()["status"]
        if status["synced"] == "2/2" and status["activeProfile"]["version"] != before:
            break
        time.sleep(0.5)
    epoch = [
        int(version.partition(".")[0]) for version in (before, status["activeProfile"]["version"])
    ]
    assert status["synced"] == "2/2"
    assert epoch[1] >= epoch[0]


def test_a_killed_operator_starts_no_second_run(loop: Loop) -> None:
    """After the operator was killed and is back, its policy has the same children and the same conditions."""

    def conditions() -> list[dict[str, Any]]:
        theirs = ("Programmed", "ObjectivesMet", "ProfilesAccurate")  # the controller's
        found = loop.policy()["status"]["conditions"]
        # that transfers drifted from the profiles may be added meanwhile: the demo slowed the coder
        return [
            condition | {"message": condition["message"].partition("; transfers drifted")[0]}
            for condition in found
            if condition["type"] not in theirs
        ]

    before, conditions_before = loop.children(), conditions()
    loop.cluster.kubectl(
        "delete", "pod", "-n", SYSTEM, "-l", "app.kubernetes.io/component=operator",
        "--grace-period=0", "--force",
    )  # fmt: skip
    loop.cluster.kubectl(
        "rollout", "status", "-n", SYSTEM, "deployment/kvserve-operator", "--timeout=60s",
        timeout_s=90.0,
    )  # fmt: skip
    time.sleep(5.0)
    assert loop.children() == before
    assert conditions() == conditions_before


def test_helm_test_passes(loop: Loop) -> None:
    """The chart's own test finds CRD and controller."""
    out = loop.cluster.helm("test", "kvserve", "-n", SYSTEM, "--timeout", "90s")
    assert "Succeeded" in out


def test_deleting_the_policy_leaves_nothing(loop: Loop) -> None:
    """`kubectl delete kvp` removes every child, and the pods go back to raw."""
    assert loop.children()
    loop.cluster.kubectl("delete", "kvp", POLICY, "-n", NAMESPACE, "--wait=true")
    deadline_s = time.monotonic() + 60.0
    while loop.children() and time.monotonic() < deadline_s:
        time.sleep(0.5)
    assert loop.children() == []
