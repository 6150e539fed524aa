"""Spans of a replica: below the span that Serve opens for a request, each trace its own."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from ray.serve._private import tracing_utils

from clip_ray.registry import ServedModel
from clip_ray.runtime import tracing as exporters
from tests.serve.models import picture
from tests.serve.support import JSON, Answer, Site, call, data_uri, running

EMBED = "/v1/embeddings"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Return what every span of the test ends in; the process's own provider stays as it is."""
    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return kept


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory, served: ServedModel) -> Iterator[Site]:
    """A replica whose passes wait long enough for two requests to share one."""
    folder = tmp_path_factory.mktemp("patient")
    with running(Site(folder, served, {"batching": {"wait_ms": 300}})) as site:
        yield site


async def ask(site: Site, body: dict[str, Any], traced: bool = True) -> Answer:
    """Ask as Serve's replica does: with its span around the application."""
    payload = [json.dumps(body).encode()]
    if not traced:
        return await call(site.app, "POST", EMBED, payload, JSON)
    with trace.get_tracer("serve").start_as_current_span("replica"):
        return await call(site.app, "POST", EMBED, payload, JSON)


def by_trace(spans: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    found: dict[str, list[ReadableSpan]] = {}
    for span in spans.get_finished_spans():
        found.setdefault(trace.format_trace_id(span.context.trace_id), []).append(span)
    return found


def test_a_request_is_one_trace_with_its_decoding_and_its_passes(
    site: Site, spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "clip_ray.access")
    images = [{"image": data_uri(picture(n))} for n in range(2)]
    answer = site.run(ask(site, {"input": [*images, "nobody has asked this before"]}))
    assert answer.status == 200
    ((number, mine),) = by_trace(spans).items()
    assert answer.headers["x-trace-id"] == number
    (line,) = (json.loads(r.getMessage()) for r in caplog.records if r.name == "clip_ray.access")
    assert line["trace"] == number
    (replica,) = (span for span in mine if span.name == "replica")
    names = {span.context.span_id: span.name for span in mine}
    tree = sorted((span.name, names[span.parent.span_id]) for span in mine if span.parent)
    assert set(tree) == {("decode", "replica"), ("encode", "replica"), ("model", "encode")}
    (decode,) = (span for span in mine if span.name == "decode")
    assert decode.attributes["clip.items"] == 2 and decode.attributes["clip.bytes"] > 100
    encodes = {s.attributes["clip.kind"]: s.attributes["clip.items"] for s in mine
               if s.name == "encode"}  # fmt: skip
    assert encodes == {"image": 2, "text": 1}
    passes = [span for span in mine if span.name == "model"]
    for kind, items in encodes.items():
        theirs = [p.attributes for p in passes if p.attributes["clip.kind"] == kind]
        assert sum(a["clip.items"] for a in theirs) == items
        assert all(a["clip.batch_size"] >= a["clip.items"] for a in theirs)
    for span in passes:
        assert replica.start_time <= span.start_time <= span.end_time <= replica.end_time
    text = json.dumps([span.to_json() for span in mine])
    assert "nobody has asked" not in text and "base64" not in text


def test_a_shared_pass_is_in_the_trace_of_each_request_and_in_no_other(
    patient: Site, spans: InMemorySpanExporter
) -> None:
    async def three() -> list[Answer]:
        bodies = [{"input": [f"{word} {n}" for n in range(2)]} for word in ("a", "b", "c")]
        return await asyncio.gather(
            *(ask(patient, body, traced=n < 2) for n, body in enumerate(bodies))
        )

    answers = patient.run(three())
    found = by_trace(spans)
    assert len(found) == 2
    assert {answer.headers["x-trace-id"] for answer in answers[:2]} == set(found)
    assert "x-trace-id" not in answers[2].headers
    for mine in found.values():
        (one,) = (span for span in mine if span.name == "model")
        # Six rows in the pass, two of them this request's, two those of one that is not traced.
        assert (one.attributes["clip.items"], one.attributes["clip.batch_size"]) == (2, 6)


def test_what_is_not_traced_or_not_sampled_leaves_nothing(
    site: Site, spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "clip_ray.access")
    off = TracerProvider(sampler=ALWAYS_OFF).get_tracer("serve")

    async def unsampled() -> Answer:
        with off.start_as_current_span("replica"):
            return await ask(site, {"input": "a"}, traced=False)

    for answer in (site.run(ask(site, {"input": "a"}, traced=False)), site.run(unsampled())):
        assert answer.status == 200 and "x-trace-id" not in answer.headers
    assert spans.get_finished_spans() == ()
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "clip_ray.access"]
    assert len(lines) == 2 and not any("trace" in line for line in lines)


def test_a_refused_image_is_an_error_of_its_span(site: Site, spans: InMemorySpanExporter) -> None:
    broken = {"image": data_uri(picture(0)[:60])}
    assert site.run(ask(site, {"input": broken})).status == 422
    (decode,) = (span for span in spans.get_finished_spans() if span.name == "decode")
    assert decode.status.status_code == trace.StatusCode.ERROR


# Where they go


def test_serve_takes_the_exporter_that_we_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tracing_utils.import_attr(exporters.OTLP)
    assert found is exporters.otlp
    tracing_utils._validate_tracing_exporter(found)
    with pytest.raises(TypeError):
        tracing_utils._validate_tracing_exporter(lambda file: [])


def test_otlp_sends_the_spans_to_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        processors = exporters.otlp()
        tracing_utils._validate_tracing_exporter_processors(processors)
        provider = TracerProvider()
        provider.add_span_processor(processors[0])
        with provider.get_tracer("t").start_as_current_span("one") as span:
            number = span.get_span_context().trace_id
        assert provider.force_flush(20_000)
        provider.shutdown()
    finally:
        server.shutdown()
        server.server_close()
    ((path, body),) = got
    assert path == "/v1/traces"
    request = ExportTraceServiceRequest.FromString(body)
    (sent,) = request.resource_spans[0].scope_spans[0].spans
    assert (sent.name, int.from_bytes(sent.trace_id)) == ("one", number)


def test_the_optional_exporter_is_pinned_for_the_image() -> None:
    root = Path(__file__).parents[2]
    lines = (root / "cluster/requirements.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    constraints = dict(
        line.split("==") for line in (root / "constraints.txt").read_text().split() if "==" in line
    )
    # Of one release with the API and SDK that Ray brings.
    name = "opentelemetry-exporter-otlp-proto-http"
    assert pinned[name] == constraints["opentelemetry-sdk"]
