"""A request's body as a JSON object whose members are taken one by one.

JSON is read more strictly than Python reads it: UTF-8 only, no name twice, no NaN, no member that
the API does not know. Whatever is wrong is a refusal that names the place.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from serve.errors import ApiError

# A value of JSON costs up to 36 times its bytes in memory ("{},"), so 20 MB of them would hold
# 700 MB. No honest body comes near: base64 has no commas, the texts and labels of one have fewer.
MAX_COMMAS = 1_000_000
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Body:
    """A request's body as it came.

    Attributes:
        data: all of it.
        content_type: the header, whole.
        query: the query string; options of a body that is an image.
    """

    data: bytes
    content_type: str
    query: str = ""

    @property
    def media_type(self) -> str:
        """The content type without its parameters."""
        return self.content_type.partition(";")[0].strip().lower()


def load_json(data: bytes) -> Any:
    """Return the value of a JSON document; a UTF-8 byte order mark is skipped.

    Raises:
        ApiError: 400 for what is not JSON in UTF-8, has a name twice, or NaN and Infinity.
    """
    if len(data) > MAX_COMMAS and data.count(b",") > MAX_COMMAS:
        raise ApiError(413, "too_many_values", f"body has more than {MAX_COMMAS} commas")
    try:
        # Decoded here: given bytes, json.loads would guess at UTF-16 and UTF-32 as well.
        text = data.removeprefix(_BOM).decode("utf-8")
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _bad_json(str(error)) from None
    except UnicodeDecodeError as error:
        raise _bad_json(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise _bad_json("nested too deeply") from None
    except ValueError:  # int() refuses more than 4,300 digits
        raise _bad_json("a number has too many digits") from None


class Fields:
    """The members of a JSON object, form or query string; null counts as absent.

    Args:
        members: by name.
        known: the names that the API takes.
        as_text: numbers are strings of digits, as in forms and query strings.

    Raises:
        ApiError: 400 for a name that is not known; so do the methods for a value of a wrong kind.
    """

    def __init__(
        self, members: dict[str, Any], known: Collection[str], *, as_text: bool = False
    ) -> None:
        refuse_unknown(members, known)
        self._members = members
        self._as_text = as_text

    def get(self, name: str) -> Any:
        """Return a member as it came, None where it is absent."""
        return self._members.get(name)

    def needed(self, name: str) -> Any:
        """Return a member that must be there."""
        value = self._members.get(name)
        if value is None:
            raise ApiError(400, "missing_field", f"field {name!r} is needed", param=name)
        return value

    def string(self, name: str, longest: int = 1000) -> str | None:
        """Return a string of at most `longest` characters."""
        value = self._members.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise wrong(name, value, "a string")
        if len(value) > longest:
            raise ApiError(
                400, "invalid_value", f"{name} has more than {longest} characters", param=name
            )
        check_unicode(value, name)
        return value

    def choice(self, name: str, choices: Sequence[str]) -> str | None:
        """Return a string that is one of `choices`."""
        value = self.string(name)
        if value is not None and value not in choices:
            expected = " or ".join(choices)
            raise ApiError(
                400, "invalid_value", f"{name} {value[:100]!r}: expected {expected}", param=name
            )
        return value

    def integer(self, name: str) -> int | None:
        """Return an integer of 1 or more."""
        value = self._members.get(name)
        if value is None:
            return None
        if self._as_text and re.fullmatch("[0-9]{1,9}", value):
            value = int(value)
        if type(value) is not int:
            raise wrong(name, value, "an integer")
        if not 1 <= value < 10**9:
            raise ApiError(400, "invalid_value", f"{name}: expected 1 or more", param=name)
        return value

    def flag(self, name: str) -> bool | None:
        """Return a boolean."""
        value = self._members.get(name)
        if value is not None and not isinstance(value, bool):
            raise wrong(name, value, "true or false")
        return value


def load(body: Body) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
        ApiError: 400 for what is none, 415 for another character set than UTF-8.
    """
    parameters = body.content_type.lower().partition(";")[2]
    charset = re.search(r"charset\s*=\s*\"?([^\s;\"]+)", parameters)
    if charset and charset[1] not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError(415, "unsupported_charset", "JSON comes in UTF-8; leave the charset out")
    document = load_json(body.data)
    if not isinstance(document, dict):
        raise ApiError(400, "invalid_json", f"body is {_kind(document)}; expected a JSON object")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _bad_json(f"field {name[:100]!r} appears twice in one object")
            seen.add(name)
    return members


def _no_constant(name: str) -> NoReturn:
    raise _bad_json(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _bad_json(why: str) -> ApiError:
    return ApiError(400, "invalid_json", f"body cannot be read as JSON: {why}")


def refuse_unknown(members: Collection[str], known: Collection[str], param: str = "") -> None:
    """Refuse a name that is not known, and say which one is near it.

    Raises:
        ApiError: 400.
    """
    for name in members:
        if name not in known:
            near = difflib.get_close_matches(name[:100], known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            place = f"{param}.{name[:100]}" if param else name[:100]
            raise ApiError(
                400, "unknown_field", f"unknown field {name[:100]!r}; {hint}", param=place
            )


def _kind(value: Any) -> str:
    names: dict[type, str] = {
        dict: "an object", list: "a list", str: "a string", bool: "true or false",
        int: "a number", float: "a number", type(None): "null",
    }  # fmt: skip
    return names[type(value)]


def wrong(name: str, value: Any, expected: str) -> ApiError:
    """Return the error of a value of a wrong kind; it may be huge, so it is not shown."""
    return ApiError(
        400, "invalid_type", f"{name} is {_kind(value)}; expected {expected}", param=name
    )


def wrong_type(body: Body, known: Sequence[str]) -> ApiError:
    """Return the error of a body of a media type that is not among `known`."""
    shown = body.media_type[:100] or "missing"
    hint = ""
    if body.media_type == "application/x-www-form-urlencoded":
        hint = "; with curl add -H 'content-type: application/json'"
    return ApiError(
        415,
        "unsupported_media_type",
        f"content-type {shown!r}: expected {', '.join(known)}{hint}",
    )


def check_unicode(text: str, param: str) -> None:
    """Refuse what JSON can write and UTF-8 cannot: one half of a surrogate pair.

    Raises:
        ApiError: 400.
    """
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(
            400, "invalid_unicode", "half a surrogate pair is no character", param=param
        ) from None
