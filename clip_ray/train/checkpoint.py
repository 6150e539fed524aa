"""Commits: checkpoints that are complete, verified and never rewritten.

A checkpoint is a directory `checkpoints/step-00001234.a3/` of the run. Its files are written
first; `COMMIT`, which lists their sizes and digests, is created last and by one writer only. So a
directory without COMMIT does not exist for a reader, whatever killed its writer. The attempt
number in the name (`.a3`) is drawn exclusively, and a writer looks for newer attempts before it
commits: a process that was thought dead and wakes up cannot disturb its successor.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_ray.errors import CheckpointError
from clip_ray.storage import FileDigest, Store, digest_bytes

FORMAT = 1
COMMIT = "COMMIT"
_NAME = re.compile(r"^step-(\d{8,})\.a(\d+)$")

_PART_POLL_S = 0.2

Fill = Callable[[Path], None]


class NewerFormatError(CheckpointError):
    """A commit that a newer version wrote."""


@dataclass(frozen=True)
class Commit:
    """A committed checkpoint."""

    step: int
    attempt: int

    @property
    def name(self) -> str:
        """Directory name, as in `step-00001234.a3`."""
        return f"step-{self.step:08d}.a{self.attempt}"


class Checkpoints:
    """The commits of one run.

    Args:
        run: the run's directory.
    """

    def __init__(self, run: Store) -> None:
        self._run = run
        self._store = run.child("checkpoints")

    def uri(self, commit: Commit) -> str:
        """Return the path or URI of a commit's directory."""
        return self._store.child(commit.name).uri

    def begin_attempt(self, info: Mapping[str, object]) -> int:
        """Draw the next attempt number, exclusively, and record `info` under it."""
        while True:
            number = self.newest_attempt() + 1
            record = {
                **info,
                "attempt": number,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": time.time(),
                "token": uuid.uuid4().hex,
            }
            try:
                self._run.create(f"attempts/{number:05d}.json", json.dumps(record).encode())
            except FileExistsError:
                continue
            return number

    def newest_attempt(self) -> int:
        """Return the highest attempt number drawn so far; 0 before the first."""
        names = self._run.child("attempts").files()
        return max((int(name.split(".")[0]) for name in names), default=0)

    def commits(self) -> list[Commit]:
        """Return the committed checkpoints, oldest first; their bytes are not verified.

        A later attempt's commits are newer, whatever their step: it began at a commit that
        verified, so what an earlier attempt has beyond that was given up.
        """
        found = [
            Commit(int(m[1]), int(m[2]))
            for name in self._store.directories()
            if (m := _NAME.match(name)) and self._store.exists(f"{name}/{COMMIT}")
        ]
        return sorted(found, key=lambda commit: (commit.attempt, commit.step))

    def write(
        self,
        commit: Commit,
        files: Mapping[str, bytes | Fill],
        *,
        parts: int = 1,
        timeout_s: float = 0.0,
        before_commit: Callable[[], None] = lambda: None,
    ) -> str:
        """Write a checkpoint and commit it.

        Args:
            commit: its step and the attempt that writes it.
            files: content of each file, or a function that writes it at a local path.
            parts: writers, this one among them; the others call `write_part`.
            timeout_s: seconds that these may take longer.
            before_commit: called when all files are written, before COMMIT is.

        Returns:
            The digest of the commit.

        Raises:
            CheckpointError: a newer attempt has begun, or the checkpoint exists.
            OSError: a part could not be written, or not in time.
        """
        folder = self._store.child(commit.name)
        if folder.exists(COMMIT):
            raise CheckpointError(f"{folder.uri} is committed already")
        digests = _write_files(folder, files)
        for part in range(1, parts):
            digests |= self._await_part(commit, part, timeout_s)
        before_commit()
        newest = self.newest_attempt()
        if newest != commit.attempt:
            raise CheckpointError(
                f"{folder.uri}: attempt {newest} has begun since; attempt {commit.attempt} "
                "writes nothing more"
            )
        listing = [
            {"name": name, "size": d.size, "sha256": d.sha256} for name, d in digests.items()
        ]
        record = {
            "format": FORMAT,
            "step": commit.step,
            "attempt": commit.attempt,
            "files": listing,
            "token": uuid.uuid4().hex,
        }
        data = json.dumps(record, indent=1).encode()
        try:
            folder.create(COMMIT, data)
        except FileExistsError as error:
            raise CheckpointError(f"{folder.uri} is committed already") from error
        return digest_bytes(data).sha256

    def write_part(self, commit: Commit, part: int, files: Mapping[str, bytes | Fill]) -> None:
        """Write a further part of a checkpoint, and say so where `write` looks for it.

        Raises:
            OSError: it could not be written; the writer of the first part is told, if possible.
        """
        folder = self._store.child(commit.name)
        try:
            digests = _write_files(folder, files)
        except OSError as error:
            why = {"error": f"{type(error).__name__}: {error}"}
            with contextlib.suppress(OSError):
                folder.write(_part_name(part), json.dumps(why).encode())
            raise
        listing = [[name, d.size, d.sha256] for name, d in digests.items()]
        folder.write(_part_name(part), json.dumps({"files": listing}).encode())

    def _await_part(self, commit: Commit, part: int, timeout_s: float) -> dict[str, FileDigest]:
        folder = self._store.child(commit.name)
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(FileNotFoundError):
                said = json.loads(folder.read(_part_name(part)))
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{folder.uri}: part {part} was not written in {timeout_s:g} s")
            time.sleep(_PART_POLL_S)
        if "error" in said:
            raise OSError(f"{folder.uri}: part {part}: {said['error']}")
        return {name: FileDigest(size, sha256) for name, size, sha256 in said["files"]}

    def verify(self, commit: Commit) -> dict[str, bytes]:
        """Read a checkpoint whole, checking every byte.

        Returns:
            The content of its files by name.

        Raises:
            CheckpointError: a file is missing, or not what COMMIT says.
        """
        folder = self._store.child(commit.name)
        content: dict[str, bytes] = {}
        for name, expected in self._listing(commit).items():
            try:
                data = folder.read(name)
            except FileNotFoundError as error:
                raise CheckpointError(f"{folder.uri}/{name} is missing") from error
            found = digest_bytes(data)
            if found != expected:
                raise CheckpointError(
                    f"{folder.uri}/{name}: {found.size} bytes with sha256 {found.sha256[:12]}..., "
                    f"COMMIT says {expected.size} with {str(expected.sha256)[:12]}..."
                )
            content[name] = data
        return content

    def _listing(self, commit: Commit) -> dict[str, FileDigest]:
        folder = self._store.child(commit.name)
        try:
            record: dict[str, Any] = json.loads(folder.read(COMMIT))
            if record["format"] <= FORMAT:
                return {e["name"]: FileDigest(e["size"], e["sha256"]) for e in record["files"]}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder.uri}/{COMMIT} is damaged: {error!r}") from error
        raise NewerFormatError(
            f"{folder.uri} has format {record['format']}, this version reads up to {FORMAT}; "
            "upgrade clip-ray to use it"
        )

    def newest(
        self, rejected: Callable[[Commit, str], None]
    ) -> tuple[Commit, dict[str, bytes]] | None:
        """Return the newest commit that verifies, and its files; none where there is none.

        Args:
            rejected: told each newer commit that did not verify, and why.

        Raises:
            CheckpointError: the newest one was written by a newer version.
        """
        for commit in reversed(self.commits()):
            try:
                return commit, self.verify(commit)
            except NewerFormatError:
                # Not damaged: an older commit, or a start from nothing, would throw work away.
                raise
            except (CheckpointError, FileNotFoundError) as error:
                rejected(commit, str(error))
        return None

    def discard(self, commit: Commit) -> None:
        """Delete what was written of a checkpoint that could not be committed."""
        if not self._store.exists(f"{commit.name}/{COMMIT}"):
            self._store.delete(commit.name)

    def prune(self, keep_last: int, keep_every: int | None, pinned: Commit | None = None) -> None:
        """Delete what need not be kept: old commits, COMMIT first, and orphans.

        An orphan is a directory without COMMIT that an earlier attempt left.
        """
        commits = self.commits()
        keep = set(commits[-keep_last:])
        keep |= {c for c in commits if keep_every and c.step % keep_every == 0}
        keep |= {pinned} if pinned else set()
        for commit in commits:
            if commit not in keep:
                self._store.delete(f"{commit.name}/{COMMIT}")
                self._store.delete(commit.name)
        attempt = self.newest_attempt()
        committed = {commit.name for commit in commits}
        for name in self._store.directories():
            match = _NAME.match(name)
            if match and name not in committed and int(match[2]) < attempt:
                self._store.delete(name)


def _part_name(part: int) -> str:
    return f"parts/{part:05d}.json"


def _write_files(folder: Store, files: Mapping[str, bytes | Fill]) -> dict[str, FileDigest]:
    digests = {}
    for name, content in files.items():
        if isinstance(content, bytes):
            folder.write(name, content)
            digests[name] = digest_bytes(content)
        else:
            digests[name] = folder.put(name, content)
    return digests
