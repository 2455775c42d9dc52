"""The example's manifests fit together, and fit the real API server, connector, vLLM and router."""

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvserve_api.policy import Policy
from kvserve_connector.config import ConnectorConfig
from testcluster.cluster import Cluster

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "01-chat"
Json = dict[str, Any]


def load(name: str) -> list[Json]:
    """Return the objects of one of the example's files."""
    return [item for item in yaml.safe_load_all((EXAMPLE / name).read_text()) if item]


def deployments() -> dict[str, Json]:
    """Return the Deployments by name."""
    objects = load("serving.yaml")
    return {o["metadata"]["name"]: o for o in objects if o["kind"] == "Deployment"}


def container(name: str) -> Json:
    """Return the one container of a Deployment."""
    (found,) = deployments()[name]["spec"]["template"]["spec"]["containers"]
    result: Json = found
    return result


def option(args: list[str], name: str) -> str:
    """Return the value of `--name=value`."""
    (found,) = [arg.partition("=")[2] for arg in args if arg.startswith(f"--{name}=")]
    return found


def transfer_config(name: str) -> Json:
    """Return a server's --kv-transfer-config."""
    args = container(name)["args"]
    document: Json = json.loads(args[args.index("--kv-transfer-config") + 1])
    return document


@pytest.fixture(scope="module")
def policy() -> Policy:
    """The example's policy, read as the operator and the controller read it."""
    (document,) = load("policy.yaml")
    return Policy.from_object(document)


def test_policy_selects_the_servers(policy: Policy) -> None:
    """Each target of the policy selects the pods of exactly one of the three Deployments."""
    labels = {
        name: item["spec"]["template"]["metadata"]["labels"] for name, item in deployments().items()
    }
    selected = {
        target.role: [name for name, found in labels.items() if target.matches(found)]
        for target in policy.targets
    }
    assert selected == {"Prefill": ["chat-prefill"], "Decode": ["chat-decode"]}
    assert f"kubectl describe kvp {policy.name}" in (EXAMPLE / "README.md").read_text()


def test_policy_profiles_what_is_served(policy: Policy) -> None:
    """Policy and servers name the same model on the same volume."""
    (claim,) = load("model-pvc.yaml")
    (artifacts,) = load("artifacts-pvc.yaml")
    assert policy.model.source is not None
    assert policy.model.source.claim_name == claim["metadata"]["name"]
    for name in ("chat-prefill", "chat-decode"):
        spec = deployments()[name]["spec"]["template"]["spec"]
        claims = [
            v["persistentVolumeClaim"]["claimName"]
            for v in spec["volumes"]
            if "persistentVolumeClaim" in v
        ]
        assert claims == [claim["metadata"]["name"], artifacts["metadata"]["name"]]
        args = container(name)["args"]
        assert option(args, "served-model-name") == policy.model.name
        assert option(args, "model") == str(Path("/model") / policy.model.source.path)


def test_servers_read_where_the_job_writes(control_plane: Cluster) -> None:
    """With the chart's values that the README sets, Jobs write bundles to the volume that both servers read."""
    settings = re.findall(r"--set (\S+)", (EXAMPLE / "README.md").read_text())
    text = control_plane.helm(
        "template", "kvserve", str(ROOT / "helm" / "kvserve"),
        "--show-only", "templates/operator-config.yaml", *(w for s in settings for w in ("--set", s)),
    )  # fmt: skip
    store = yaml.safe_load(yaml.safe_load(text)["data"]["operator.yaml"])["artifacts"]
    for name in ("chat-prefill", "chat-decode"):
        assert transfer_config(name)["kv_connector_extra_config"]["artifacts"] == store["url"]
        (mount,) = [m for m in container(name)["volumeMounts"] if m["name"] == "artifacts"]
        assert store["url"] == f"file://{mount['mountPath']}"
        assert mount["readOnly"] is True
        spec = deployments()[name]["spec"]["template"]["spec"]
        (volume,) = [v for v in spec["volumes"] if v["name"] == "artifacts"]
        claim = volume["persistentVolumeClaim"]["claimName"]
        assert store["volume"] == {"persistentVolumeClaim": {"claimName": claim}}


def test_servers_differ_in_role_only() -> None:
    """Prefill and decode run alike but for their roles and cores, so that their caches fit."""
    prefill, decode = container("chat-prefill"), container("chat-decode")
    roles = [transfer_config(name).pop("kv_role") for name in ("chat-prefill", "chat-decode")]
    assert roles == ["kv_producer", "kv_consumer"]
    plain = [[arg for arg in c["args"] if "kv_role" not in arg] for c in (prefill, decode)]
    assert plain[0] == plain[1]
    env = [{v["name"]: v.get("value") for v in c["env"]} for c in (prefill, decode)]
    assert {key for key in env[0] if env[0][key] != env[1][key]} == {"VLLM_CPU_OMP_THREADS_BIND"}


@pytest.mark.parametrize("name", ["chat-prefill", "chat-decode"])
def test_connector_accepts_its_settings(name: str, tmp_path: Path) -> None:
    """The connector reads the example's settings, with the labels file that the kubelet writes."""
    extra = transfer_config(name)["kv_connector_extra_config"]
    (volume,) = [
        v for v in deployments()[name]["spec"]["template"]["spec"]["volumes"] if "downwardAPI" in v
    ]
    (mount,) = [m for m in container(name)["volumeMounts"] if m["name"] == volume["name"]]
    (item,) = volume["downwardAPI"]["items"]
    assert extra["labels_file"] == f"{mount['mountPath']}/{item['path']}"
    file = tmp_path / "labels"
    file.write_text(f'app.kubernetes.io/name="{name}"\napp.kubernetes.io/part-of="chat"')
    env = {v["name"]: "10.0.0.7" for v in container(name)["env"] if "valueFrom" in v}
    config = ConnectorConfig.read({**extra, "labels_file": str(file)}, env, "127.0.0.1")
    assert config.labels["app.kubernetes.io/name"] == name
    assert (config.pod, config.namespace, config.advertise_host) == ("10.0.0.7",) * 3


def test_servers_find_the_charts_controller(control_plane: Cluster) -> None:
    """The endpoint in the example is the controller's Service as the README installs the chart."""
    chart = str(ROOT / "helm" / "kvserve")
    text = control_plane.helm(
        "template", "kvserve", chart, "-n", "kvserve-system",
        "--show-only", "templates/controller-service.yaml",
    )  # fmt: skip
    service = yaml.safe_load(text)
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    for server in ("chat-prefill", "chat-decode"):
        extra = transfer_config(server)["kv_connector_extra_config"]
        assert extra["control_endpoint"] == f"{name}.{namespace}.svc:{ports['grpc']}"


def test_pods_hold_no_credentials() -> None:
    """No pod of the example gets a service account's token."""
    (job,) = load("model-download.yaml")
    for item in (*deployments().values(), job):
        assert item["spec"]["template"]["spec"]["automountServiceAccountToken"] is False


def test_restricted_namespace_admits_pods(control_plane: Cluster, namespace: str) -> None:
    """All four pods are created in a namespace that enforces the restricted standard."""
    label = "pod-security.kubernetes.io/enforce=restricted"
    control_plane.kubectl("label", "namespace", namespace, label)
    for name in ("model-pvc.yaml", "artifacts-pvc.yaml", "model-download.yaml", "serving.yaml"):
        control_plane.kubectl(
            "apply",
            "--server-side",
            "--validate=strict",
            "-n",
            namespace,
            "-f",
            str(EXAMPLE / name),
        )
    deadline_s = time.monotonic() + 20
    while True:
        text = control_plane.kubectl("get", "pods", "-n", namespace, "-o", "name")
        expected = {*deployments(), "chat-model-download"}
        pods = text.split()
        found = {name for name in expected if any(p.startswith(f"pod/{name}-") for p in pods)}
        if found == expected or time.monotonic() > deadline_s:
            break
        time.sleep(0.2)
    assert found == expected, control_plane.kubectl("get", "events", "-n", namespace)


def test_router_accepts_its_arguments() -> None:
    """The real router starts with the example's arguments and looks for both servers by name."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    args = [*container("chat-router")["args"], f"--prometheus-port={port}"]
    command = [str(Path(sys.prefix) / "bin" / "vllm-router"), *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        lines = (line for line in process.stdout if "prefill_urls" in line)
        line = next(lines, "")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert "http://chat-prefill:8000" in line
    assert "http://chat-decode:8000" in line
    assert "kv_connector: Nixl" in line


def test_readme_names_files_that_exist() -> None:
    """Every file that the README's commands use is there, and every file of the folder is named."""
    text = (EXAMPLE / "README.md").read_text()
    named = set(re.findall(r"examples/01-chat/([\w./-]+\.(?:yaml|txt))", text))
    assert named
    assert [name for name in named if not (EXAMPLE / name).exists()] == []
    manifests = {path.name for path in EXAMPLE.glob("*.yaml")}
    assert manifests == set(re.findall(r"`([\w-]+\.yaml)`", text))


def prompts() -> Iterator[Path]:
    """Yield the prompts' files."""
    yield from sorted((EXAMPLE / "prompts").glob("*.txt"))


def test_prompts_are_distinct_and_long() -> None:
    """There are six prompts, none with the beginning of another, all of thousands of characters."""
    texts = [path.read_text() for path in prompts()]
    assert len(texts) == 6
    assert len({text[:40] for text in texts}) == 6
    assert all(3500 < len(text) < 6000 for text in texts)


@pytest.mark.slow
@pytest.mark.alone
def test_prompts_fit_the_servers() -> None:
    """With the model's own tokenizer each has 700 to 1,400 tokens, which leaves room to answer."""
    from tokenizers import Tokenizer

    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "models" / "smollm2.py")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    tokenizer = Tokenizer.from_file(str(Path(done.stdout.strip()) / "tokenizer.json"))
    counts = [len(tokenizer.encode(path.read_text()).ids) for path in prompts()]
    assert all(700 <= count <= 1400 for count in counts), counts
    longest = int(option(container("chat-prefill")["args"], "max-model-len"))
    assert max(counts) + 128 <= longest


@pytest.mark.slow
@pytest.mark.alone
def test_vllm_accepts_its_arguments() -> None:
    """The real vLLM parses the servers' arguments and reads the transfer configurations from them."""
    code = (
        "import json, sys\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser = make_arg_parser(FlexibleArgumentParser())\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    config = parser.parse_args(words).kv_transfer_config\n"
        "    print(config.kv_connector, config.kv_role, config.kv_load_failure_policy)\n"
    )
    words = [container(name)["args"] for name in ("chat-prefill", "chat-decode")]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(words)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-2:] == [
        "KVServeConnector kv_producer recompute",
        "KVServeConnector kv_consumer recompute",
    ]
