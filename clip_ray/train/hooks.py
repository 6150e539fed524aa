"""What the training loop and its surroundings say to each other; importing it costs no torch."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

if TYPE_CHECKING:
    from clip_ray.train.state import Progress

PHASES = ("data_wait", "copy", "forward", "loss", "backward", "optimizer", "checkpoint")
# What all ranks can be asked to do at the end of a step: commit and end; commit and end, to go on
# with other workers; commit; or to put a commit off, as one of them still writes the last.
Word = Literal["stop", "yield", "commit", "busy"]
WORDS: tuple[Word, ...] = get_args(Word)
Reason = Literal["finished", "stopped", "yielded", "bad-data", "nonfinite"]
COMMITTED: tuple[Reason, ...] = ("finished", "stopped", "yielded")


class Hooks(Protocol):
    """What the loop asks of its surroundings; called on the training thread of every rank."""

    def record(self, row: dict[str, Any]) -> None:
        """Take a step's journal row; rank 0 only. Must not block."""

    def quarantine(self, rows: list[dict[str, Any]]) -> None:
        """Take this rank's undecodable samples of a step. Must not block."""

    def asked(self, due: bool) -> Set[Word]:
        """Return what this rank has been asked for. Must not block.

        Args:
            due: a commit is to follow this step; for its sake a moment may be waited.
        """

    def entered(self, step: int, phase: str) -> None:
        """Note that `step` steps are done and a phase of the next begins. Must not block."""

    def timed(self, seconds: dict[str, float]) -> None:
        """Take this rank's seconds of each phase of a step. Must not block."""

    def commit(self, progress: Progress) -> None:
        """Take a snapshot for a commit; may write it in the background."""

    def deferred(self, step: int) -> None:
        """Note that a commit is due after `step` and put off. Must not block."""


@dataclass(frozen=True)
class Outcome:
    """Why the loop ended, and where.

    Attributes:
        reason: "finished", "stopped" and "yielded" (both as asked), "bad-data" (over the limit) or
            "nonfinite".
        progress: the counters at the end.
        detail: for "nonfinite", what was not finite.
    """

    reason: Reason
    progress: Progress
    detail: str = ""

    @property
    def committed(self) -> bool:
        """Whether the state at such an end is committed."""
        return self.reason in COMMITTED
