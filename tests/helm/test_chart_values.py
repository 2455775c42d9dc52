"""The chart's values: documented once, checked strictly."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from testcluster.cluster import Cluster
from testcluster.errors import ClusterError

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]


def leaves(schema: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    """Yield path and schema of each value that a user sets; groups of them are closed objects."""
    for key, child in schema["properties"].items():
        if child.get("additionalProperties") is False and key not in (
            "affinity",
            "servingNamespaceSelector",
        ):
            yield from leaves(child, f"{path}{key}.")
        elif key != "global":
            yield f"{path}{key}", child


def defaults(values: Json, paths: list[str]) -> dict[str, Any]:
    """Return the default at each path."""
    found = {}
    for path in paths:
        value: Any = values
        for key in path.split("."):
            value = value[key]
        found[path] = value
    return found


def comments(text: str) -> dict[str, str]:
    """Return the comment above each key of values.yaml."""
    found: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    above: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            above.append(stripped.removeprefix("#").strip())
            continue
        match = re.match(r"( *)([A-Za-z]+):", line)
        if match:
            depth = len(match[1])
            stack = [*(item for item in stack if item[0] < depth), (depth, match[2])]
            found[".".join(key for _, key in stack)] = " ".join(above)
        above = []
    return found


@pytest.fixture(scope="module")
def schema(chart: Path) -> Json:
    """The schema of the values."""
    document: Json = json.loads((chart / "values.schema.json").read_text())
    return document


@pytest.fixture(scope="module")
def values(chart: Path) -> Json:
    """The default values."""
    document: Json = yaml.safe_load((chart / "values.yaml").read_text())
    return document


def test_every_value_is_in_schema_and_defaults(schema: Json, values: Json) -> None:
    """values.yaml holds a default for every value of the schema, and nothing else."""

    def paths(node: Any, known: set[str], prefix: str = "") -> set[str]:
        found: set[str] = set()
        for key, value in node.items():
            path = f"{prefix}{key}"
            is_group = isinstance(value, dict) and path not in known
            found |= paths(value, known, f"{path}.") if is_group else {path}
        return found

    known = {path for path, _ in leaves(schema)}
    assert paths(values, known) == known


def test_comments_say_what_the_schema_says(schema: Json, chart: Path) -> None:
    """The comment above each value is the schema's description of it."""
    above = comments((chart / "values.yaml").read_text())
    for path, leaf in leaves(schema):
        assert above[path] == leaf["description"], path


def test_docs_list_every_value(schema: Json, values: Json) -> None:
    """The table in docs/install.md has each value with its default and description, in order."""
    paths = [path for path, _ in leaves(schema)]
    found = defaults(values, paths)
    rows = [
        f"| `{path}` | `{json.dumps(found[path], ensure_ascii=False)}` | {leaf['description']} |"
        for path, leaf in leaves(schema)
    ]
    text = (ROOT / "docs" / "install.md").read_text()
    table = re.findall(r"^\| `[A-Za-z.]+` \|.*$", text, re.MULTILINE)
    assert table == rows


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        pytest.param("operator.imag.tag=1", "imag", id="typo in a group"),
        pytest.param("operators.replicas=1", "operators", id="typo of a group"),
        pytest.param("operator.replicas=0", "replicas", id="below the minimum"),
        pytest.param("operator.replicas=many", "replicas", id="wrong type"),
        pytest.param("controller.replicas=2", "replicas", id="controller has no replicas"),
        pytest.param("controller.image.pullPolicy=Sometimes", "pullPolicy", id="unknown policy"),
        pytest.param("controller.image.repository=a:b", "repository", id="tag in repository"),
        pytest.param("controller.priorMegabitsPerSecond=0", "priorMegabits", id="zero bandwidth"),
        pytest.param("otel.endpoint=collector:4318", "endpoint", id="endpoint without scheme"),
        pytest.param("watchNamespaces={a,b}", "watchNamespaces", id="two namespaces"),
        pytest.param("watchNamespaces[0]=Team_A", "watchNamespaces", id="no DNS label"),
        pytest.param("operator.resources.request.cpu=1", "request", id="typo in resources"),
        pytest.param("operator.extraEnv[0].nam=A", "extraEnv", id="typo in a list"),
        pytest.param("operator.extraEnv[0].name=POD_NAME", "extraEnv", id="variable of ours"),
        pytest.param("operator.extraVolumes[0].name=tmp", "extraVolumes", id="name of ours"),
        pytest.param("artifacts.url=/artifacts", "url", id="folder without scheme"),
        pytest.param("artifacts.url=file://artifacts", "url", id="folder as a host"),
        pytest.param("artifacts.url=file:///", "url", id="root as a store"),
        pytest.param("artifacts.secret=A_B", "secret", id="no name of a secret"),
        pytest.param("security.secretName=A_B", "secretName", id="no name of a shared secret"),
        pytest.param("security.clientCertificates=1", "clientCertificates", id="number for yes"),
        pytest.param("crds.keep=maybe", "keep", id="no boolean"),
        pytest.param("fullnameOverride=Big", "fullnameOverride", id="capital letter"),
    ],
)
def test_wrong_values_are_rejected(
    control_plane: Cluster, chart: Path, setting: str, named: str
) -> None:
    """A typo or a value out of range stops Helm with the path of it."""
    with pytest.raises(ClusterError, match="don't meet the specifications") as caught:
        control_plane.helm("template", "kvserve", str(chart), "--set", setting)
    assert named in str(caught.value)


def test_values_of_parents_are_accepted(control_plane: Cluster, chart: Path) -> None:
    """Helm's own `global` values, which every chart below another one gets, are no typo."""
    text = control_plane.helm("template", "kvserve", str(chart), "--set", "global.region=x")
    assert "kind: Deployment" in text
