"""Pods on the skeleton image."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from testcluster.errors import ClusterError
from testcluster.hostpods import chart_values, host_folders, hostify
from testcluster.images import HOST_IMAGE
from testcluster.paths import CLONE_DIR


def _spec(**container: Any) -> dict[str, Any]:
    """Return a pod's spec with one container of ours and one that is not."""
    ours = {"name": "ours", "image": "ghcr.io/kvserve/serving:0.1.0", "command": ["run"]}
    return {"containers": [{**ours, **container}, {"name": "other", "image": "nginx:1"}]}


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A folder like a virtual environment outside any clone."""
    home = tmp_path / "python" / "bin"
    home.mkdir(parents=True)
    (home / "python3").write_text("")
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(home / "python3")
    (folder / "pyvenv.cfg").write_text(f"home = {home}\nversion = 3.11\n")
    return folder


def test_folders_hold_the_interpreter(venv: Path, tmp_path: Path) -> None:
    """System, installation, environment, clone and extras are mounted, each once."""
    clone, model = tmp_path / "clone", tmp_path / "model"
    clone.mkdir()
    model.mkdir()
    folders = host_folders(venv, clone, [model, clone / "."])
    system = [Path("/usr"), Path("/etc/ssl"), Path("/etc/alternatives")]
    assert sorted(folders) == sorted([*system, tmp_path / "python", venv, clone, model])


def test_folders_inside_others_are_not_mounted_twice(venv: Path) -> None:
    """An environment inside the clone comes with the clone."""
    assert venv not in host_folders(venv, venv.parent)


def test_folder_that_is_missing(venv: Path, tmp_path: Path) -> None:
    """A folder that is none is refused before a pod waits for it for ever."""
    with pytest.raises(ClusterError, match="missing is to be mounted"):
        host_folders(venv, tmp_path, [tmp_path / "missing"])


def test_hostify_moves_our_containers_only() -> None:
    """Our container gets image, mounts and PATH; another's is left as it was."""
    before = _spec()
    ours, other = (after := hostify(before))["containers"]
    assert (ours["image"], ours["imagePullPolicy"]) == (HOST_IMAGE, "Never")
    assert {m["name"] for m in ours["volumeMounts"]} == {v["name"] for v in after["volumes"]}
    assert all(m["readOnly"] for m in ours["volumeMounts"])
    paths = {e["name"]: e["value"] for e in ours["env"]}["PATH"].split(":")
    assert paths[0] == f"{sys.prefix}/bin"
    assert other == {"name": "other", "image": "nginx:1"}
    assert before == _spec()


def test_hostify_keeps_what_the_container_says() -> None:
    """A container's own variables, mounts and volumes stay."""
    mount = {"name": "tmp", "mountPath": "/tmp"}
    spec = _spec(env=[{"name": "PATH", "value": "/own"}], volumeMounts=[mount])
    spec["volumes"] = [{"name": "tmp", "emptyDir": {}}]
    after = hostify(spec)
    container = after["containers"][0]
    assert [e["value"] for e in container["env"] if e["name"] == "PATH"] == ["/own"]
    assert container["volumeMounts"][0] == mount
    assert after["volumes"][0] == {"name": "tmp", "emptyDir": {}}


def test_hostify_needs_a_command() -> None:
    """The skeleton has no entry point, so a container without a command is refused."""
    with pytest.raises(ClusterError, match=r"containers\[ours\].command"):
        hostify(_spec(command=[]))


def test_chart_values_cover_all_parts() -> None:
    """Each part of the chart runs its command on the skeleton image."""
    values = chart_values(commands={"profiler": ["profile"]})
    assert set(values) == {"operator", "controller", "profiler"}
    assert values["profiler"]["command"] == ["profile"]
    for part in values.values():
        image = part["image"]
        assert f"{image['repository']}:{image['tag']}" == HOST_IMAGE
        assert image["pullPolicy"] == "Never"
        assert len(part["extraVolumes"]) == len(part["extraVolumeMounts"]) > 0


@pytest.mark.parametrize("part", ["operator", "controller", "profiler"])
def test_chart_values_run_what_the_images_run(part: str) -> None:
    """A part's command is its image's entry point, taken from the environment."""
    dockerfile = (CLONE_DIR / "docker" / f"{part}.Dockerfile").read_text()
    (entry_point,) = re.findall(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)
    program, *arguments = json.loads(entry_point)
    assert chart_values()[part]["command"] == [f"{sys.prefix}/bin/{program}", *arguments]
