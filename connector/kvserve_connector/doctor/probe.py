"""One piece read by NIXL from this process to itself, with whatever UCX is told by the environment.

Run as ``python -m kvserve_connector.doctor.probe MEMORY_BYTES READ_S``, in a process of its own: UCX writes its reasons
to the standard output, and may wait for ever or end the process.
"""

import secrets
import sys

from kvserve_api.errors import KVServeError
from kvserve_connector.staging import PIECE_BYTES, Reader, Staging


def read_piece(memory_bytes: int, read_s: float) -> None:
    """Make a producer's and a consumer's agent, each with as much registered memory, and read a piece.

    Args:
        memory_bytes: What the settings call ``staging_bytes``.
        read_s: Most seconds that reading may take.

    Raises:
        SpecError: An agent can't be made, or its memory not be registered.
        TransferError: The piece does not come.
        RuntimeError: Other bytes come.
    """
    staging, reader = Staging(memory_bytes), Reader(memory_bytes)
    piece = staging.take(0)
    assert piece is not None
    staged = staging.view(piece)
    staged[:] = secrets.token_bytes(PIECE_BYTES)
    read = memoryview(bytearray(PIECE_BYTES))
    reader.enter(staging.agent, staging.metadata)
    reader.read(
        staging.agent,
        staging.address(piece),
        read,
        stall_s=read_s,
        left_s=lambda: read_s,
        check=lambda: None,
    )
    if read != staged:
        raise RuntimeError("other bytes were read than were staged")


def main() -> None:
    """Read a piece; end with 1, and why as the last line, if that fails."""
    try:
        read_piece(int(sys.argv[1]), float(sys.argv[2]))
    except (KVServeError, RuntimeError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
