"""The texts and images of a request, from JSON strings and objects.

Whether an image decodes is known only when it is decoded; here its size and its first bytes are
looked at, so that most of what is wrong is refused before any work is queued.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clip_ray.config.serving import Limits
from clip_ray.eval.prompts import filled_length
from serve.documents import check_unicode, refuse_unknown, wrong
from serve.errors import ApiError

MAX_URL = 2048  # characters; longer ones break proxies on the way
_DATA_URI = re.compile(r"\s*data:[\w.+-]*/[\w.+-]*[;,]", re.IGNORECASE)
_TOKEN_IDS = (
    "holds token ids (integers), and this server takes text: LangChain's OpenAIEmbeddings needs "
    "check_embedding_ctx_length=False, the OpenAI client strings for input"
)


@dataclass(slots=True)
class Item:
    """A text or an image of a request.

    Attributes:
        param: its place in the request.
        text: the text of a text.
        image: the file of an image; empty until `url` is fetched.
        url: where the image is, for an image by URL.
    """

    param: str
    text: str | None = None
    image: bytes = b""
    url: str | None = None

    @property
    def modality(self) -> str:
        """What it is: text or image."""
        return "image" if self.text is None else "text"


def read_items(value: Any, name: str, modality: str, limits: Limits) -> list[Item]:
    """Return the texts and images of a JSON value.

    Args:
        value: a string, an object, or a list of them.
        name: the field, for errors.
        modality: what plain strings are, text or image.
        limits: of items, characters and bytes.

    Raises:
        ApiError: an item is not one, or over a limit.
    """
    if not isinstance(value, list):
        return [_read_item(value, name, modality, limits)]
    if not value:
        raise ApiError(400, "empty", f"{name} is an empty list; expected at least 1", param=name)
    if len(value) > limits.items:
        # Token ids first: "512 items" would mislead about what is wrong with them.
        _refuse_token_ids(value, name)
        raise too_many(len(value), name, limits)
    return [
        _read_item(item, f"{name}[{index}]", modality, limits) for index, item in enumerate(value)
    ]


def too_many(count: int, name: str, limits: Limits) -> ApiError:
    """Return the error of a request with more items than it may have."""
    return ApiError(
        413,
        "too_many_items",
        f"{name}: {count} items, limit {limits.items} of a request; send several requests",
        param=name,
    )


def _read_item(value: Any, param: str, modality: str, limits: Limits) -> Item:
    if isinstance(value, str):
        if modality == "image":
            return _read_image(value, param, limits)
        return read_text(value, param, limits)
    if isinstance(value, dict):
        return _read_object(value, param, limits)
    _refuse_token_ids([value], param)
    raise wrong(param, value, "a string, or an object with text or image")


def _refuse_token_ids(values: list[Any], param: str) -> None:
    """Refuse integers, and lists of them, by saying whose setting sends them."""
    first = values[0]
    if isinstance(first, list) and first:
        first = first[0]
    if type(first) is int:
        raise ApiError(400, "token_ids", f"{param} {_TOKEN_IDS}", param=param)


def _read_object(value: dict[str, Any], param: str, limits: Limits) -> Item:
    kind = value.get("type")
    if kind == "image_url":
        return _read_image_url(value, param, limits)
    if kind is not None and kind != "text":
        raise ApiError(
            400, "invalid_value", "type: expected text or image_url", param=f"{param}.type"
        )
    refuse_unknown(value, ("text", "type") if kind else ("text", "image", "type"), param)
    if ("text" in value) == ("image" in value):
        raise ApiError(
            400,
            "invalid_item",
            'expected one of {"text": "..."} and {"image": "..."}',
            param=param,
        )
    name = "text" if "text" in value else "image"
    content = value[name]
    if not isinstance(content, str):
        raise wrong(f"{param}.{name}", content, "a string")
    read = read_text if name == "text" else _read_image
    return read(content, param, limits)


def _read_image_url(value: dict[str, Any], param: str, limits: Limits) -> Item:
    """Read the shape that OpenAI's chat messages have."""
    refuse_unknown(value, ("type", "image_url"), param)
    source = value.get("image_url")
    if not isinstance(source, dict):
        raise wrong(f"{param}.image_url", source, "an object with url")
    refuse_unknown(source, ("url",), f"{param}.image_url")
    url = source.get("url")
    if not isinstance(url, str):
        raise wrong(f"{param}.image_url.url", url, "a data URI or an https URL")
    return _read_image(url, param, limits)


def read_text(text: str, param: str, limits: Limits) -> Item:
    """Return a text that is none of an image's forms.

    Raises:
        ApiError: 400 for an image or nothing, 413 for its length.
    """
    if _DATA_URI.match(text[:200]):
        raise ApiError(
            400,
            "image_as_text",
            'a data URI was given as text; for an image send {"image": "data:..."} or '
            'modality "image"',
            param=param,
        )
    check_text(text, param, limits)
    return Item(param, text=text)


def check_text(text: str, param: str, limits: Limits) -> None:
    """Refuse a text that is empty, too long, or no Unicode.

    Raises:
        ApiError: 400 or 413.
    """
    if not text:
        raise ApiError(400, "empty", "an empty text", param=param)
    if len(text) > limits.text_chars:
        raise ApiError(
            413,
            "text_too_long",
            f"{len(text)} characters, limit {limits.text_chars}; for an image as base64 say "
            'modality "image"',
            param=param,
        )
    check_unicode(text, param)


def check_prompt_lengths(labels: Sequence[str], templates: Sequence[str], limits: Limits) -> None:
    """Refuse a template that the longest label makes too long, however often it is named there.

    Raises:
        ApiError: 413.
    """
    longest = max(map(len, labels))
    for index, template in enumerate(templates):
        length = filled_length(template, longest)
        if length > limits.text_chars:
            raise ApiError(
                413,
                "text_too_long",
                f"templates[{index}] has {length} characters with the longest label in its place, "
                f"limit {limits.text_chars}",
                param=f"templates[{index}]",
            )


def _read_image(source: str, param: str, limits: Limits) -> Item:
    start = source[:8].lower()
    if start.startswith(("https://", "http://")):
        if len(source) > MAX_URL:
            raise ApiError(
                400, "invalid_url", f"a URL of more than {MAX_URL} characters", param=param
            )
        check_unicode(source, param)
        return Item(param, url=source)
    if start.startswith("data:"):
        header, comma, source = source.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise ApiError(
                400,
                "invalid_data_uri",
                "a data URI of an image is data:image/...;base64,...",
                param=param,
            )
    if len(source) > limits.image_mb * 1e6 * 1.5:  # base64, with room for line ends
        raise _image_too_large(len(source) * 3 // 4, param, limits)
    return Item(param, image=check_image(_decode_base64(source, param), param, limits))


def _decode_base64(source: str, param: str) -> bytes:
    try:
        return binascii.a2b_base64(source, strict_mode=True)
    except ValueError as error:
        # Line ends, as `base64 FILE` writes them, are the one thing that is forgiven.
        compact = source.replace("\n", "").replace("\r", "")
        if len(compact) < len(source):
            return _decode_base64(compact, param)
        why = "not ASCII" if not source.isascii() else str(error)
        raise ApiError(
            422,
            "undecodable_image",
            f"expected an image as base64, as data URI or by https URL; as base64: {why}",
            param=param,
        ) from None


def check_image(image: bytes, param: str, limits: Limits) -> bytes:
    """Return an image file whose size and first bytes are those of an image that is taken.

    Raises:
        ApiError: 413 for its size, 422 for its format.
    """
    if len(image) > limits.image_mb * 1e6:
        raise _image_too_large(len(image), param, limits)
    if not (
        image.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a"))
        or (image.startswith(b"RIFF") and image[8:12] == b"WEBP")
    ):
        raise ApiError(
            422,
            "unsupported_image",
            "expected a JPEG, PNG, WebP or GIF file" if image else "an empty image file",
            param=param,
        )
    return image


def _image_too_large(size: int, param: str, limits: Limits) -> ApiError:
    return ApiError(
        413,
        "image_too_large",
        f"image file of {size / 1e6:.1f} MB, limit {limits.image_mb:g} MB",
        param=param,
    )
