"""A real OTLP/HTTP receiver for tests: keeps every span and metric point it is sent."""

import gzip
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A span as it was received; times in nanoseconds since the epoch."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A metric's point; the value of a histogram is the sum of its observations."""

    service: str
    name: str
    unit: str
    value: float
    attributes: dict[str, Any] = field(default_factory=dict)


class Receiver:
    """Listens until the context ends.

    Attributes:
        endpoint: What to set as ``OTEL_EXPORTER_OTLP_ENDPOINT``.
        spans: Spans received so far.
        points: Metric points received so far.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.spans: list[Span] = []
        self.points: list[Point] = []
        self._server = ThreadingHTTPServer((host, 0), self._handler())
        self.endpoint = f"http://{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def wait_for(self, found: Callable[[], bool], *, timeout_s: float) -> bool:
        """Wait until a condition on what was received holds; return whether it does."""
        deadline_s = time.monotonic() + timeout_s
        while not found() and time.monotonic() < deadline_s:
            time.sleep(0.1)
        return found()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                receiver._receive(self.path, body)
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                """Stay silent."""

        return Handler

    def _receive(self, path: str, body: bytes) -> None:
        if path == "/v1/traces":
            traces = ExportTraceServiceRequest.FromString(body)
            for resource in traces.resource_spans:
                service = _attributes(resource.resource.attributes).get("service.name", "")
                for scope in resource.scope_spans:
                    self.spans += [
                        Span(
                            service=service,
                            name=span.name,
                            trace_id=span.trace_id.hex(),
                            span_id=span.span_id.hex(),
                            parent_id=span.parent_span_id.hex(),
                            start_ns=span.start_time_unix_nano,
                            end_ns=span.end_time_unix_nano,
                            attributes=_attributes(span.attributes),
                        )
                        for span in scope.spans
                    ]
        elif path == "/v1/metrics":
            metrics = ExportMetricsServiceRequest.FromString(body)
            for group in metrics.resource_metrics:
                service = _attributes(group.resource.attributes).get("service.name", "")
                for scope_metrics in group.scope_metrics:
                    for metric in scope_metrics.metrics:
                        self.points += [
                            Point(
                                service=service,
                                name=metric.name,
                                unit=metric.unit,
                                value=value,
                                attributes=attributes,
                            )
                            for value, attributes in _points(metric)
                        ]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def _points(metric: Any) -> list[tuple[float, dict[str, Any]]]:
    kind = metric.WhichOneof("data")
    points = getattr(metric, kind).data_points
    if kind in ("histogram", "exponential_histogram"):
        return [(point.sum, _attributes(point.attributes)) for point in points]
    return [(point.as_double or point.as_int, _attributes(point.attributes)) for point in points]


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair) for pair in pairs}


def _value(pair: KeyValue) -> Any:
    value: AnyValue = pair.value
    kind = value.WhichOneof("value")
    return getattr(value, kind) if kind else None
