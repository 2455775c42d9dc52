"""Names of threads that the kernel knows, so that `top -H`, perf and control groups can tell them apart."""

import ctypes
import sys
from typing import Final

_PR_SET_NAME: Final = 15
_MAX_BYTES: Final = 15


def name_thread(name: str) -> None:
    """Name the calling thread; does nothing where the kernel has no such names.

    Args:
        name: ASCII; what is beyond 15 bytes is cut.
    """
    if sys.platform == "linux":
        word = ctypes.create_string_buffer(name.encode()[:_MAX_BYTES])
        ctypes.CDLL(None).prctl(_PR_SET_NAME, word, 0, 0, 0)
