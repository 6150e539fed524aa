"""API keys: the file that jobs/keys.py writes, and what a serving replica knows of it.

A key is shown once, when it is made; the file holds its SHA-256. A plain hash is enough for 128
random bits: there is no dictionary to try. Left out: who asks for what (serve's middleware).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import math
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from clip_ray.config.schema import Section
from clip_ray.errors import ConfigError

FORMAT: Final = 1
# infer: embeddings, classify, rank, models, reading classifiers; classifiers: PUT and DELETE.
SCOPES = ("infer", "classifiers")
LOCK_S = 10  # wait for another writer, who needs milliseconds
_PREFIX = "cr-"
_SPAN = re.compile(r"(\d+)([dhm])")
_UNITS = {"d": "days", "h": "hours", "m": "minutes"}


def _known_scope(scope: str) -> str:
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}; scopes are {', '.join(SCOPES)}")
    return scope


# The name goes into logs and the id into paths: nothing in them that either could trip over.
_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Entry(Section):
    """A key as the file holds it."""

    id: _Word
    name: _Word
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: tuple[Annotated[str, AfterValidator(_known_scope)], ...] = Field(min_length=1)
    rate: _Rate | None
    expires: AwareDatetime | None
    created: AwareDatetime

    def key(self) -> Key:
        return Key(
            self.id, self.name, frozenset(self.scopes), self.rate, self.expires, self.created
        )


class _File(Section):
    """The whole file."""

    format: Literal[1] = FORMAT
    keys: tuple[_Entry, ...] = ()

    @model_validator(mode="after")
    def _unique(self) -> _File:
        for field in ("id", "name", "sha256"):
            values = [getattr(entry, field) for entry in self.keys]
            if len(set(values)) < len(values):
                raise ValueError(f"two keys have the same {field}; remove one")
        return self


@dataclass(frozen=True)
class Key:
    """What is known of a key; the key itself is not.

    Attributes:
        id: unique and never used again; a key's stored classifiers lie under it.
        name: unique, for people and logs.
        scopes: of SCOPES.
        rate: requests per second, sustained, at each replica; None = no limit.
        expires: the moment from which it is refused; None = never.
        created: when it was made.
    """

    id: str
    name: str
    scopes: frozenset[str]
    rate: float | None
    expires: datetime | None
    created: datetime | None = None

    def expired(self, now: datetime) -> bool:
        """Tell whether the key is refused at `now`."""
        return self.expires is not None and now >= self.expires


def create(
    file: str,
    name: str,
    scopes: Iterable[str] = ("infer",),
    rate: float | None = None,
    expires: datetime | None = None,
) -> tuple[str, Key]:
    """Make a key and add it to the file, which is made where there is none (mode 0600).

    Returns:
        The key, which nothing can show again, and what the file says of it.

    Raises:
        ConfigError: a name that is taken or not allowed, an unknown scope, a rate or an expiry
            that cannot be meant, a file that cannot be read or written.
    """
    wanted = frozenset(scopes)
    if not wanted:
        raise ConfigError(f"key {name!r}: no scope given; scopes are {', '.join(SCOPES)}")
    for scope in wanted:
        try:
            _known_scope(scope)
        except ValueError as error:
            raise ConfigError(f"key {name!r}: {error}") from None
    if rate is not None and not (rate > 0 and math.isfinite(rate)):
        raise ConfigError(
            f"rate {rate}: expected requests per second above 0; leave it out for no limit"
        )
    now = datetime.now(UTC).replace(microsecond=0)
    if expires is not None and expires.tzinfo is None:
        raise ConfigError(f"expires {expires}: a moment without time zone; add +00:00")
    if expires is not None and expires <= now:
        raise ConfigError(f"expires {expires.isoformat()}: in the past; give a later moment")
    _check_name(name)
    key = _PREFIX + secrets.token_hex(16)
    entry = _Entry(
        id=secrets.token_hex(6),
        name=name,
        sha256=_digest(key),
        scopes=tuple(scope for scope in SCOPES if scope in wanted),
        rate=rate,
        expires=expires,
        created=now,
    )
    with _changing(file) as path:
        held = _parse(file, path.read_bytes()) if path.exists() else _File()
        if any(name in (other.name, other.id) for other in held.keys):
            raise ConfigError(
                f"key {name!r} exists in {file}; choose another name, or revoke that one first"
            )
        _replace(path, _File(keys=(*held.keys, entry)))
    return key, entry.key()


def listed(file: str) -> list[Key]:
    """Return what the file says of its keys, in the order of their making.

    Raises:
        ConfigError: there is no file, or it is no keys file.
    """
    return [entry.key() for entry in _parse(file, _read(file)).keys]


def revoke(file: str, id_or_name: str) -> Key:
    """Take a key out of the file; return what the file said of it.

    Raises:
        ConfigError: there is no such key, or the file cannot be read or written.
    """
    _read(file)  # before the lock: a wrong path leaves nothing behind
    with _changing(file) as path:
        held = _parse(file, path.read_bytes())
        kept = tuple(entry for entry in held.keys if id_or_name not in (entry.id, entry.name))
        gone = [entry for entry in held.keys if entry not in kept]
        if not gone:
            raise ConfigError(
                f"key {id_or_name!r}: not in {file}; `jobs/keys.py list` shows ids and names"
            )
        _replace(path, _File(keys=kept))
    return gone[0].key()


def table(keys: Iterable[Key], now: datetime) -> str:
    """Return keys as lines of text under a heading; nothing in it opens anything."""
    rows = [("id", "name", "scopes", "rate", "created", "expires", "state")]
    for key in keys:
        scopes = ",".join(scope for scope in SCOPES if scope in key.scopes)
        rate = "-" if key.rate is None else f"{key.rate:g}/s"
        state = "expired" if key.expired(now) else "active"
        rows.append(
            (key.id, key.name, scopes, rate, _shown(key.created), _shown(key.expires), state)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def parse_expiry(text: str, now: datetime) -> datetime:
    """Return the moment that `30d`, `12h`, `90m` (from `now`) or an ISO date and time mean.

    A moment without a time zone is UTC's.

    Raises:
        ConfigError: it is none of these.
    """
    try:
        if span := _SPAN.fullmatch(text):
            return now + timedelta(**{_UNITS[span[2]]: int(span[1])})
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ConfigError(
            f"expires {text!r}: expected a span like 30d, 12h or 90m, or a moment like 2030-01-31 "
            "or 2030-01-31T12:00:00+00:00"
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class KeyRing:
    """The keys of a file as a replica holds them; what changes in the file is seen within seconds.

    Args:
        file: path of the file, or of the mounted secret that holds it.
        reread_s: seconds after which a `find` looks at the file again.
        clock: seconds, monotonic.
        now: the wall clock, for expiry.

    Raises:
        ConfigError: the file cannot be read: a replica without keys refuses everybody, and must
            not come up.
    """

    def __init__(
        self,
        file: str,
        reread_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._file = file
        self._reread_s = reread_s
        self._clock = clock
        self._now = now
        self._seen: tuple[int, int, int] | None = None
        self._entries: list[tuple[str, Key]] = []
        self._is_broken = False
        self._looked_at = clock()
        self._load()

    def find(self, presented: str) -> Key | None:
        """Return the key that was presented; None where it is unknown, revoked or expired."""
        if self._clock() - self._looked_at >= self._reread_s:
            self._looked_at = self._clock()
            self._reload()
        digest = _digest(presented)
        found = None
        # All entries, each in constant time: how long this takes tells nothing about a key. A
        # thousand keys cost 0.2 ms.
        for sha256, key in self._entries:
            if hmac.compare_digest(sha256, digest):
                found = key
        return None if found is None or found.expired(self._now()) else found

    def _reload(self) -> None:
        try:
            self._load()
            self._is_broken = False
        except ConfigError as error:
            # A slip in an editor must not lock everybody out; what is known stays known.
            if not self._is_broken:
                logging.getLogger(__name__).warning("keys stay as they were: %s", error)
            self._is_broken = True

    def _load(self) -> None:
        """Read the file where it is not the one that was read last."""
        try:
            with open(self._file, "rb") as file:
                # Of the open file: a mounted secret is swapped by a link above it.
                stat = os.fstat(file.fileno())
                seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
                if seen == self._seen:
                    return
                data = file.read()
        except OSError as error:
            raise _unreadable(self._file, error) from error
        self._entries = [(entry.sha256, entry.key()) for entry in _parse(self._file, data).keys]
        self._seen = seen


class RateLimiter:
    """A token bucket for each key, of max(1, rate) requests, filled with `rate` a second."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # id -> tokens, when counted

    def take(self, key: Key) -> float:
        """Take a request of the key's share; return 0.0, or the seconds until there is one."""
        if key.rate is None:
            return 0.0
        now, burst = self._clock(), max(1.0, key.rate)
        tokens, counted = self._buckets.get(key.id, (burst, now))
        tokens = min(burst, tokens + (now - counted) * key.rate)
        # Who waits exactly as long as told must not fail by a rounding.
        is_enough = tokens >= 1 - 1e-6
        self._buckets[key.id] = (max(0.0, tokens - 1) if is_enough else tokens, now)
        return 0.0 if is_enough else (1 - tokens) / key.rate


def _shown(moment: datetime | None) -> str:
    return "-" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}Z"


def _digest(key: str) -> str:
    # A header may hold anything; what is no text equals no key.
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def _check_name(name: str) -> None:
    try:
        TypeAdapter(_Word).validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"key name {name!r}: expected a letter or digit, then up to 63 letters, digits, "
            "dots, dashes and underscores"
        ) from None


def _unreadable(file: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"{file}: cannot read the keys ({error.strerror}); make a key with "
        "`jobs/keys.py create --file FILE --name NAME`, or correct the path"
    )


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from error


def _parse(file: str, data: bytes) -> _File:
    way_out = "restore the file, or make a new one with jobs/keys.py create"
    try:
        tree: Any = json.loads(data)
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error}); {way_out}") from None
    written = tree.get("format") if isinstance(tree, dict) else None
    if isinstance(written, int) and written > FORMAT:
        raise ConfigError(f"{file}: format {written}, this CLIP-Ray reads {FORMAT}; upgrade it")
    try:
        return _File.model_validate(tree)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in detail["loc"])
        value = detail["input"]
        # Somebody may have put a key where its digest belongs, and this goes into logs.
        is_shown = "sha256" not in detail["loc"] and isinstance(value, str | int | float | None)
        place = f"{where} {value!r}".strip() if is_shown else where
        message = detail["msg"].removeprefix("Value error, ")
        said = [file, place, f"{message}; {way_out}"]
        raise ConfigError(": ".join(filter(None, said))) from None


@contextlib.contextmanager
def _changing(file: str) -> Iterator[Path]:
    """Hold the file's lock: of two writers at once, one would undo the other's change.

    Yields:
        The path to write: a link's target, so that the link stays.

    Raises:
        ConfigError: another writer has had the lock for LOCK_S; the file cannot be written.
    """
    path = Path(os.path.realpath(file))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The lock stays: deleting it would let a waiting writer and a new one both in.
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(lock, file)
            yield path
        finally:
            os.close(lock)
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot change the keys ({error.strerror}); a mounted secret is read-only: "
            "change the file that it is made from"
        ) from error


def _lock(descriptor: int, file: str) -> None:
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"{file}: another process has changed the keys for {LOCK_S:g} s and not "
                    f"finished; end what holds {file}.lock, then try again"
                ) from None
        time.sleep(0.05)


def _replace(path: Path, content: _File) -> None:
    """Write the file so that a reader sees the old keys or the new, and nobody else sees any."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
    try:
        with open(descriptor, "w") as file:
            json.dump(content.model_dump(mode="json"), file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
