"""The configuration file and the command line: what is wrong is named."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvserve_api.errors import SpecError
from kvserve_operator.cli import operator
from kvserve_operator.config import DEFAULT_COMMAND, load


def test_everything_can_be_set(tmp_path: Path) -> None:
    """Each key of the file is read, and variables of OpenTelemetry are passed on but for the name of their source."""
    path = tmp_path / "operator.yaml"
    path.write_text(
        "profiler:\n"
        "  image: i:1\n"
        "  imagePullPolicy: Never\n"
        "  command: [/bin/p, job]\n"
        "  extraVolumes: [{name: v, emptyDir: {}}]\n"
        "  extraVolumeMounts: [{name: v, mountPath: /v}]\n"
        "  extraEnv: [{name: A, value: b}]\n"
        "  resources: {requests: {cpu: 1}}\n"
        "artifacts: {url: 'file:///a/b/', volume: {hostPath: {path: /x}}, secret: s}\n"
    )
    environ = {"OTEL_A": "1", "OTEL_SERVICE_NAME": "operator", "HOME": "/"}
    config = load(path, environ)
    assert config.image == "i:1"
    assert config.image_pull_policy == "Never"
    assert config.command == ("/bin/p", "job")
    assert config.extra_volumes == ({"name": "v", "emptyDir": {}},)
    assert config.extra_volume_mounts == ({"name": "v", "mountPath": "/v"},)
    assert config.extra_env == ({"name": "A", "value": "b"},)
    assert config.resources == {"requests": {"cpu": 1}}
    assert config.passed_env == {"OTEL_A": "1"}
    assert config.artifacts.url == "file:///a/b/"
    assert config.artifacts.volume == {"hostPath": {"path": "/x"}}
    assert config.artifacts.folder == "/a/b/"
    assert config.artifacts.secret == "s"


def test_an_image_is_enough(tmp_path: Path) -> None:
    """All but the image has a default."""
    path = tmp_path / "operator.yaml"
    path.write_text("profiler: {image: i}")
    config = load(path, {})
    assert config.command == DEFAULT_COMMAND
    assert (config.artifacts.url, config.artifacts.folder) == ("", "")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("profiler: {}", "profiler.image"),
        ("profiler: {image: ''}", "profiler.image"),
        ("profiler: {image: i, imge: x}", "profiler.imge"),
        ("profiler: {image: i, command: []}", "profiler.command"),
        ("profiler: {image: i, command: [1]}", "profiler.command"),
        ("profiler: {image: i, extraEnv: [{value: x}]}", "profiler.extraEnv"),
        ("profiler: {image: i, imagePullPolicy: Sometimes}", "profiler.imagePullPolicy"),
        ("profiler: {image: i}\nextra: 1", "extra"),
        ("profiler: {image: i}\nartifacts: {url: /a}", "artifacts.url"),
        ("profiler: {image: i}\nartifacts: {url: 'file://a'}", "artifacts.url"),
        ("profiler: {image: i}\nartifacts: {url: 'file:///'}", "artifacts.url"),
        ("profiler: {image: i}\nartifacts: {url: 's3://b', volume: {x: {}}}", "artifacts.volume"),
        ("profiler: {image: i}\nartifacts: {secret: s}", "artifacts.secret"),
        ("profiler: {image: i}\nartifacts: {ulr: x}", "artifacts.ulr"),
        ("[]", "document"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, field: str) -> None:
    """A wrong file is refused with the key that is wrong."""
    path = tmp_path / "operator.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=field.replace(".", r"\.")):
        load(path, {})


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--help"], 0, "KVServePolicies"),
        (["--namespace", "Not_A_Name"], 2, "no name of a namespace"),
        (["--health", "8081"], 2, "HOST:PORT"),
        (["--helth", "x"], 2, "--health"),
    ],
)
def test_command_line(arguments: list[str], code: int, part: str) -> None:
    """Wrong arguments are named, with what would be right."""
    done = CliRunner().invoke(operator, arguments)
    assert done.exit_code == code
    assert part in done.output


def test_a_wrong_file_ends_the_process() -> None:
    """A configuration file that can't be read is one line and the exit code of bad input, not a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "kvserve_operator", "--config", "/nowhere.yaml"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 64
    assert done.stderr.splitlines() == [
        "error: /nowhere.yaml: can't be read: No such file or directory"
    ]
