"""The kernel's names of threads."""

import threading
from pathlib import Path

from kvserve_connector.threads import name_thread


def test_the_kernel_knows_the_name() -> None:
    """A thread that named itself is found by it; a long name is cut."""
    found: list[str] = []

    def work() -> None:
        name_thread("kvserve-code-and-more")
        found.append(Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["kvserve-code-an\n"]
