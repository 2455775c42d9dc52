"""Compilation happens once, at a time and in a place of our choice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = """
import gc, sys
import numba.core.dispatcher as d
def compiled():
    return sum(len(o.signatures) for o in gc.get_objects() if isinstance(o, d.Dispatcher)
               and o.py_func.__module__.startswith("kvserve_kernels"))
"""
WARM = """
import torch
from kvserve_strategies import *
from kvserve_api.wire import KVLayout
dtype = torch.bfloat16
plain = [config for config in PRESETS.values() if not config_needs_bundle(config)]
for config in plain:
    Pipeline.of(config).warm_up(dtype)
before = compiled()
keys = torch.randn(3, 50, 2, 12).to(dtype)
layout = KVLayout(layers=3, kv_heads=2, head_dim=12, dtype="bfloat16")
about = dict(model_fingerprint="sha256:" + "0" * 64, layout=layout, layers=range(3), tokens=range(50))
for config in plain:
    blob = encode_blob(Pipeline.of(config), keys.transpose(0, 1).contiguous().transpose(0, 1), keys, **about)
    for buffer in (bytes(blob), bytearray(blob), blob, memoryview(b"x" + bytes(blob))[1:]):
        decode_blob(buffer, expect=Expectation(**about, max_bytes=len(blob)))
print(before, compiled())
"""
FIRST = """
import numpy as np
from kvserve_kernels.checksum import checksum
print(checksum(np.zeros(3, np.uint8)))
"""


def run(code: str, **environment: str) -> str:
    """Return what a new interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.slow
def test_nothing_is_compiled_after_warm_up() -> None:
    """Once warm, no shape, stride or kind of buffer makes a kernel compile again."""
    before, after = run(COUNT + WARM).split()
    assert int(before) > 10
    assert before == after


def test_machine_code_is_kept_where_told(tmp_path: Path) -> None:
    """The cache goes below KVSERVE_CACHE_DIR, private, and never beside the sources."""
    first = run(FIRST, KVSERVE_CACHE_DIR=str(tmp_path))
    (folder,) = (tmp_path / "numba").iterdir()
    assert list(folder.rglob("*.nbi"))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert run(FIRST, KVSERVE_CACHE_DIR=str(tmp_path)) == first
    kernels = Path(__file__).parents[2] / "kernels"
    assert not list(kernels.rglob("*.nbi"))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["relative/path", "/proc/none"], ids=["no home", "read-only"])
def test_nowhere_to_keep_machine_code(where: str, tmp_path: Path) -> None:
    """Where nothing can be written, kernels work all the same and leave nothing."""
    wanted = run(FIRST, KVSERVE_CACHE_DIR=str(tmp_path))
    assert run(FIRST, KVSERVE_CACHE_DIR=where) == wanted
    assert not Path("relative").exists()


@pytest.mark.slow
def test_a_shared_cache_is_not_trusted(tmp_path: Path) -> None:
    """A folder that others may write to holds code of others: it is not used."""
    run(FIRST, KVSERVE_CACHE_DIR=str(tmp_path))
    (folder,) = (tmp_path / "numba").iterdir()
    for file in folder.rglob("*.nb?"):
        file.unlink()
    folder.chmod(0o777)
    run(FIRST, KVSERVE_CACHE_DIR=str(tmp_path))
    assert not list(folder.rglob("*.nb?"))
