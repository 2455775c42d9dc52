"""The Dockerfiles, as far as they can be checked where no registry is reachable."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = sorted((ROOT / "docker").glob("*.Dockerfile"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {
    "operator": "operator",
    "controller": "controller",
    "profiler": "profiler",
    "vllm": "connector",
}


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, each on one line: (keyword, rest)."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(keyword, rest.strip()) for keyword, _, rest in pairs]


def of(path: Path, keyword: str) -> list[str]:
    """Return the arguments of all instructions of one kind."""
    return [rest for found, rest in instructions(path) if found == keyword]


def test_there_is_one_for_each_image() -> None:
    """Operator, controller, profiler and serving image have a Dockerfile each."""
    assert {path.name.removesuffix(".Dockerfile") for path in DOCKER} == set(EXTRAS)


@pytest.mark.parametrize("path", DOCKER, ids=lambda path: path.stem)
def test_copied_paths_exist(path: Path) -> None:
    """Whatever is copied or mounted from the build context is in the repository."""
    sources = [
        source
        for rest in of(path, "COPY")
        if not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    mounts = re.findall(r"--mount=(\S+)", " ".join(of(path, "RUN")))
    for mount in mounts:
        options = dict(item.partition("=")[::2] for item in mount.split(","))
        if "from" not in options:
            sources.append(options["source"])
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []


@pytest.mark.parametrize("path", DOCKER, ids=lambda path: path.stem)
def test_wheel_stage_has_every_package(path: Path) -> None:
    """All folders that the wheel is made of, and the files that its metadata names, are copied."""
    copied = {source for rest in of(path, "COPY") for source in rest.split()[:-1]}
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    files = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    hook = {"hatch_build.py"}
    assert {package.partition("/")[0] for package in packages} | files | hook == copied


@pytest.mark.parametrize("path", DOCKER, ids=lambda path: path.stem)
def test_compiler_where_kernels_run(path: Path) -> None:
    """The wheels of the images that compress are built with a compiler; no final image has one."""
    stages = path.read_text().split("\nFROM ")
    with_compiler = ["apt-get install" in stage and " gcc " in stage for stage in stages]
    compresses = EXTRAS[path.stem] in ("profiler", "connector")
    assert [found for found in with_compiler if found] == [True] * compresses
    assert not with_compiler[-1]


@pytest.mark.parametrize("path", DOCKER, ids=lambda path: path.stem)
def test_extra_is_the_images_own(path: Path) -> None:
    """Each image installs exactly one extra, and pyproject has it."""
    extras = re.findall(r"kvserve\[([a-z,]+)\]", " ".join(of(path, "RUN")))
    assert extras == [EXTRAS[path.stem]]
    assert extras[0] in PROJECT["project"]["optional-dependencies"]


@pytest.mark.parametrize("path", DOCKER, ids=lambda path: path.stem)
def test_runs_as_user_1000(path: Path) -> None:
    """The last USER is 1000:1000, as the chart's pods run."""
    assert of(path, "USER")[-1] == "1000:1000"


@pytest.mark.parametrize("path", DOCKER, ids=lambda path: path.stem)
def test_entry_point_exists(path: Path) -> None:
    """The entry point is a subcommand of `kvserve` or a module that can be run."""
    (entry,) = of(path, "ENTRYPOINT")
    command = json.loads(entry)
    if command[0] == "kvserve":
        assert command[0] in PROJECT["project"]["scripts"]
        assert command[1] in PROJECT["project"]["entry-points"]["kvserve.commands"]
        return
    assert command[1] == "-m"
    module = command[2]
    if module.startswith("kvserve_"):
        folder = EXTRAS[path.stem]
        assert (ROOT / folder / module / "__main__.py").exists()
    else:
        (arguments,) = {
            tuple(container["command"])
            for item in yaml.safe_load_all((ROOT / "examples/01-chat/serving.yaml").read_text())
            if item["kind"] == "Deployment"
            for container in item["spec"]["template"]["spec"]["containers"]
            if container["name"] == "vllm"
        }
        assert tuple(command) == arguments


def test_versions_agree() -> None:
    """Chart, package and the images of the example carry one version."""
    version = PROJECT["project"]["version"]
    chart = yaml.safe_load((ROOT / "helm/kvserve/Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == version
    images = set()
    for file in (ROOT / "examples").rglob("*.yaml"):
        images |= set(re.findall(r"image: (kvserve/\S+)", file.read_text()))
    assert images == {f"kvserve/vllm:{version}"}


def test_constraints_are_the_locks_pins() -> None:
    """Without its line for a clone the lock is a list of exact pins, as pip takes for constraints."""
    lines = (ROOT / "requirements/dev.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#") and line != "-e ."]
    assert len(pins) > 100
    wrong = [line for line in pins if not re.match(r"[a-z0-9][a-z0-9._-]*==[^ ;]+( ;.*)?$", line)]
    assert wrong == []
