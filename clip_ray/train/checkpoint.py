"""Commits: checkpoints that are complete, verified and never rewritten.

A checkpoint is a directory `checkpoints/step-00001234.a3/` of the run. Its files are written
first; `COMMIT`, which lists their sizes and digests, is created last and by one writer only. So a
directory without COMMIT does not exist for a reader, whatever killed its writer. The attempt
number in the name (`.a3`) is drawn exclusively, and a writer looks for newer attempts before it
commits. Each attempt records the commit that it starts from, and what earlier attempts have beyond
it does not count: so a process that was thought dead, and wakes up between its look and its COMMIT,
cannot disturb its successor either.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clip_ray.errors import CheckpointError
from clip_ray.storage import FileDigest, Store, digest_bytes

FORMAT = 1
COMMIT = "COMMIT"
_ATTEMPTS, _START = "attempts", ".start.json"
_NAME = re.compile(r"^step-(\d{8,})\.a(\d+)$")

_PART_POLL_S = 0.2
_ASKED_AT_ONCE = 32  # answers of a storage that are waited for together: each takes 10 to 100 ms

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


BEGINNING = Commit(0, 0)
"""What an attempt starts from that starts from no commit."""


class Checkpoints:
    """The commits of one run.

    Args:
        run: the run's directory.
    """

    def __init__(self, run: Store) -> None:
        self._run = run
        self._store = run.child("checkpoints")
        self._starts: dict[int, Commit] = {}  # as recorded: never rewritten

    def uri(self, commit: Commit) -> str:
        """Return the path or URI of a commit's directory."""
        return self._store.child(commit.name).uri

    def attempts(self) -> list[dict[str, Any]]:
        """Return what was recorded of each attempt at its begin, oldest first."""
        folder = self._run.child(_ATTEMPTS)
        names = [name for name in folder.files() if not name.endswith(_START)]
        return [json.loads(folder.read(name)) for name in names]

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
                self._run.create(f"{_ATTEMPTS}/{number:05d}.json", json.dumps(record).encode())
            except FileExistsError:
                continue
            return number

    def newest_attempt(self) -> int:
        """Return the highest attempt number drawn so far; 0 before the first."""
        names = self._run.child(_ATTEMPTS).files()
        return max((int(name.split(".")[0]) for name in names), default=0)

    def start_from_newest(
        self, attempt: int, rejected: Callable[[Commit, str], None]
    ) -> tuple[Commit, dict[str, bytes]] | None:
        """Choose the commit that an attempt starts from, and record it, once and for all.

        Args:
            attempt: the attempt, whose number the caller has drawn.
            rejected: as in `newest`.

        Returns:
            As `newest`; none = the attempt starts from the beginning.

        Raises:
            CheckpointError: there are commits, and none verifies; or as `newest`.
        """
        damaged: list[str] = []

        def note(commit: Commit, why: str) -> None:
            damaged.append(why)
            rejected(commit, why)

        found = self.newest(note)
        if found is None and damaged:
            raise CheckpointError(
                f"{self._run.uri}: none of the {len(damaged)} commits verifies (the newest: "
                f"{damaged[0]}); restore checkpoints/ from a copy, or delete it to begin anew"
            )
        start = found[0] if found else BEGINNING
        record = {"step": start.step, "attempt": start.attempt, "token": uuid.uuid4().hex}
        self._run.create(f"{_ATTEMPTS}/{attempt:05d}{_START}", json.dumps(record).encode())
        return found

    def starts(self) -> dict[int, Commit]:
        """Return the commit that each attempt started from, BEGINNING for none.

        Attempts that died before they chose one are left out, and those of versions that did not
        record it.
        """
        names = self._run.child(_ATTEMPTS).files()
        numbers = [int(name.removesuffix(_START)) for name in names if name.endswith(_START)]
        return {number: start for number in numbers if (start := self._start(number))}

    def _start(self, attempt: int) -> Commit | None:
        if attempt not in self._starts:
            try:
                record = json.loads(self._run.read(f"{_ATTEMPTS}/{attempt:05d}{_START}"))
            except FileNotFoundError:
                return None
            self._starts[attempt] = Commit(record["step"], record["attempt"])
        return self._starts[attempt]

    def commits(self) -> list[Commit]:
        """Return the committed checkpoints that count, oldest first; not verified.

        A later attempt's commits are newer, whatever their step: it began at a commit that
        verified, so what an earlier attempt has beyond that was given up, and does not count even
        where it is written later.
        """
        return self._commits()[0]

    def _commits(self) -> tuple[list[Commit], list[Commit]]:
        """Return the commits that count, and those that were given up; each oldest first."""
        there = [(name, m) for name in self._store.directories() if (m := _NAME.match(name))]
        with ThreadPoolExecutor(_ASKED_AT_ONCE, "commits") as pool:
            whole = pool.map(lambda one: self._store.exists(f"{one[0]}/{COMMIT}"), there)
            found = [
                Commit(int(m[1]), int(m[2]))
                for (_, m), is_whole in zip(there, whole, strict=True)
                if is_whole
            ]
        found.sort(key=lambda commit: (commit.attempt, commit.step))
        if not found:
            return [], []
        last: dict[int, float] = {}  # the last step of an attempt that counts
        attempt, upto = max(self.newest_attempt(), found[-1].attempt), math.inf
        while attempt >= found[0].attempt:
            last[attempt] = upto
            start = self._start(attempt)
            # An attempt without a record starts from whatever the one before it has.
            upto = start.step if start else math.inf
            attempt = min(start.attempt, attempt - 1) if start else attempt - 1
        counts = [commit.step <= last.get(commit.attempt, -1) for commit in found]
        kept = [commit for commit, does in zip(found, counts, strict=True) if does]
        return kept, [commit for commit, does in zip(found, counts, strict=True) if not does]

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
        digests |= self._await_parts(commit, range(1, parts), timeout_s)
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

    def _await_parts(self, commit: Commit, parts: range, timeout_s: float) -> dict[str, FileDigest]:
        """Return the digests of the files of the others' parts, once all are written."""
        digests: dict[str, FileDigest] = {}
        given_up, deadline = threading.Event(), time.monotonic() + timeout_s
        with ThreadPoolExecutor(_ASKED_AT_ONCE, "parts") as pool:
            try:
                waits = partial(self._await_part, commit, deadline, timeout_s, given_up)
                for found in pool.map(waits, parts):
                    digests |= found
            finally:
                given_up.set()
        return digests

    def _await_part(
        self,
        commit: Commit,
        deadline: float,
        timeout_s: float,
        given_up: threading.Event,
        part: int,
    ) -> dict[str, FileDigest]:
        folder = self._store.child(commit.name)
        while True:
            with contextlib.suppress(FileNotFoundError):
                said = json.loads(folder.read(_part_name(part)))
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{folder.uri}: part {part} was not written in {timeout_s:g} s")
            if given_up.wait(_PART_POLL_S):
                return {}
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

        One that was given up is taken where no other verifies: an attempt that starts from it is
        as consistent as one that starts from another.

        Args:
            rejected: told each newer commit that counts and did not verify, and why.

        Raises:
            CheckpointError: the newest one was written by a newer version.
        """
        counting, given_up = self._commits()
        for commit in [*reversed(counting), *reversed(given_up)]:
            try:
                return commit, self.verify(commit)
            except NewerFormatError:
                # Not damaged: an older commit, or a start from nothing, would throw work away.
                raise
            except (CheckpointError, FileNotFoundError) as error:
                # Of what was given up, a successor may have deleted any part.
                if commit in counting:
                    rejected(commit, str(error))
        return None

    def discard(self, commit: Commit) -> None:
        """Delete what was written of a checkpoint that could not be committed."""
        if not self._store.exists(f"{commit.name}/{COMMIT}"):
            self._store.delete(commit.name)

    def prune(self, keep_last: int, keep_every: int | None, pinned: Commit | None = None) -> None:
        """Delete what need not be kept: old commits, COMMIT first, and orphans.

        An orphan is a directory without COMMIT that an earlier attempt left. What was given up
        goes once the newest attempt has a commit of its own: until then it may be all there is.
        """
        commits, given_up = self._commits()
        attempt = self.newest_attempt()
        keep = set(commits[-keep_last:])
        keep |= {c for c in commits if keep_every and c.step % keep_every == 0}
        keep |= {pinned} if pinned else set()
        superseded = given_up if commits and commits[-1].attempt == attempt else []
        for commit in [*commits, *superseded]:
            if commit not in keep:
                self._store.delete(f"{commit.name}/{COMMIT}")
                self._store.delete(commit.name)
        committed = {commit.name for commit in [*commits, *given_up]}
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
