"""Other versions of vLLM are named, in a warning or in the error that ends the start."""

import subprocess
import sys

import pytest

from kvserve_api.errors import UnsupportedError
from kvserve_connector.versions import PROVEN, doubts, needing_vllm


def test_only_the_proven_minor_version_goes_without_a_word() -> None:
    """Patches and local versions of the proven minor version are fine, all others are doubted by name."""
    assert [doubts(f"{PROVEN}{patch}") for patch in (".0", ".7", ".1+cpu")] == ["", "", ""]
    for other in ("0.31.2", "0.33.0rc1", "1.32.0", "0.3", ""):
        assert PROVEN in doubts(other)


def test_a_missing_name_of_vllm_is_an_error_that_says_which_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An import of vLLM that fails becomes UnsupportedError; one of another package stays what it is."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UnsupportedError, match=f"needs vLLM {PROVEN}.x"), needing_vllm():
        import vllm  # noqa: F401
    with pytest.raises(ImportError, match="vllm_absent") as caught, needing_vllm():
        raise ImportError("cannot import vllm_absent", name="absent")
    assert not isinstance(caught.value, UnsupportedError)


@pytest.mark.slow
def test_the_connector_says_so_when_it_is_loaded() -> None:
    """Loaded where vLLM lacks what it needs, the connector's module ends with that error."""
    code = "import sys; sys.modules['vllm'] = None; import kvserve_connector.connector"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"UnsupportedError: KVServeConnector needs vLLM {PROVEN}.x" in done.stderr
