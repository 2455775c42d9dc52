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


def test_a_missing_name_of_vllm_is_an_error_that_says_which_has_it() -> None:
    """An import that fails inside vLLM becomes UnsupportedError; one of another package stays what it is."""
    with pytest.raises(UnsupportedError, match=f"needs vLLM {PROVEN}.x"), needing_vllm():
        from vllm.distributed.kv_transfer.kv_connector.v1.base import NoSuchName  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="no_such_package"), needing_vllm():
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401


def test_the_connector_says_so_when_it_is_loaded() -> None:
    """Loaded into a vLLM that lacks what it needs, the connector's module ends with that error."""
    code = (
        "import vllm.distributed.kv_transfer.kv_connector.v1.base as base;"
        "del base.KVConnectorTransferResults;"
        "import kvserve_connector.connector"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"UnsupportedError: KVServeConnector needs vLLM {PROVEN}.x" in done.stderr
    assert "KVConnectorTransferResults" in done.stderr
