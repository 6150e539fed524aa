"""Spans of a request inside a replica, below the one that Ray Serve opens for it.

Where Serve does not trace a request there is no span to stand below, and nothing is recorded: a
look into a context variable is all that it costs. What exports the spans is set for Serve as a
whole (`serve.tracing`, `clip_ray.runtime.tracing`). Left out: texts, images and keys, which no span
ever holds.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.trace import Span
from opentelemetry.util.types import AttributeValue

_NAME = "clip_ray"
_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def current() -> Span | None:
    """Return the span that the caller's work belongs to, None where it is not traced."""
    found = trace.get_current_span()
    return found if found.is_recording() else None


def trace_id() -> str:
    """Return the id of the trace that the caller's work belongs to, 32 hex digits, or ""."""
    span = current()
    return "" if span is None else trace.format_trace_id(span.get_span_context().trace_id)


def spanning(
    name: str, **attributes: AttributeValue
) -> contextlib.AbstractContextManager[Span | None]:
    """Record a `with` block as a span below the current one, which it is while the block runs.

    Returns:
        What yields the span, None where nothing is traced.
    """
    if current() is None:
        return _NOTHING
    named = {f"clip.{key}": value for key, value in attributes.items()}
    return trace.get_tracer(_NAME).start_as_current_span(name, attributes=named)


def record_pass(kind: str, owners: Sequence[Span | None], start_ns: int, end_ns: int) -> None:
    """Record a forward pass below the span of each request that had rows in it.

    Afterwards, with its times: several requests share a pass, and a span has one parent.

    Args:
        kind: image or text.
        owners: of each row of the pass, the span of its request.
        start_ns: when it began, since 1970.
        end_ns: when it ended.
    """
    if owners.count(None) == len(owners):
        return  # the usual case, and counting them costs ten times as much
    for owner, rows in Counter(owners).items():
        if owner is None:
            continue
        span = trace.get_tracer(_NAME).start_span(
            "model",
            trace.set_span_in_context(owner),
            attributes={"clip.kind": kind, "clip.items": rows, "clip.batch_size": len(owners)},
            start_time=start_ns,
        )
        span.end(end_ns)
