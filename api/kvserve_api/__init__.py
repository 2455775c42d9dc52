"""The contracts between KVServe's parts: what crosses a process boundary, and nothing else.

Standard library only, so that every image can import it. Two modules have one dependency each and are imported by
name by those who have it: `kvserve_api.rpc` (protobuf, gRPC) and `kvserve_api.otel` (OpenTelemetry).
"""

__all__: list[str] = []
