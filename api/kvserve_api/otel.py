"""OpenTelemetry set-up from the standard ``OTEL_*`` variables, the same for every process.

Instrumentation uses the API package only, which costs nothing until `configure` finds an endpoint.
"""

import os
from collections.abc import Callable

from opentelemetry import metrics, trace
from opentelemetry.metrics import Counter, Histogram, Meter

from kvserve_api.telemetry import Instrument


def configure(service_name: str) -> Callable[[], None]:
    """Send traces and metrics over OTLP/HTTP where ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or its per-signal form) is set.

    A provider that the process already has, like vLLM's, is kept. Without an endpoint, or with
    ``OTEL_SDK_DISABLED=true``, nothing is set up.

    Args:
        service_name: The default of ``OTEL_SERVICE_NAME``.

    Returns:
        A function that flushes and ends what was set up here; call it before the process ends.
    """
    closers: list[Callable[[], None]] = []
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return lambda: None
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if endpoint or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        closers.append(_configure_traces(service_name))
    if endpoint or os.environ.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"):
        closers.append(_configure_metrics(service_name))

    def close() -> None:
        for closer in closers:
            closer()

    return close


def counter(meter: Meter, instrument: Instrument) -> Counter:
    """Make a counter from its constant."""
    return meter.create_counter(
        instrument.name, unit=instrument.unit, description=instrument.description
    )


def histogram(meter: Meter, instrument: Instrument) -> Histogram:
    """Make a histogram from its constant."""
    return meter.create_histogram(
        instrument.name, unit=instrument.unit, description=instrument.description
    )


def _configure_traces(service_name: str) -> Callable[[], None]:
    # the SDK is imported here, not above: an image without it has no endpoint set
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return lambda: None
    provider = TracerProvider(resource=_resource(service_name))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider.shutdown


def _configure_metrics(service_name: str) -> Callable[[], None]:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    if isinstance(metrics.get_meter_provider(), MeterProvider):
        return lambda: None
    reader = PeriodicExportingMetricReader(OTLPMetricExporter())
    provider = MeterProvider(metric_readers=[reader], resource=_resource(service_name))
    metrics.set_meter_provider(provider)
    return provider.shutdown


def _resource(service_name: str):  # type: ignore[no-untyped-def]
    from opentelemetry.sdk.resources import Resource

    return Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", service_name)})
