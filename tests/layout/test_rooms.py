"""The layout's rules that no linter sees."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    "api",
    "cli",
    "connector",
    "controller",
    "kernels",
    "operator",
    "profiler",
    "strategies",
)


def test_a_root_folder_is_never_a_package() -> None:
    """A root `operator/__init__.py` would hide the standard library's module from every `python -m`."""
    assert [str(path) for path in ROOT.glob("*/__init__.py")] == []
    assert [str(path) for path in (ROOT / "tests").rglob("__init__.py")] == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_holds_one_package(room: str) -> None:
    """Each code folder is on the path of an editable install, so it may hold nothing but its package."""
    entries = {path.name for path in (ROOT / room).iterdir() if path.name != "__pycache__"}
    assert entries == {f"kvserve_{room}"}


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        pytest.param("kvserve_operator.cli", ("torch", "numba", "grpc", "vllm"), id="operator"),
        pytest.param("kvserve_controller.cli", ("torch", "numba", "kopf", "vllm"), id="controller"),
        pytest.param("kvserve_strategies", ("kubernetes", "kopf", "vllm"), id="strategies"),
        pytest.param("kvserve_profiler.cli", ("kopf", "vllm"), id="profiler"),
        pytest.param("kvserve_connector", ("kubernetes", "kopf", "botorch"), id="connector"),
        pytest.param("kvserve_cli.main", ("torch", "kopf", "kubernetes", "grpc"), id="cli"),
    ],
)
def test_a_part_imports_without_what_its_image_lacks(package: str, absent: tuple[str, ...]) -> None:
    """A part can be imported where the packages of the other images are not installed."""
    block = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import {package}"
    done = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
