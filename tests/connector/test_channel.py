"""What the end of a stream to the controller means."""

import grpc
import pytest

from kvserve_api.errors import KVServeError, UnauthenticatedError, UnavailableError
from kvserve_connector.channel import explain


@pytest.mark.parametrize(
    ("code", "detail", "error"),
    [
        pytest.param(grpc.StatusCode.UNAVAILABLE, "gone", UnavailableError, id="gone"),
        pytest.param(grpc.StatusCode.CANCELLED, "", UnavailableError, id="cancelled"),
        pytest.param(grpc.StatusCode.INTERNAL, "reset", UnavailableError, id="while-writing"),
        pytest.param(
            grpc.StatusCode.UNAUTHENTICATED, "no proof", UnauthenticatedError, id="no-proof"
        ),
        pytest.param(
            grpc.StatusCode.UNAVAILABLE, "Ssl Handshake failed", UnauthenticatedError, id="no-tls"
        ),
        pytest.param(grpc.StatusCode.RESOURCE_EXHAUSTED, "too large", KVServeError, id="other"),
    ],
)
def test_ends_are_explained(code: grpc.StatusCode, detail: str, error: type[KVServeError]) -> None:
    """What passes by itself, what credentials are to blame for, and all else, with the words that were said."""
    nothing = grpc.aio.Metadata()
    found = explain(
        grpc.aio.AioRpcError(code, nothing, nothing, details=detail, debug_error_string=None)
    )
    assert type(found) is error
    assert (detail or code.name) in str(found)
