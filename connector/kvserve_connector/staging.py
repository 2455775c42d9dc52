"""Memory that NIXL reads from or into: bounded, in pieces, and never the KV cache itself.

Whoever has an agent's metadata can read all that it has registered, at any time. So what is registered is a memory of
its own, which holds coded chunks on their way and nothing else.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

import torch

from kvserve_api.errors import (
    SpecError,
    TransferError,
    TransferReason,
    WireError,
    WireReason,
)
from kvserve_connector.config import PATH

logger = logging.getLogger(__name__)

PIECE_BYTES: Final = 1 << 20
"""Bytes of a piece. NIXL shows no progress inside one, so each must arrive within ``stall_s``."""
MAX_AGENTS: Final = 256
"""Agents of producers that are remembered; those that are least recently known go first."""
AILING_S: Final = 60.0
"""How long NIXL is left alone after it failed."""
_POLL_S: Final = 20e-6
_MOST_POLL_S: Final = 1e-3
_CHECK_S: Final = 0.01
"""So often it is looked whether the producer is still there."""
_PENDING: Final = "PROC"
_DONE: Final = "DONE"


def nixl() -> Any:
    """Return NIXL's Python module.

    Raises:
        SpecError: It is not installed, or does not load.
    """
    failed = []
    # not the package named nixl: it guesses one of these by what it thinks of CUDA, and fails if that is not there
    for name in ("nixl_cu13", "nixl_cu12"):
        try:
            return import_module(f"{name}._api")
        except ImportError as error:
            failed.append(str(error))
    raise SpecError(
        f"{PATH}.transport",
        f'"nixl" needs NIXL ({"; ".join(failed)}): pip install "kvserve[nixl]"',
    )


class Staging:
    """An agent and its registered memory; safe from any thread.

    Args:
        memory_bytes: Its size; whole pieces of it are used.
        progress: Have NIXL move bytes by a thread of its own, which looks for work all the time; without it they move
            only while someone here waits for them.

    Attributes:
        agent: Name of the agent, new in each run.

    Raises:
        SpecError: NIXL can't be used here.
    """

    def __init__(self, memory_bytes: int, *, progress: bool = True) -> None:
        api = nixl()
        self.agent = f"kvserve-{secrets.token_hex(8)}"
        self._memory = torch.zeros(memory_bytes // PIECE_BYTES * PIECE_BYTES, dtype=torch.uint8)
        self._bytes: memoryview = self._memory.numpy().data
        self._free = list(range(len(self._memory) // PIECE_BYTES))
        self._freed = threading.Condition()
        try:
            self._agent = api.nixl_agent(
                self.agent,
                api.nixl_agent_config(
                    enable_prog_thread=progress,
                    backends=["UCX"],
                    sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
                ),
            )
            self._registered = self._agent.register_memory(
                [(self._memory.data_ptr(), len(self._memory), 0, "")], "DRAM"
            )
            self.metadata: bytes = self._agent.get_agent_metadata()
        except Exception as error:
            raise SpecError(f"{PATH}.transport", f'"nixl" does not work here: {error}') from error

    @property
    def free_pieces(self) -> int:
        """Pieces that nobody has."""
        with self._freed:
            return len(self._free)

    def take(self, timeout_s: float) -> int | None:
        """Return a piece, or None if none became free in time."""
        with self._freed:
            if not self._freed.wait_for(lambda: self._free, timeout_s):
                return None
            return self._free.pop()

    def give(self, piece: int) -> None:
        """Give a piece back."""
        with self._freed:
            self._free.append(piece)
            self._freed.notify()

    def view(self, piece: int) -> memoryview:
        """Return a piece's bytes."""
        return self._bytes[piece * PIECE_BYTES : (piece + 1) * PIECE_BYTES]

    def address(self, piece: int) -> int:
        """Return where a piece begins."""
        start: int = self._memory.data_ptr()
        return start + piece * PIECE_BYTES


class Reader(Staging):
    """Reads what producers have staged; its own metadata never leaves it.

    Args:
        memory_bytes: Size of the memory that is read into.
    """

    def __init__(self, memory_bytes: int) -> None:
        super().__init__(memory_bytes, progress=False)
        self._lock = threading.Lock()
        self._agents: dict[str, bytes] = {}
        self._users: dict[str, int] = {}
        self._stuck: list[tuple[Any, int]] = []
        self._ailing_until_s = 0.0

    @property
    def ready(self) -> bool:
        """Whether it makes sense to ask for NIXL now."""
        self._recover()
        return time.monotonic() >= self._ailing_until_s and self.free_pieces > 0

    def enter(self, agent: str, metadata: bytes) -> None:
        """Learn a producer's agent, and keep it until `leave`.

        Raises:
            WireError: The metadata is not this agent's.
        """
        with self._lock:
            known = self._agents.pop(agent, None)
            if known is None:
                self._learn(agent, metadata)
            elif known != metadata:
                self._agents[agent] = known
                raise WireError(WireReason.MALFORMED, f"another agent is named {agent!r}")
            self._agents[agent] = metadata
            self._users[agent] = self._users.get(agent, 0) + 1

    def leave(self, agent: str) -> None:
        """Say that a transfer from an agent has ended."""
        with self._lock:
            self._users[agent] -= 1
            if not self._users[agent]:
                del self._users[agent]

    def read(
        self,
        agent: str,
        address: int,
        into: memoryview,
        *,
        stall_s: float,
        left_s: Callable[[], float],
        check: Callable[[], None],
    ) -> float:
        """Read a piece that a producer has staged; return the seconds it took.

        Args:
            agent: The producer's.
            address: Where it is there.
            into: As many bytes as it has.
            stall_s: Most seconds.
            left_s: Tells how many more are left of the transfer's.
            check: Raises if the producer is gone or the transfer is to stop.

        Raises:
            TransferError: It did not come, or not in time.
        """
        piece = self.take(max(0.0, left_s()))
        if piece is None:
            raise TransferError(TransferReason.TIMEOUT, "no memory to read into became free")
        try:
            start_s = time.perf_counter()
            handle = self._begin(agent, address, piece, len(into))
        except BaseException:
            self.give(piece)
            raise
        try:
            self._start(handle)
            self._wait(handle, stall_s, check)
            taken_s = time.perf_counter() - start_s
            into[:] = self.view(piece)[: len(into)]
        finally:
            self._end(handle, piece)
        return taken_s

    def _learn(self, agent: str, metadata: bytes) -> None:
        idle = [name for name in self._agents if name not in self._users]
        for name in idle[: max(0, len(self._agents) + 1 - MAX_AGENTS)]:
            del self._agents[name]
            self._agent.remove_remote_agent(name)
        # what NIXL knows of an agent is lost when it is told something wrong of the same name; names are random
        named = [name for name in (*self._agents, agent) if name.encode() in metadata]
        if named != [agent]:
            raise WireError(WireReason.MALFORMED, f"NIXL metadata is not that of {agent!r}")
        try:
            self._agent.add_remote_agent(metadata)
        except Exception as error:
            self._failed(f"can't use a producer's metadata: {error}")
            raise WireError(WireReason.MALFORMED, f"NIXL metadata: {error}") from error

    def _begin(self, agent: str, address: int, piece: int, length: int) -> Any:
        try:
            ours = self._agent.get_xfer_descs([(self.address(piece), length, 0)], "DRAM")
            theirs = self._agent.get_xfer_descs([(address, length, 0)], "DRAM")
            # NIXL refuses what lies outside of the memory that the metadata names
            return self._agent.initialize_xfer("READ", ours, theirs, agent)
        except Exception as error:
            with self._lock:
                self._agents.pop(agent, None)
            raise self._failed(f"can't read there: {error}") from error

    def _start(self, handle: Any) -> None:
        try:
            self._agent.transfer(handle)
        except Exception as error:
            raise self._failed(f"can't begin to read: {error}") from error

    def _wait(self, handle: Any, stall_s: float, check: Callable[[], None]) -> None:
        pause_s = _POLL_S
        start_s = checked_s = time.monotonic()
        while (state := self._state(handle)) == _PENDING:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MOST_POLL_S)
            now_s = time.monotonic()
            if now_s - checked_s >= _CHECK_S:
                checked_s = now_s
                check()
            if now_s - start_s > stall_s:
                self._failed("silent")
                raise TransferError(TransferReason.TIMEOUT, f"no piece by NIXL in {stall_s:g} s")
        if state != _DONE:
            # a producer that is gone says nothing about NIXL
            check()
            raise self._failed(f"reading ended with {state}")

    def _state(self, handle: Any) -> str:
        try:
            state: str = self._agent.check_xfer_state(handle)
        except Exception as error:
            return str(error) or type(error).__name__
        return state

    def _end(self, handle: Any, piece: int) -> None:
        """Let go of a read; a piece into which bytes may still come is kept until they can't."""
        if self._state(handle) == _PENDING:
            with self._lock:
                self._stuck.append((handle, piece))
            return
        try:
            self._agent.release_xfer_handle(handle)
        except Exception as error:
            logger.warning("NIXL keeps a read that has ended: %s", error)
        self.give(piece)

    def _recover(self) -> None:
        """Take back the pieces of reads that were given up and have ended since."""
        with self._lock:
            stuck, self._stuck = self._stuck, []
        for handle, piece in stuck:
            self._end(handle, piece)

    def _failed(self, what: str) -> TransferError:
        self._ailing_until_s = time.monotonic() + AILING_S
        logger.warning("NIXL: %s; chunks are asked for over TCP for %g s", what, AILING_S)
        return TransferError(TransferReason.PEER_LOST, f"NIXL: {what}")
