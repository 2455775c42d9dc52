"""A producer in a process of its own that stages its chunks for NIXL; says where, and ends with its input.

Run as ``python nixl_producer.py SECRET_FILE``.
"""

import json
import sys
from pathlib import Path

from kv_loopback import pair
from kvserve_api.credentials import CredentialFiles

REQUESTS = 4
FROM = (3, 9, 5, 20, 11)
TOKENS = 70


def main() -> None:
    """Serve a few prefills until the input ends."""
    credentials = CredentialFiles(secret_file=Path(sys.argv[1]))
    with pair(transport="nixl", credentials=credentials, staging_bytes=8 << 20) as both:
        for index in range(REQUESTS):
            both.lease(f"r{index}", TOKENS, FROM)
        staging = both.server.pulls.staging
        assert staging is not None
        found = {
            "port": both.server.port,
            "agent": staging.agent,
            "metadata": staging.metadata.hex(),
            "address": staging.address(0),
        }
        print(json.dumps(found), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
