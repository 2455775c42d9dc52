"""What the chart renders, for several sets of values, by Helm itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvserve_operator.config import ArtifactsConfig, ProfilerConfig, load
from testcluster.cluster import Cluster

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]
Render = Callable[..., list[Json]]

EXTRA: dict[str, list[Json]] = {
    "extraEnv": [{"name": "A", "value": "b"}],
    "extraVolumes": [{"name": "host", "hostPath": {"path": "/usr"}}],
    "extraVolumeMounts": [{"name": "host", "mountPath": "/usr", "readOnly": True}],
}
PLACED = {
    "nodeSelector": {"pool": "system"},
    "tolerations": [{"key": "system", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "priorityClassName": "high",
}
FULL: Json = {
    "fullnameOverride": "kvs",
    "watchNamespaces": ["team-a"],
    "imagePullSecrets": [{"name": "pull"}],
    "crds": {"install": False},
    "rbac": {"aggregateRoles": False},
    "operator": {
        "replicas": 2,
        "image": {"repository": "example:5000/kvs/op", "tag": "v9", "pullPolicy": "Always"},
        "command": ["/venv/bin/kvserve", "operator"],
        **EXTRA,
        **PLACED,
    },
    "controller": {
        "command": ["/venv/bin/kvserve", "controller"],
        "priorMegabitsPerSecond": 5000,
        **EXTRA,
        **PLACED,
    },
    "profiler": {
        "image": {"repository": "example:5000/kvs/profiler"},
        "command": ["python", "-m", "kvserve_profiler", "job"],
        "resources": {"requests": {"cpu": "2"}},
        **EXTRA,
    },
    "artifacts": {
        "url": "file:///artifacts",
        "volume": {"persistentVolumeClaim": {"claimName": "bundles"}},
        "secret": "store",
    },
    "otel": {"endpoint": "http://collector.observability:4318"},
    "networkPolicy": {
        "enabled": True,
        "servingNamespaceSelector": {"matchLabels": {"serving": "yes"}},
        "apiServerPorts": [8443],
    },
}
SETS = [pytest.param({}, id="defaults"), pytest.param(FULL, id="everything")]


def pick(objects: list[Json], kind: str, name: str) -> Json:
    """Return the one object of a kind and name."""
    (found,) = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def pod_specs(objects: list[Json]) -> list[Json]:
    """Return the specs of all pods that the objects make."""
    templates = [o["spec"]["template"] for o in objects if o["kind"] == "Deployment"]
    return [o["spec"] for o in [*templates, *(o for o in objects if o["kind"] == "Pod")]]


def test_crd_is_the_repositorys(chart: Path) -> None:
    """The chart's copy of the CRD is crds/kvservepolicies.yaml; copy it after each change."""
    own = (chart / "files" / "kvservepolicies.yaml").read_text()
    assert own == (ROOT / "crds" / "kvservepolicies.yaml").read_text()


@pytest.mark.parametrize("keep", [True, False])
def test_crd_is_rendered_whole(control_plane: Cluster, chart: Path, keep: bool) -> None:
    """The rendered CRD has the file's spec, and says whether it stays when the release goes."""
    text = control_plane.helm(
        "template",
        "k",
        str(chart),
        "--show-only",
        "templates/crd.yaml",
        "--set",
        f"crds.keep={keep}",
    )
    rendered = yaml.safe_load(text)
    source = yaml.safe_load((ROOT / "crds" / "kvservepolicies.yaml").read_text())
    assert rendered["spec"] == source["spec"]
    assert rendered["metadata"]["name"] == source["metadata"]["name"]
    policy = rendered["metadata"].get("annotations", {}).get("helm.sh/resource-policy")
    assert policy == ("keep" if keep else None)


@pytest.mark.parametrize("values", SETS)
def test_lint_finds_nothing(
    control_plane: Cluster, chart: Path, tmp_path: Path, values: Json
) -> None:
    """Helm's linter, which fails on warnings here, accepts the chart."""
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    text = control_plane.helm("lint", "--strict", str(chart), "--values", str(file))
    assert "1 chart(s) linted, 0 chart(s) failed" in text


@pytest.mark.parametrize("values", SETS)
def test_pods_are_restricted(render: Render, values: Json) -> None:
    """Every pod runs as user 1000 with nothing to write to but /tmp, whatever the values."""
    specs = pod_specs(render(values))
    assert len(specs) == 3  # operator, controller, test
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"]["memory"]
        writable = [v["name"] for v in spec.get("volumes", []) if "emptyDir" in v]
        assert writable in (["tmp"], ["tmp", "state"], [])


def test_defaults_make_what_they_say(render: Render) -> None:
    """Without values: cluster-wide roles, one replica of each, nothing optional."""
    kinds = sorted((o["kind"], o["metadata"]["name"]) for o in render())
    assert kinds == [
        ("ClusterRole", "kvserve-controller"),
        ("ClusterRole", "kvserve-operator"),
        ("ClusterRole", "kvserve-policy-editor"),
        ("ClusterRole", "kvserve-policy-viewer"),
        ("ClusterRoleBinding", "kvserve-controller"),
        ("ClusterRoleBinding", "kvserve-operator"),
        ("ConfigMap", "kvserve-operator"),
        ("Deployment", "kvserve-controller"),
        ("Deployment", "kvserve-operator"),
        ("Pod", "kvserve-test"),
        ("Role", "kvserve-operator-leader"),
        ("RoleBinding", "kvserve-operator-leader"),
        ("Service", "kvserve-controller"),
        ("ServiceAccount", "kvserve-controller"),
        ("ServiceAccount", "kvserve-operator"),
        ("ServiceAccount", "kvserve-test"),
    ]


def test_everything_reaches_its_place(render: Render) -> None:
    """Each value changes the object that it is about."""
    objects = render(FULL)
    operator = pick(objects, "Deployment", "kvs-operator")["spec"]
    controller = pick(objects, "Deployment", "kvs-controller")["spec"]
    assert operator["replicas"] == 2
    assert pick(objects, "PodDisruptionBudget", "kvs-operator")["spec"]["maxUnavailable"] == 1
    for deployment in (operator, controller):
        spec = deployment["template"]["spec"]
        assert {key: spec[key] for key in PLACED} == PLACED
        assert spec["imagePullSecrets"] == [{"name": "pull"}]
        (container,) = spec["containers"]
        env = {v["name"]: v.get("value") for v in container["env"]}
        assert env["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector.observability:4318"
        assert env["A"] == "b"
        assert EXTRA["extraVolumes"][0] in spec["volumes"]
        assert EXTRA["extraVolumeMounts"][0] in container["volumeMounts"]
        assert container["args"][-1] == "--namespace=team-a"
    (container,) = operator["template"]["spec"]["containers"]
    assert container["image"] == "example:5000/kvs/op:v9"
    assert container["imagePullPolicy"] == "Always"
    assert container["command"] == ["/venv/bin/kvserve", "operator"]
    (container,) = controller["template"]["spec"]["containers"]
    assert container["image"] == "kvserve/controller:0.1.0"
    assert "--prior-mbit=5000" in container["args"]
    kinds = {o["kind"] for o in objects}
    assert not kinds & {"ClusterRole", "ClusterRoleBinding"}
    found = {o["kind"] for o in objects if o["metadata"].get("namespace") == "team-a"}
    assert found == {"Role", "RoleBinding"}


def test_credentials_reach_the_controller(render: Render) -> None:
    """The controller, and the test that calls it, mount the Secrets that are named, and nothing without them."""
    plain = pick(render(), "Deployment", "kvserve-controller")["spec"]["template"]["spec"]
    assert not [a for a in plain["containers"][0]["args"] if "secret" in a or "tls" in a]
    named = {"secretName": "shared", "tlsSecretName": "certificate"}
    objects = render({"security": named})
    spec = pick(objects, "Deployment", "kvserve-controller")["spec"]["template"]["spec"]
    assert spec["containers"][0]["args"][-4:] == [
        "--secret-file=/etc/kvserve/secret/secret",
        "--tls-cert-file=/etc/kvserve/tls/tls.crt",
        "--tls-key-file=/etc/kvserve/tls/tls.key",
        "--tls-ca-file=/etc/kvserve/tls/ca.crt",
    ]
    for pod in (spec, pick(objects, "Pod", "kvserve-test")["spec"]):
        volumes = {volume["name"]: volume.get("secret") for volume in pod["volumes"]}
        assert volumes["secret"] == {"secretName": "shared", "defaultMode": 0o440}
        assert volumes["tls"] == {"secretName": "certificate", "defaultMode": 0o440}
        paths = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
        assert paths["tls"] == {"name": "tls", "mountPath": "/etc/kvserve/tls", "readOnly": True}
    service = pick(objects, "Service", "kvserve-controller")["spec"]
    assert service["ports"][0]["appProtocol"] == "https"
    one_sided = render({"security": {**named, "clientCertificates": False}})
    container = pick(one_sided, "Deployment", "kvserve-controller")["spec"]["template"]["spec"]
    assert "--tls-ca-file=/etc/kvserve/tls/ca.crt" not in container["containers"][0]["args"]


def test_operator_config_holds_the_profiler(render: Render, tmp_path: Path) -> None:
    """The operator reads the profiler's values from operator.yaml; a change of it restarts the operator."""
    objects = render(FULL)
    config = pick(objects, "ConfigMap", "kvs-operator")["data"]["operator.yaml"]
    expected = {
        "profiler": {
            "image": "example:5000/kvs/profiler:0.1.0",
            "imagePullPolicy": "IfNotPresent",
            "command": ["python", "-m", "kvserve_profiler", "job"],
            "resources": {"requests": {"cpu": "2", "memory": "2Gi"}, "limits": {"memory": "8Gi"}},
            **EXTRA,
        },
        "artifacts": FULL["artifacts"],
    }
    assert yaml.safe_load(config) == expected
    path = tmp_path / "operator.yaml"
    path.write_text(config)
    profiler = load(path, {})
    assert profiler.image == "example:5000/kvs/profiler:0.1.0"
    assert profiler.command == ("python", "-m", "kvserve_profiler", "job")
    assert profiler.artifacts == ArtifactsConfig(**FULL["artifacts"])
    default = pick(render(), "ConfigMap", "kvserve-operator")["data"]["operator.yaml"]
    path.write_text(default)
    assert load(path, {}) == ProfilerConfig(image="kvserve/profiler:0.1.0")

    def checksum(values: Json) -> str:
        name = f"{values.get('fullnameOverride', 'kvserve')}-operator"
        template = pick(render(values), "Deployment", name)["spec"]["template"]
        found: str = template["metadata"]["annotations"]["checksum/config"]
        return found

    assert checksum({}) == checksum({})
    assert checksum({}) != checksum({"profiler": {"resources": {"requests": {"cpu": "3"}}}})


def test_network_policies(render: Render) -> None:
    """The switch lets serving pods to gRPC, the test to the health port, and egress to three things."""
    objects = render(FULL)
    operator = pick(objects, "NetworkPolicy", "kvs-operator")["spec"]
    controller = pick(objects, "NetworkPolicy", "kvs-controller")["spec"]
    assert operator["ingress"] == []
    serving, test = controller["ingress"]
    assert serving["from"] == [{"namespaceSelector": {"matchLabels": {"serving": "yes"}}}]
    assert [port["port"] for port in serving["ports"]] == ["grpc"]
    assert [port["port"] for port in test["ports"]] == ["grpc", "health"]
    for spec in (operator, controller):
        ports = [port["port"] for rule in spec["egress"] for port in rule["ports"]]
        assert ports == [53, 53, 8443, 4318]
    https = {"networkPolicy": {"enabled": True}, "otel": {"endpoint": "https://collector/otlp"}}
    spec = pick(render(https), "NetworkPolicy", "kvserve-operator")["spec"]
    assert spec["egress"][-1]["ports"] == [{"protocol": "TCP", "port": 443}]


@pytest.mark.parametrize(
    ("release", "name"),
    [("kvserve", "kvserve"), ("my-kvserve", "my-kvserve"), ("demo", "demo-kvserve")],
)
def test_names_follow_the_release(
    control_plane: Cluster, chart: Path, release: str, name: str
) -> None:
    """Objects begin with the release's name, and with kvserve's if it does not hold that."""
    text = control_plane.helm(
        "template", release, str(chart), "--show-only", "templates/controller-service.yaml"
    )
    assert yaml.safe_load(text)["metadata"]["name"] == f"{name}-controller"


def test_names_fit_into_labels(control_plane: Cluster, chart: Path) -> None:
    """The longest release name that Helm allows still gives names of at most 63 characters."""
    text = control_plane.helm("template", "r" * 53, str(chart))
    names = [o["metadata"]["name"] for o in yaml.safe_load_all(text) if o]
    assert max(len(name) for name in names) <= 63


def test_notes_name_what_is_installed(control_plane: Cluster, chart: Path) -> None:
    """NOTES.txt gives the next three commands with the real names, and the controller's address."""
    output = control_plane.helm(
        "install", "demo", str(chart), "--namespace", "spot", "--dry-run=client",
        "--set", "watchNamespaces={team-a}", "--output", "json",
    )  # fmt: skip
    notes = json.loads(output)["info"]["notes"]
    assert "helm test demo --namespace spot" in notes
    assert "kubectl explain kvservepolicies.spec" in notes
    assert "kubectl get kvservepolicies --namespace team-a --watch" in notes
    assert "demo-kvserve-controller.spot.svc:7443" in notes
