"""The page for operators says what the code does."""

import re
from pathlib import Path
from typing import Any

import httpx

from kube_api import Api
from kvserve_operator.reasons import CATALOGUE
from operator_process import documented_rules, grant
from testcluster.cluster import Cluster

PAGE = (Path(__file__).parents[2] / "docs/operations.md").read_text()


def test_each_reason_has_a_section() -> None:
    """The sections below *Reasons* are the catalogue, in its order, and each says what the reason means."""
    body = PAGE.split("\n## Reasons\n")[1].split("\n## ")[0]
    sections = re.findall(r"^### (\w+)\n\n\*(.+?)\*", body, flags=re.MULTILINE)
    assert [name for name, _ in sections] == [reason.name for reason in CATALOGUE]
    assert [name.lower() for name, _ in sections] == [reason.anchor for reason in CATALOGUE]


def test_reasons_are_unique_words() -> None:
    """A reason is one CamelCase word and there is one of each."""
    names = [reason.name for reason in CATALOGUE]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Z][A-Za-z]+", name) for name in names)


def test_the_account_may_do_no_more(alone: Api, control_plane: Cluster, proxy: str) -> None:
    """Bound to the documented rules, the account may do these and what every account may, says the API server."""
    user = grant(control_plane, alone.namespace)
    review = httpx.post(
        f"{proxy}/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
        headers={"Impersonate-User": user},
        json={
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectRulesReview",
            "spec": {"namespace": alone.namespace},
        },
        trust_env=False,
    )
    allowed = flat(review.json()["status"]["resourceRules"])
    everybody = {rule for rule in allowed if rule[1].startswith("selfsubject")}
    served, own = documented_rules()
    assert allowed - everybody == flat(served + own)
    resources = {resource for _, resource, _ in flat(served + own)}
    assert not resources & {"secrets", "pods/exec", "namespaces", "customresourcedefinitions"}


def flat(rules: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    """Return rules as triples of group, resource and verb."""
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule.get("apiGroups", [])
        for resource in rule.get("resources", [])
        for verb in rule["verbs"]
    }
