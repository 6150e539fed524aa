"""A directory, local or on S3, behind the few operations that the project needs.

Everything that outlives a process (checkpoints, journals, manifests, exports) goes through here,
so that "written completely" and "created by nobody else" mean the same on both.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from clip_ray.config import S3Options
from clip_ray.errors import ConfigError, DataError, StorageError

if TYPE_CHECKING:
    from clip_ray.storage.s3_writes import Client

# What a network file system answers while its server is away or comes back. Not what stays as it
# is: a file that is not there, or not ours to read.
_PASSING = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN),
        *(errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
    }
)
_PAUSES_S = (0.1, 0.5, 2.0, 5.0)  # before a local read is tried again
_CONFLICT_S = 30  # seconds that a creation waits for others of the same file
_FEW = 8  # files of one S3 folder that are asked for one by one
T = TypeVar("T")
_BRACE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class FileInfo:
    """What identifies the content of a file without reading it.

    Attributes:
        path: the file's full path or s3:// URI.
        size: bytes.
        version: the ETag on S3, the modification time in nanoseconds on a local disk.
    """

    path: str
    size: int
    version: str


class ChangedError(OSError):
    """A file that is not the one that was asked for.

    Attributes:
        now: what is there in its place.
    """

    def __init__(self, expected: FileInfo, now: FileInfo) -> None:
        super().__init__(
            f"{expected.path}: expected {expected.size} bytes, version {expected.version}; now "
            f"{now.size} bytes, version {now.version}"
        )
        self._expected, self.now = expected, now

    def __reduce__(self) -> tuple[Any, ...]:
        return (ChangedError, (self._expected, self.now))


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes and sha256 (hex) of a file's content."""

    size: int
    sha256: str


def digest_bytes(data: bytes) -> FileDigest:
    """Return size and sha256 of `data`."""
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())


def digest_file(path: Path) -> FileDigest:
    """Return size and sha256 of a local file, read in pieces."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return FileDigest(path.stat().st_size, sha256)


class Store(Protocol):
    """A directory. Names are relative, with `/`; all calls raise OSError kinds on I/O failure."""

    def __hash__(self) -> int:
        """Stores of the same directory are equal."""

    @property
    def uri(self) -> str:
        """Absolute path or s3:// URI of this directory."""

    def child(self, name: str) -> Store:
        """Return the directory `name` in this one; it need not exist."""

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        expected: FileInfo | None = None,
    ) -> bytes:
        """Return the bytes `[start, stop)` of a file; the whole of it by default.

        Args:
            name: of the file.
            start: first byte.
            stop: the byte after the last; none = the file's end.
            expected: the file that it has to be, by size and version. This costs no request of
                its own, and nothing can come between the question and the bytes.

        Raises:
            ChangedError: it is another one.
            FileNotFoundError: there is none.
        """

    def write(self, name: str, data: bytes) -> None:
        """Write a file so that a reader sees the old content or the new, never a part."""

    def create(self, name: str, data: bytes) -> None:
        """Write a file that must not exist yet; exactly one of several callers succeeds.

        `data` must be unique to the caller (hold its process id, say): a retried request whose
        first try did arrive is told apart from a lost race by the content.

        Raises:
            FileExistsError: somebody has created it.
        """

    def put(self, name: str, fill: Callable[[Path], None]) -> FileDigest:
        """Write a large file: `fill` writes it at the local path it is given.

        The file appears whole and durable, or not at all.
        """

    def download(self, name: str, local: Path) -> None:
        """Copy the file `name` to a local path."""

    def info(self, name: str) -> FileInfo:
        """Return size and version of a file. Raises FileNotFoundError."""

    def files(self) -> list[str]:
        """Return the names of all files below, sorted; empty where there is nothing."""

    def directories(self) -> list[str]:
        """Return the names of the directories directly below, sorted."""

    def delete(self, name: str) -> None:
        """Delete a file or directory with all below it; nothing there is no error."""

    def exists(self, name: str) -> bool:
        """Tell whether the file `name` exists."""


def open_store(uri: str | os.PathLike[str], s3: S3Options | None = None) -> Store:
    """Return the store at a path or s3:// URI; the directory need not exist."""
    text = os.fspath(uri)
    if text.startswith("s3://"):
        return S3Store(text.rstrip("/"), s3 or S3Options())
    if "://" in text:
        scheme = text.split("://", 1)[0]
        raise ConfigError(f"{text}: cannot read {scheme}://; use a local path or s3://")
    return LocalStore(Path(text).absolute())


@dataclass(frozen=True)
class LocalStore:
    """A directory of the local (or a shared, mounted) file system."""

    root: Path

    @property
    def uri(self) -> str:  # noqa: D102 - see Store
        return str(self.root)

    def child(self, name: str) -> LocalStore:  # noqa: D102
        return LocalStore(self.root / name)

    def read(  # noqa: D102
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        expected: FileInfo | None = None,
    ) -> bytes:
        def read() -> bytes:
            with open(self.root / name, "rb") as file:
                if expected is not None:
                    now = _info(self.root / name, os.fstat(file.fileno()))
                    if (now.size, now.version) != (expected.size, expected.version):
                        raise ChangedError(expected, now)
                file.seek(start)
                return file.read() if stop is None else file.read(stop - start)

        return _persist(read)

    def write(self, name: str, data: bytes) -> None:  # noqa: D102
        path = self.root / name
        with self._temporary(path) as temporary:
            _write_durably(temporary, data)
            os.replace(temporary, path)
        _sync_directory(path.parent)

    def create(self, name: str, data: bytes) -> None:  # noqa: D102
        path = self.root / name
        # A hard link appears with its whole content at once and fails where the name exists:
        # O_EXCL alone would show other readers an empty file first.
        with self._temporary(path) as temporary:
            _write_durably(temporary, data)
            os.link(temporary, path)
        _sync_directory(path.parent)

    @contextlib.contextmanager
    def _temporary(self, path: Path) -> Iterator[Path]:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def put(self, name: str, fill: Callable[[Path], None]) -> FileDigest:  # noqa: D102
        path = self.root / name
        with self._temporary(path) as temporary:
            fill(temporary)
            digest = digest_file(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        _sync_directory(path.parent)
        return digest

    def download(self, name: str, local: Path) -> None:  # noqa: D102
        local.parent.mkdir(parents=True, exist_ok=True)
        _persist(lambda: shutil.copyfile(self.root / name, local))

    def info(self, name: str) -> FileInfo:  # noqa: D102
        path = self.root / name
        return _info(path, _persist(path.stat))

    def files(self) -> list[str]:  # noqa: D102
        return sorted(
            str((Path(folder) / name).relative_to(self.root))
            for folder, _, names in os.walk(self.root)
            for name in names
            if not name.endswith(".tmp")
        )

    def directories(self) -> list[str]:  # noqa: D102
        if not self.root.is_dir():
            return []
        return sorted(entry.name for entry in self.root.iterdir() if entry.is_dir())

    def delete(self, name: str) -> None:  # noqa: D102
        path = self.root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def exists(self, name: str) -> bool:  # noqa: D102
        return (self.root / name).is_file()


@dataclass(frozen=True)
class S3Store:
    """A prefix of an S3 bucket, through s3fs."""

    root: str
    options: S3Options
    _clients: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # The clients hold an event loop: each process makes its own.
        return (S3Store, (self.root, self.options))

    @property
    def client(self) -> Client:
        """The client, made at first use."""
        if "client" not in self._clients:
            from clip_ray.storage.s3_writes import Client

            options = self.options
            self._clients["client"] = Client(
                timeout_s=options.timeout_s,
                retry_s=options.retry_s,
                hedge=options.hedge,
                anon=options.anonymous,
                profile=options.profile,
                endpoint_url=options.endpoint,
                client_kwargs={"region_name": options.region} if options.region else {},
                config_kwargs={
                    "connect_timeout": min(10, options.timeout_s),
                    "read_timeout": options.timeout_s,
                    "retries": {"total_max_attempts": 1, "mode": "standard"},
                    # A second GET must not queue behind those that it is to overtake.
                    "max_pool_connections": 64,
                },
                # Other processes write here too: a cached listing would hide their files.
                use_listings_cache=False,
            )
        return cast("Client", self._clients["client"])

    @property
    def uri(self) -> str:  # noqa: D102
        return self.root

    def child(self, name: str) -> S3Store:  # noqa: D102
        return S3Store(f"{self.root}/{name}", self.options, self._clients)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def read(  # noqa: D102
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        expected: FileInfo | None = None,
    ) -> bytes:
        from clip_ray.storage.s3_reads import status_of

        if stop is not None and stop <= start:
            return b""
        parts: dict[int, bytes] = {}
        etag = "" if expected is None else f'"{expected.version}"'
        try:
            with self._explained():
                size, found = self.client.read_parts(
                    self._path(name), start, stop, parts.__setitem__, etag
                )
        except OSError as error:
            if expected is None or status_of(error) != 412:
                raise
        else:
            # Compared here too: not every store heeds If-Match.
            identity = (size, found.strip('"'))
            if expected is None or identity == (expected.size, expected.version):
                return b"".join(parts[at] for at in sorted(parts))
        now = self.info(name)
        if (now.size, now.version) == (expected.size, expected.version):
            raise StorageError(
                f"{now.path}: the store has it with ETag {etag}, and refuses a read of that ETag"
            )
        raise ChangedError(expected, now)

    def write(self, name: str, data: bytes) -> None:  # noqa: D102
        with self._explained():
            self.client.write_bytes(self._path(name), data)

    def create(self, name: str, data: bytes) -> None:  # noqa: D102
        from clip_ray.storage.s3_reads import status_of

        deadline = time.monotonic() + _CONFLICT_S
        while True:
            try:
                with self._explained():
                    self.client.write_bytes(self._path(name), data, exclusive=True)
                return
            except OSError as error:
                if status_of(error) == 412:
                    if self.read(name) == data:
                        return
                    raise FileExistsError(self._path(name)) from error
                # 409: another creation is under way; S3 asks to try again, and either may win.
                if status_of(error) != 409 or time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def put(self, name: str, fill: Callable[[Path], None]) -> FileDigest:  # noqa: D102
        with tempfile.TemporaryDirectory(prefix="clip-ray-") as folder, self._explained():
            local = Path(folder) / "part"
            fill(local)
            self.client.write_file(self._path(name), local)
            return digest_file(local)

    def download(self, name: str, local: Path) -> None:  # noqa: D102
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._explained(), open(local, "wb") as file:

                def put(at: int, data: bytes) -> None:
                    file.seek(at)
                    file.write(data)

                self.client.read_parts(self._path(name), 0, None, put)
        except BaseException:
            local.unlink(missing_ok=True)
            raise

    def info(self, name: str) -> FileInfo:  # noqa: D102
        with self._explained():
            found = self.client.info(self._path(name))
        if found["type"] != "file":
            raise FileNotFoundError(self._path(name))
        return FileInfo(self._path(name), found["size"], str(found["ETag"]).strip('"'))

    def files(self) -> list[str]:  # noqa: D102
        with self._explained():
            found = self.client.find(self.root)
        prefix = self.root.removeprefix("s3://") + "/"
        return sorted(path.removeprefix(prefix) for path in found if path.startswith(prefix))

    def directories(self) -> list[str]:  # noqa: D102
        with self._explained():
            try:
                found = self.client.ls(self.root, detail=True)
            except FileNotFoundError:
                return []
        return sorted(e["name"].rsplit("/", 1)[-1] for e in found if e["type"] == "directory")

    def delete(self, name: str) -> None:  # noqa: D102
        with self._explained():
            self.client.delete_below(self._path(name))

    def exists(self, name: str) -> bool:  # noqa: D102
        # Not s3fs's isfile: it takes any failure for an answer.
        try:
            self.info(name)
        except FileNotFoundError:
            return False
        return True

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what a user can mend (bucket, credentials, endpoint) into our own words."""
        from botocore.exceptions import BotoCoreError, NoCredentialsError, ProfileNotFound

        bucket = self.root.removeprefix("s3://").split("/", 1)[0]
        try:
            yield
        except NoCredentialsError as error:
            raise ConfigError(
                f"{self.root}: no AWS credentials found; set them in the AWS chain "
                "(environment, profile, instance role), or s3.anonymous for a public bucket"
            ) from error
        except ProfileNotFound as error:
            raise ConfigError(f"{self.root}: {error}; set s3.profile to one that exists") from error
        except BotoCoreError as error:
            raise StorageError(
                f"{self.root}: {error}; check s3.endpoint and the network"
            ) from error
        except PermissionError as error:
            raise ConfigError(
                f"{self.root}: access denied by the store ({error}); check the credentials' "
                f"rights on bucket {bucket!r}"
            ) from error
        except FileNotFoundError as error:
            if "specified bucket does not exist" in str(error).lower():
                raise DataError(
                    f"{self.root}: bucket {bucket!r} does not exist; check its name and s3.endpoint"
                ) from error
            raise


def expand(pattern: str, s3: S3Options | None = None) -> list[FileInfo]:
    """Return the files that a source's path names, sorted by path.

    A path is a file, a directory (its .tar and .parquet files, at any depth), a glob, or a
    pattern with {000..123}; each form local or on s3://.

    Raises:
        DataError: nothing matches; the message holds the expanded pattern.
    """
    names = _braces(pattern)
    found: dict[str, FileInfo] = {}
    for listed, wanted in _listings(names):
        for info in _matches(listed, s3):
            if wanted is None or info.path in wanted:
                found[info.path] = info
    if not found:
        shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)} names)"
        if not shown.startswith("s3://"):
            shown = os.path.abspath(shown)
        raise DataError(
            f"no shard matches {pattern!r} (looked for {shown}); expected .tar or .parquet files: "
            "check the path, or make shards from a folder of pictures with jobs/prepare.py"
        )
    return [found[path] for path in sorted(found)]


def _braces(pattern: str) -> list[str]:
    match = _BRACE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    return [
        name
        for number in range(int(first), int(last) + 1)
        for name in _braces(
            f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}"
        )
    ]


def _listings(names: list[str]) -> list[tuple[str, set[str] | None]]:
    """Return what to list, each with the names that are wanted of it; none = all.

    Many shards of one S3 folder are one listing, of 1,000 names a request: a request a shard
    would take an hour for 100,000 of them.
    """
    folders: dict[str, set[str]] = {}
    for name in names:
        if name.startswith("s3://") and _is_shard(name) and not any(c in name for c in "*?["):
            folders.setdefault(split_uri(name)[0], set()).add(name)
    many = {folder: wanted for folder, wanted in folders.items() if len(wanted) > _FEW}
    listed = set().union(*many.values())
    return [
        *((f"{folder}/*", wanted) for folder, wanted in many.items()),
        *((name, None) for name in names if name not in listed),
    ]


def _is_shard(name: str) -> bool:
    return name.lower().endswith((".tar", ".parquet"))


def _matches(name: str, s3: S3Options | None) -> list[FileInfo]:
    is_glob = any(c in name for c in "*?[")
    if name.startswith("s3://"):
        store = S3Store(name.rstrip("/"), s3 or S3Options())
        with store._explained():
            if is_glob:
                entries = _glob(store.client, name)
            else:
                entries = list(store.client.find(name, detail=True).values())
            if not entries:
                _require_bucket(store)
        return [
            FileInfo(f"s3://{e['name']}", e["size"], str(e["ETag"]).strip('"'))
            for e in entries
            if e["type"] == "file" and _is_shard(e["name"])
        ]
    if is_glob:
        paths = [Path(p) for p in glob.glob(name, recursive=True)]
    elif os.path.isdir(name):
        paths = [p for p in Path(name).rglob("*") if p.is_file() and _is_shard(p.name)]
    else:
        paths = [Path(name)] if os.path.isfile(name) else []
    return [
        LocalStore(p.parent.absolute()).info(p.name)
        for p in paths
        if p.is_file() and _is_shard(p.name)
    ]


def _glob(client: Client, pattern: str) -> list[dict[str, Any]]:
    """Return the entries that match; s3fs's own glob passes over listings that fail."""
    from fsspec.utils import glob_translate

    pattern = pattern.removeprefix("s3://")
    parts = re.split(r"[*?[]", pattern, maxsplit=1)
    folder = parts[0].rpartition("/")[0]
    deep = "/" in parts[1] or "**" in pattern
    matches = re.compile(glob_translate(pattern)).match
    try:
        found = (
            client.find(folder, detail=True).values() if deep else client.ls(folder, detail=True)
        )
    except FileNotFoundError:
        return []
    return [entry for entry in found if matches(entry["name"])]


def _require_bucket(store: S3Store) -> None:
    """Raise DataError when the bucket is missing: listing a missing prefix says nothing."""
    bucket = store.root.removeprefix("s3://").split("/", 1)[0]
    try:
        store.client.call_s3("head_bucket", Bucket=bucket)
    except FileNotFoundError as error:
        raise DataError(
            f"{store.root}: bucket {bucket!r} does not exist; check its name and s3.endpoint"
        ) from error


def split_uri(path: str) -> tuple[str, str]:
    """Split a file's path or URI into its directory and its name."""
    folder, _, name = path.rpartition("/")
    return folder or "/", name


def _persist(read: Callable[[], T]) -> T:
    """Repeat a local read that fails as network file systems do for a while.

    Each try opens the file again: a handle that has gone stale stays so.
    """
    for pause_s in _PAUSES_S:
        try:
            return read()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
        time.sleep(pause_s)
    return read()


def _info(path: Path, stat: os.stat_result) -> FileInfo:
    return FileInfo(str(path), stat.st_size, str(stat.st_mtime_ns))


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
