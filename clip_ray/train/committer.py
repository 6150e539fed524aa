"""Commits written in the background: the step loop stalls for a snapshot and nothing else.

One commit is written at a time. Where that takes until the next is due, a step waits for it for
seconds, once; then the next is put off, and no step waits for a storage that is slow, fails or
does not answer, until `checkpoint.patience_s` has passed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from clip_ray.config import CheckpointConfig
from clip_ray.train.checkpoint import Checkpoints, Commit, Fill

COMMIT_TIMEOUT_S = 900.0  # for the parts of a commit, and for the last one
HOLD_S = 4.0  # below the least time after which a rank is thought to hang
DEFERRED_S = 10.0  # before a commit that is put off is worth a line
LEAST_PATIENCE_S = 60.0  # a commit that is put off has not failed: it has at least so long


class Event(Protocol):
    """Journals an event."""

    def __call__(self, name: str, **fields: Any) -> None:
        """Journal one."""


class Committer:
    """Writes the commits of one rank, or its parts of them, on a thread.

    Args:
        checkpoints: where to.
        config: patience, and which commits are kept.
        rank: this rank; 0 commits, the others write parts.
        event: journals what becomes of a commit.
        drain: makes the rows of all steps so far durable: none that a commit covers may be lost.
        hold_s: seconds that a step may wait for a commit, once for each; less than a hang takes.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        config: CheckpointConfig,
        rank: int,
        event: Event,
        drain: Callable[[], None],
        hold_s: float = HOLD_S,
    ) -> None:
        self._checkpoints, self._config, self._rank = checkpoints, config, rank
        self._event, self._drain = event, drain
        self._writer: threading.Thread | None = None
        self._writing = ""
        self._error: BaseException | None = None
        self._failing_since: float | None = None
        self._deferred_since: float | None = None
        self._deferral_told = False
        self._held, self._hold_s, self._waited_s = False, hold_s, 0.0

    def busy(self, due: bool = False) -> bool:
        """Tell whether a commit is still being written.

        Args:
            due: the next one is due: a moment is waited for this one, once, so that commits come
                at their steps though they be written a little more slowly than they are due.
        """
        if due and self._writer is not None and not self._held:
            self._held, begun = True, time.perf_counter()
            self._writer.join(timeout=self._hold_s)
            self._waited_s = time.perf_counter() - begun
        return self._writer is not None and self._writer.is_alive()

    @property
    def failing(self) -> bool:
        """Whether the last commit could not be written."""
        return self._failing_since is not None

    def begin(
        self, commit: Commit, files: Mapping[str, bytes | Fill], parts: int, stall_s: float
    ) -> None:
        """Write a commit, or this rank's part of it, once the one before is written.

        Args:
            commit: its step and attempt.
            files: content of each file, or a function that writes it at a local path.
            parts: ranks that write one.
            stall_s: seconds that the step loop was held up, for the journal; what it has waited
                for the commit before (`busy`) is added.
        """
        self.check()
        stall_s, self._waited_s = stall_s + self._waited_s, 0.0
        self._deferred_since, self._deferral_told, self._held = None, False, False
        write = partial(self._write_part, commit, files)
        if self._rank == 0:
            write = partial(self._write, commit, files, parts, stall_s)
        # At a run's end only: amid it a commit is put off while another is written.
        before = self._writer if self.busy() else None
        self._writing = self._checkpoints.uri(commit)
        # A daemon: a request that never ends must not keep the process of a group that has ended.
        self._writer = threading.Thread(
            target=_one_after_the_other, args=(before, write), name="commit", daemon=True
        )
        self._writer.start()

    def deferred(self, step: int) -> None:
        """Note that a commit is due and that some rank still writes the one before.

        Raises:
            TimeoutError: for longer than `checkpoint.patience_s`.
            Exception: what went wrong with the one before.
        """
        self.check()
        now = time.monotonic()
        self._deferred_since = self._deferred_since or now
        waited = now - self._deferred_since
        if waited > DEFERRED_S and not self._deferral_told:
            self._deferral_told = True
            self._event("commit_deferred", step=step, waited_s=round(waited, 1))
        failing = now - (self._failing_since or self._deferred_since)
        patience = max(self._config.patience_s, LEAST_PATIENCE_S)
        if failing > patience:
            raise TimeoutError(
                f"no commit was written for {failing:.0f} s, {patience:g} s are the patience with "
                "the storage (checkpoint.patience_s)"
            )

    def join(self, timeout_s: float) -> None:
        """Wait for the commit in the making.

        Raises:
            TimeoutError: it is not written in time.
            Exception: what went wrong with it, other than a storage that may answer later.
        """
        if self._writer is not None:
            self._writer.join(timeout=timeout_s)
            if self._writer.is_alive():
                raise TimeoutError(
                    f"{self._writing} is not written after {timeout_s:g} s: the storage does not "
                    "answer, or is too slow for so large a commit (checkpoint.writers)"
                )
        self.check()

    def check(self) -> None:
        """Raise what went wrong with a commit, where the run must not go on after it."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write_part(self, commit: Commit, files: Mapping[str, bytes | Fill]) -> None:
        # Rank 0 is told of a failure, and decides what comes of it.
        with contextlib.suppress(OSError):
            self._checkpoints.write_part(commit, self._rank, files)

    def _write(
        self, commit: Commit, files: Mapping[str, bytes | Fill], parts: int, stall_s: float
    ) -> None:
        begun = time.perf_counter()
        try:
            digest = self._checkpoints.write(
                commit,
                files,
                parts=parts,
                timeout_s=COMMIT_TIMEOUT_S,
                before_commit=self._drain,
            )
        except BaseException as error:
            self._failed(commit, error)
            return
        self._failing_since = None
        write_s = time.perf_counter() - begun
        try:
            self._checkpoints.prune(self._config.keep_last, self._config.keep_every)
        except Exception as error:
            # The commit stands; old ones are tried again after the next.
            self._event("prune_failed", step=commit.step, why=str(error))
        self._event(
            "commit",
            step=commit.step,
            commit=commit.name,
            uri=self._checkpoints.uri(commit),
            digest=digest,
            stall_s=round(stall_s, 4),
            write_s=round(write_s, 3),
        )

    def _failed(self, commit: Commit, error: BaseException) -> None:
        """Do without a commit that the storage refused; give up when it has for too long."""
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if not isinstance(error, OSError) or now - self._failing_since > self._config.patience_s:
            self._error = error
            return
        why = f"{type(error).__name__}: {error}"
        self._event("commit_failed", step=commit.step, commit=commit.name, why=why)
        with contextlib.suppress(OSError):
            self._checkpoints.discard(commit)  # where the disk is full, it is in the way


def _one_after_the_other(before: threading.Thread | None, write: Callable[[], None]) -> None:
    if before is not None:
        before.join()
    write()
