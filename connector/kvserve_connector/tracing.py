"""One trace over both pods: prefill, encode, wire and decode of a transfer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import context, trace
from opentelemetry.trace import Span, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from kvserve_api.telemetry import ATTR_TOKENS, SPAN_PREFILL

_PROPAGATOR = TraceContextTextMapPropagator()
_HEADER = "traceparent"


def tracer() -> trace.Tracer:
    """Return the connector's tracer; looked up late, because the provider may be set after our import."""
    return trace.get_tracer("kvserve.connector")


def traceparent(of: context.Context | None = None) -> str | None:
    """Return the W3C header of a context, of the current one by default; None if it is in no trace."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, context=of)
    return carrier.get(_HEADER)


def parent(header: str | None) -> context.Context:
    """Return the context that a W3C header names; a root if there is none or it is malformed."""
    carrier = {} if header is None else {_HEADER: header}
    return _PROPAGATOR.extract(carrier, context=context.Context())


def request_header(headers: Mapping[str, str] | None) -> str | None:
    """Return the W3C header that a client sent with its request; None if it sent none."""
    return (headers or {}).get(_HEADER)


def prefill_span(
    headers: Mapping[str, str] | None, start_s: float, end_s: float, tokens: int
) -> Span:
    """Record a request's prefill; it continues the client's trace if the request carried one.

    Args:
        headers: The request's trace headers as vLLM passes them on.
        start_s: Wall time of the request's arrival.
        end_s: Wall time of the prefill's end.
        tokens: Tokens of the prompt.
    """
    span = tracer().start_span(
        SPAN_PREFILL,
        context=parent(request_header(headers)),
        start_time=int(start_s * 1e9),
        attributes={ATTR_TOKENS: tokens},
    )
    span.end(end_time=int(end_s * 1e9))
    return span


def past_span(
    name: str,
    header: str | None,
    start_ns: int,
    end_ns: int,
    attributes: Mapping[str, AttributeValue],
) -> None:
    """Record something that is over, below the span that a header names; wall times in nanoseconds."""
    tracer().start_span(
        name, context=parent(header), start_time=start_ns, attributes=attributes
    ).end(end_time=end_ns)


@contextmanager
def span(name: str, header: str | None) -> Iterator[Span]:
    """Run a block inside a span below the one that a header names; an error marks it as failed."""
    with tracer().start_as_current_span(
        name, context=parent(header), record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield current
        except Exception as error:
            current.set_status(Status(StatusCode.ERROR, str(error)[:256]))
            raise
