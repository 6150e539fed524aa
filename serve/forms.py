"""multipart/form-data: from the bytes of a body to its parts, in order.

The whole body is in memory by then, bounded and accounted for, so nothing is spooled to disk as
Starlette's own form parser does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serve.errors import ApiError

_PLAIN_ENCODINGS = (b"", b"binary", b"8bit", b"7bit")


@dataclass(slots=True)
class Part:
    """A part of a form; a file is a part with a file name or an image's media type."""

    name: str = ""
    data: bytes = b""
    is_file: bool = False


@dataclass(slots=True)
class _Collector:
    """The callbacks of the parser, which sees a body as slices."""

    max_parts: int
    parts: list[Part] = field(default_factory=list)
    done: bool = False
    _chunks: list[bytes] = field(default_factory=list)
    _field: bytes = b""
    _value: bytes = b""
    _headers: dict[bytes, bytes] = field(default_factory=dict)

    def callbacks(self) -> Any:
        return {name: getattr(self, name) for name in dir(self) if name.startswith("on_")}

    def on_part_begin(self) -> None:
        if len(self.parts) >= self.max_parts:
            raise ApiError(413, "too_many_parts", f"the form has more than {self.max_parts} parts")
        self.parts.append(Part())
        self._chunks, self._headers = [], {}

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field = self._value = b""

    def on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition"))
        if kind != b"form-data" or b"name" not in options:
            raise _bad_form("a part has no 'content-disposition: form-data; name=...'")
        encoding = self._headers.get(b"content-transfer-encoding", b"").strip().lower()
        if encoding not in _PLAIN_ENCODINGS:
            raise _bad_form("content-transfer-encoding is not supported; send the bytes")
        part = self.parts[-1]
        # Browsers send names as UTF-8 bytes; the parser hands every byte over as one character.
        part.name = options[b"name"].decode("utf-8", "replace")
        media_type = self._headers.get(b"content-type", b"").strip().lower()
        part.is_file = b"filename" in options or media_type.startswith(b"image/")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._chunks.append(data[start:end])

    def on_part_end(self) -> None:
        chunks = self._chunks
        self.parts[-1].data = chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def on_end(self) -> None:
        self.done = True


def read_form(body: bytes, content_type: str, max_parts: int) -> list[Part]:
    """Return the parts of a form, in order.

    Raises:
        ApiError: 400 for what is no whole form, 413 for too many parts.
    """
    collector = _Collector(max_parts)
    try:
        _, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if not boundary:
            raise _bad_form("content-type names no boundary; let your client set the header")
        parser = MultipartParser(boundary, collector.callbacks())
        parser.write(body)
        parser.finalize()
    except (FormParserError, UnicodeError) as error:
        # The parser's own words hold offsets and single characters, nothing of the content.
        raise _bad_form(str(error)) from error
    if not collector.done:
        raise _bad_form("it ends before its last boundary")
    return collector.parts


def text_of(part: Part) -> str:
    """Return the text of a part.

    Raises:
        ApiError: 400 for bytes that are not UTF-8.
    """
    try:
        return part.data.decode("utf-8")
    except UnicodeDecodeError:
        raise ApiError(
            400, "invalid_unicode", "a text part is not UTF-8", param=part.name[:100]
        ) from None


def _bad_form(why: str) -> ApiError:
    return ApiError(400, "invalid_form", f"body is no multipart/form-data: {why}")
