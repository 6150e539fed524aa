"""Asking a running job for a commit, or for a commit and its end, through the run's storage.

Whoever may write the run's directory may ask: no way to the job over the network is needed. A
request is a file `requests/<id>.json` that names the lease of the job it is meant for, so that no
later job of the run obeys it. The job removes it when it takes it and answers in
`requests/<id>.answer.json`, which the asker removes.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from clip_ray.errors import CheckpointError
from clip_ray.storage import LocalStore, Store
from clip_ray.train.checkpoint import Checkpoints
from clip_ray.train.journal import Row, last_row
from clip_ray.train.lease import Watch, live_holder

Wish = Literal["stop", "commit"]
Say = Callable[[str], None]

LOCAL_PERIOD_S, S3_PERIOD_S = 0.5, 5.0  # 17,000 listings of S3 a day are 9 cents
CLOSE_S = 10.0
# The ranks hear of a word with the answers to what they send: after so many steps all have heard
# that it was withdrawn, and it can be said anew.
SILENT_STEPS = 3
_FOLDER, _ANSWER = "requests", ".answer.json"


@dataclass(frozen=True)
class Request:
    """What somebody asks of a job.

    Attributes:
        id: unique; names the request's files.
        wish: "stop" (commit and end) or "commit".
        by: who asks, for the log.
        lease: token of the lease that the asked job holds.
    """

    id: str
    wish: Wish
    by: str
    lease: str


@dataclass(frozen=True)
class Answer:
    """What a job says to a request: "taken"; then, for a commit, "done"; or "refused"."""

    state: Literal["taken", "done", "refused"]
    text: str = ""


class Inbox:
    """The job's side: what it is asked for, and its answers. The storage is used on a thread.

    Args:
        run: the run's directory; this process holds its lease.
        period_s: seconds between two looks at the storage; none = 0.5, on S3 5.
    """

    def __init__(self, run: Store, period_s: float | None = None) -> None:
        usual = LOCAL_PERIOD_S if isinstance(run, LocalStore) else S3_PERIOD_S
        self._period_s = usual if period_s is None else period_s
        self._run, self._folder = run, run.child(_FOLDER)
        self._lease = ""
        self._known: set[str] = set()
        self._arrived: deque[Request] = deque()
        self._answers: deque[tuple[str, Answer]] = deque()
        self._stop_by = ""
        self._commits: list[tuple[Request, tuple[int, int]]] = []
        # Attempt and step of the last finished step, and of the last commit.
        self._reached, self._committed, self._commit = (0, 0), (-1, 0), ""
        self._silent_steps = SILENT_STEPS
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._serve, name="requests", daemon=True)
        self._thread.start()

    @property
    def stop_by(self) -> str:
        """Who asked for the run's end; empty while nobody has."""
        return self._stop_by

    @property
    def wants_commit(self) -> bool:
        """Whether the ranks are to be asked for a commit; else they are to forget that they were.

        Between two of them they must hear that the first is over, or they take both for one.
        """
        return bool(self._commits) and self._silent_steps >= SILENT_STEPS

    def take(self) -> list[Request]:
        """Return the requests that have arrived since the last call; does not wait."""
        taken = []
        while self._arrived:
            request = self._arrived.popleft()
            taken.append(request)
            if request.wish == "stop":
                self._stop_by = self._stop_by or request.by
            else:
                self._commits.append((request, self._reached))
        self._settle()  # where no step has ended since the last commit, that is what is asked for
        return taken

    def saw(self, rows: Iterable[tuple[str, Row]]) -> None:
        """Take rows of the run's journals, as (journal, row): a commit settles requests.

        Not one whose snapshot is older than the request, and which was still being written when
        the request came.
        """
        for journal, row in rows:
            if journal == "metrics":
                self._reached = max(self._reached, (row["attempt"], row["step"]))
                self._silent_steps += 1
            elif journal == "events" and row["event"] == "commit":
                self._committed = max(self._committed, (row["attempt"], row["step"]))
                self._commit = row["commit"]
                self._settle()

    def close(self) -> None:
        """Refuse what has not been taken, and look no more."""
        self._closed.set()
        self._wake.set()
        self._thread.join(timeout=CLOSE_S)

    def _settle(self) -> None:
        for request, reached in list(self._commits):
            if self._committed >= reached:
                self._commits.remove((request, reached))
                self._silent_steps = 0
                self._answers.append((request.id, Answer("done", self._commit)))
                self._wake.set()

    def _serve(self) -> None:
        looked = float("-inf")
        while True:
            self._wake.wait(max(looked + self._period_s - time.monotonic(), 0))
            self._wake.clear()
            closing = self._closed.is_set()
            # The storage may be down for a while, in whatever words; the next look may succeed.
            with contextlib.suppress(Exception):
                if closing or time.monotonic() - looked >= self._period_s:
                    looked = time.monotonic()
                    self._look(closing)
                self._write_answers()
            if closing:
                return

    def _look(self, closing: bool) -> None:
        """Take this job's requests; clear those of other jobs, whose askers have learnt it."""
        names = self._folder.files()
        if not self._lease:
            holder = live_holder(self._run)
            self._lease = holder.token if holder else ""
            for name in names:
                if name.endswith(_ANSWER):  # an earlier job's, to an asker that died
                    self._folder.delete(name)
        for name in names:
            if name.endswith(_ANSWER):
                continue
            request = _read(self._folder, name)
            if request and request.lease == self._lease and request.id not in self._known:
                self._known.add(request.id)
                if closing:
                    ended = Answer("refused", "the training has ended")
                    self._answers.append((request.id, ended))
                else:
                    self._answers.append((request.id, Answer("taken")))
                    self._arrived.append(request)
            self._folder.delete(name)

    def _write_answers(self) -> None:
        while self._answers:
            name, answer = self._answers[0]
            self._folder.write(f"{name}{_ANSWER}", json.dumps(asdict(answer)).encode())
            self._answers.popleft()  # not before: what fails is written again


def ask(run: Store, wish: Wish, by: str, timeout_s: float, say: Say, period_s: float = 0.5) -> bool:
    """Ask the job that writes a run for something, and wait until it is there.

    Args:
        run: the run's directory.
        wish: "stop" (commit and end) or "commit".
        by: who asks; the job says it in its log.
        timeout_s: seconds after which the request is withdrawn.
        say: told what happens, for the terminal.
        period_s: seconds between two looks at the storage.

    Returns:
        Whether what was asked for has happened; False also where no job writes the run.

    Raises:
        CheckpointError: there is no run.
    """
    if not run.exists("config.yaml"):
        raise CheckpointError(f"{run.uri}: no run there (no config.yaml); give a run's directory")
    watch = Watch(run)
    holder = watch.look()
    if holder is None:
        say(f"not running; {_state(run)[1]}")
        return False
    request = Request(uuid.uuid4().hex, wish, by, holder.token)
    folder = run.child(_FOLDER)
    folder.create(f"{request.id}.json", json.dumps(asdict(request)).encode())
    what = "a commit and its end" if wish == "stop" else "a commit"
    say(f"asked {holder} for {what}")
    try:
        happened, text = _wait(run, request, watch, timeout_s, period_s)
    finally:
        folder.delete(f"{request.id}.json")
        folder.delete(f"{request.id}{_ANSWER}")
    whole, state = _state(run)
    say(f"{text}; {state}")
    return happened and (whole or wish == "commit")


def _wait(
    run: Store, request: Request, watch: Watch, timeout_s: float, period_s: float
) -> tuple[bool, str]:
    """Return whether the request was met, and in words what came of it."""
    folder, taken = run.child(_FOLDER), False
    deadline = time.monotonic() + timeout_s
    while True:
        # The lease first: a job answers before it ends.
        holder = watch.look()
        answer = _read_answer(folder, request.id)
        taken = taken or answer is not None
        if answer is not None and answer.state == "done":
            return True, f"committed {answer.text}"
        if holder is None or holder.token != request.lease:
            by = "as asked" if taken else "by itself, before it took the request"
            return request.wish == "stop", f"the job has ended {by}"
        if answer is not None and answer.state == "refused" and request.wish == "commit":
            return False, f"refused: {answer.text}"
        if time.monotonic() > deadline:
            how = "taken, and will still be met" if taken else "withdrawn: the job did not take it"
            return False, f"not within {timeout_s:g} s: the request is {how}"
        time.sleep(period_s)


def _state(run: Store) -> tuple[bool, str]:
    """Return whether all steps that were computed are committed, and where the run stands."""
    commits = Checkpoints(run).commits()
    reached = last_row(run, "metrics")
    step = commits[-1].step if commits else 0
    lost = max(reached["step"] - step, 0) if reached else 0
    last = "nothing is committed yet"
    if commits:
        last = f"last commit: {commits[-1].name} ({Checkpoints(run).uri(commits[-1])})"
    if lost:
        last += f", {lost} steps after it are not committed"
    if run.exists("summary.json"):  # read here: train.rundir would import torch, for seconds
        summary = json.loads(run.read("summary.json"))
        if summary["status"] == "finished" and summary["steps"] >= step:
            return not lost, f"{last}; the run is finished"
    command = "the command that started it"
    if isinstance(run, LocalStore):
        command += f", or python jobs/pretrain.py --config {run.uri}/config.yaml"
    return not lost, f"{last}\nto resume: {command}"


def _read(folder: Store, name: str) -> Request | None:
    """Return a request; None for what is none, or is withdrawn."""
    try:
        request = Request(**json.loads(folder.read(name)))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    # Its answer's name is made of the id: another one could point anywhere.
    sound = request.wish in ("stop", "commit") and name == f"{request.id}.json"
    return request if sound else None


def _read_answer(folder: Store, id_: str) -> Answer | None:
    try:
        return Answer(**json.loads(folder.read(f"{id_}{_ANSWER}")))
    except FileNotFoundError:
        return None
