"""The page on which routers look up a producer's engine before they send a request to two pods at once.

``GET /query`` answers as the bootstrap server of vLLM's Mooncake connector does: for each data-parallel rank the
engine's name and its workers' addresses. A router copies the name into the decode request as it is, so ours holds the
address: the decode pod need not ask.
"""

import json
import socket
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_TIMEOUT_S = 10.0


def page(rank: int, name: str, addresses: Mapping[int, str]) -> dict[str, Any]:
    """Return what the page says.

    Args:
        rank: The engine's data-parallel rank.
        name: See `kvserve_connector.remote.engine_name`.
        addresses: ``host:port`` of each tensor-parallel worker's transfer server.
    """
    workers = {str(worker): {"0": f"tcp://{where}"} for worker, where in addresses.items()}
    return {str(rank): {"engine_id": name, "worker_addr": workers}}


class BootstrapServer:
    """Serves the page, in a thread of its own, until it is closed.

    Args:
        host: The address to bind.
        port: The port; 0 takes any free one.
        answer: The page.

    Raises:
        OSError: The address is taken or not ours.
    """

    def __init__(self, host: str, port: int, answer: Mapping[str, Any]) -> None:
        body = json.dumps(answer).encode()

        class Handler(BaseHTTPRequestHandler):
            timeout = _TIMEOUT_S

            def do_GET(self) -> None:
                if self.path.partition("?")[0] != "/query":
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                """Say nothing: routers ask often."""

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        self._server = Server((host, port), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(
            target=self._server.serve_forever, name="kvserve-bootstrap", daemon=True
        ).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
