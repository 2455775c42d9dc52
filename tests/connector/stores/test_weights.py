"""Weights are told apart by what is in their files."""

from pathlib import Path

import pytest

from kvserve_connector.stores.weights import SAMPLE_BYTES, SAMPLES, digest_of, weight_files

SIZE = SAMPLES * SAMPLE_BYTES * 2


def write(folder: Path, content: bytes, name: str = "model.safetensors") -> Path:
    """Write a weight file."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def test_the_same_weights_have_one_name_wherever_they_lie(tmp_path: Path) -> None:
    """Names of folders do not count; what else lies beside the weights does not either."""
    content = bytes(range(256)) * (SIZE // 256)
    one, other = write(tmp_path / "one", content), write(tmp_path / "other", content)
    write(other, b"{}", "config.json")
    names = [digest_of(weight_files(str(folder), None), {"dtype": "a"}) for folder in (one, other)]
    assert names[0] == names[1]
    assert digest_of(weight_files(str(one), None), {"dtype": "b"}) != names[0]
    assert weight_files(str(one / "model.safetensors"), None) == weight_files(str(one), None)


@pytest.mark.parametrize("sample", [0, 30, SAMPLES - 1])
def test_other_weights_have_another(sample: int, tmp_path: Path) -> None:
    """Another byte in any sample, or a shorter file, gives another name."""
    content = bytearray(SIZE)
    plain = digest_of(weight_files(str(write(tmp_path / "a", bytes(content))), None), {})
    content[(SIZE - SAMPLE_BYTES) * sample // (SAMPLES - 1) + 9] ^= 1
    other = digest_of(weight_files(str(write(tmp_path / "b", bytes(content))), None), {})
    cut = digest_of(weight_files(str(write(tmp_path / "c", bytes(SIZE - 1))), None), {})
    assert len({plain, other, cut}) == 3


def test_a_model_that_is_not_here_has_no_files() -> None:
    """A name that is neither a folder nor in the cache leads to nothing, not to a download."""
    assert weight_files("nobody/no-such-model-0", None) == []
