"""Exporters of Serve's spans, by import path: functions without arguments, as Serve wants them.

Proxies and replicas call them in their own processes. Serve's own exporter writes a file a process
into the session's logs; it needs none of this.
"""

from __future__ import annotations

from typing import Any

OTLP = "clip_ray.runtime.tracing:otlp"


def otlp() -> list[Any]:
    """Return a span processor that sends spans by OTLP over HTTP, in batches of its own thread.

    Where to: OTEL_EXPORTER_OTLP_ENDPOINT of the process (http://localhost:4318 where it is not
    set), and the other variables of OpenTelemetry's.

    Raises:
        ImportError: opentelemetry-exporter-otlp-proto-http is not installed.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]
