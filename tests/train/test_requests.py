"""Requests to a running job through the storage of its run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clip_ray.config import S3Options
from clip_ray.errors import CheckpointError
from clip_ray.storage import LocalStore, Store, open_store
from clip_ray.train.checkpoint import Checkpoints, Commit
from clip_ray.train.journal import Journal
from clip_ray.train.lease import held_lease, live_holder
from clip_ray.train.requests import SILENT_STEPS, Inbox, Request, ask

PERIOD_S = 0.02


def make_run(store: Store) -> Store:
    store.write("config.yaml", b"run: {}\n")
    return store


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return make_run(LocalStore(tmp_path / "r"))


@pytest.fixture
def inbox(run: Store) -> Iterator[Inbox]:
    with held_lease(run):
        opened = Inbox(run, PERIOD_S)
        yield opened
        opened.close()


def eventually(condition: Callable[[], Any], timeout_s: float = 20) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def post(run: Store, wish: str, lease: str | None = None, name: str = "a") -> None:
    holder = live_holder(run)
    token = lease if lease is not None else holder.token if holder else ""
    fields = {"id": name, "wish": wish, "by": "ann@host", "lease": token}
    run.write(f"requests/{name}.json", json.dumps(fields).encode())


def answer(run: Store, name: str = "a") -> str:
    path = f"requests/{name}.answer.json"
    return json.loads(run.read(path))["state"] if run.exists(path) else ""


def step(number: int, attempt: int = 1) -> tuple[str, dict[str, Any]]:
    return "metrics", {"attempt": attempt, "step": number}


def committed(number: int, attempt: int = 1) -> tuple[str, dict[str, Any]]:
    name = Commit(number, attempt).name
    return "events", {"event": "commit", "attempt": attempt, "step": number, "commit": name}


def take(inbox: Inbox) -> list[Request]:
    return eventually(inbox.take)


def test_a_stop_is_taken_once_answered_and_removed(run: Store, inbox: Inbox) -> None:
    assert inbox.stop_by == ""
    post(run, "stop")
    (request,) = take(inbox)
    assert (request.wish, inbox.stop_by) == ("stop", "ann@host")
    eventually(lambda: answer(run) == "taken")
    assert not run.exists("requests/a.json")
    assert inbox.take() == [] and not inbox.wants_commit


def test_a_commit_is_wanted_until_a_newer_one_has_come(run: Store, inbox: Inbox) -> None:
    inbox.saw([step(9), step(10)])
    post(run, "commit")
    take(inbox)
    assert inbox.wants_commit and inbox.stop_by == ""
    # Its snapshot was taken before the request: slowly written, it comes after.
    inbox.saw([committed(9)])
    assert inbox.wants_commit and answer(run) != "done"
    inbox.saw([step(11), committed(11)])
    assert not inbox.wants_commit
    eventually(lambda: answer(run) == "done")


def test_a_commit_that_has_all_steps_is_the_answer_at_once(run: Store, inbox: Inbox) -> None:
    inbox.saw([step(10), committed(10)])
    post(run, "commit")
    take(inbox)
    assert not inbox.wants_commit
    eventually(lambda: answer(run) == "done")


def test_an_older_job_s_commit_is_no_answer(run: Store, inbox: Inbox) -> None:
    """Nothing was seen of this job yet; a resumed run has commits from before."""
    post(run, "commit")
    take(inbox)
    assert inbox.wants_commit
    inbox.saw([committed(1)])
    assert not inbox.wants_commit


def test_after_a_rollback_the_new_attempt_s_commit_counts(run: Store, inbox: Inbox) -> None:
    inbox.saw([step(20)])
    post(run, "commit")
    take(inbox)
    inbox.saw([step(11, attempt=2), committed(11, attempt=2)])
    assert not inbox.wants_commit


def test_the_word_is_withdrawn_between_two_commits(run: Store, inbox: Inbox) -> None:
    inbox.saw([step(1)])
    post(run, "commit", name="a")
    take(inbox)
    inbox.saw([step(2), step(3)])
    post(run, "commit", name="b")
    take(inbox)
    inbox.saw([committed(2)])
    eventually(lambda: answer(run, "a") == "done")
    assert answer(run, "b") == "taken"
    for number in range(SILENT_STEPS):
        assert not inbox.wants_commit
        inbox.saw([step(4 + number)])
    assert inbox.wants_commit
    inbox.saw([committed(7)])
    eventually(lambda: answer(run, "b") == "done")


def test_what_an_earlier_job_was_asked_is_cleared_not_obeyed(run: Store) -> None:
    post(run, "stop", lease="of a job that has ended")
    run.write("requests/b.answer.json", b"{}")
    run.write("requests/c.json", b"no request")
    with held_lease(run):
        inbox = Inbox(run, PERIOD_S)
        eventually(lambda: run.child("requests").files() == [])
        assert inbox.take() == [] and inbox.stop_by == ""
        post(run, "stop")  # one for this job is
        take(inbox)
        inbox.close()


@pytest.mark.parametrize("change", [{"id": "../../x"}, {"wish": "end"}, {"more": 1}])
def test_what_is_no_request_is_cleared(run: Store, inbox: Inbox, change: dict[str, Any]) -> None:
    holder = live_holder(run)
    assert holder is not None
    fields = {"id": "b", "wish": "stop", "by": "eve", "lease": holder.token}
    run.write("requests/b.json", json.dumps(fields | change).encode())
    eventually(lambda: not run.exists("requests/b.json"))
    post(run, "commit", name="c")
    assert [request.id for request in take(inbox)] == ["c"]  # the first one was not taken
    assert not Path(run.uri, "../x.answer.json").exists()


def test_what_comes_after_the_training_is_refused(run: Store) -> None:
    with held_lease(run):
        inbox = Inbox(run, period_s=3600)
        eventually(lambda: inbox._lease)
        post(run, "stop")
        inbox.close()
        assert answer(run) == "refused" and inbox.take() == []


def test_an_outage_of_the_storage_delays_and_loses_nothing(
    run: Store, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[str] = []
    for name in ("files", "write", "delete"):
        method = getattr(LocalStore, name)

        def failing(self: LocalStore, *given: Any, name=name, method=method) -> Any:
            if threading.current_thread().name == "requests" and failures.count(name) < 3:
                failures.append(name)
                raise OSError("storage is down")
            return method(self, *given)

        monkeypatch.setattr(LocalStore, name, failing)
    post(run, "stop")
    assert len(take(inbox)) == 1
    eventually(lambda: answer(run) == "taken" and not run.exists("requests/a.json"))
    assert sorted(set(failures)) == ["delete", "files", "write"] and len(failures) == 9
    assert inbox.take() == []


# ---------------------------------------------------------------------- the asker


class FakeJob:
    """Holds the lease of a run and does as asked; its steps are numbered by its looks."""

    def __init__(self, run: Store, deaf: bool = False) -> None:
        self._run, self._deaf = run, deaf
        self._ended = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._go)
        self._thread.start()
        assert self._ready.wait(20)

    def _go(self) -> None:
        checkpoints, journal = Checkpoints(self._run), Journal(self._run, "metrics")
        with held_lease(self._run):
            attempt = checkpoints.begin_attempt({})
            inbox = None if self._deaf else Inbox(self._run, PERIOD_S)
            self._ready.set()
            number = 0
            while not self._ended.wait(0.01):
                number += 1
                rows = [step(number, attempt)]
                journal.append([row for _, row in rows])
                journal.flush()
                if inbox is None:
                    continue
                inbox.saw(rows)
                inbox.take()
                if inbox.wants_commit or inbox.stop_by:
                    checkpoints.write(Commit(number, attempt), {"x": b"1"})
                    inbox.saw([committed(number, attempt)])
                if inbox.stop_by:
                    break
            if inbox is not None:
                inbox.close()

    def kill(self) -> None:
        self._ended.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


def asked(run: Store, wish: Any, timeout_s: float = 30) -> tuple[bool, str]:
    said: list[str] = []
    return ask(run, wish, "ann@host", timeout_s, said.append, PERIOD_S), "\n".join(said)


@pytest.mark.parametrize("where", ["local", "s3"])
def test_commit_then_stop(run: Store, s3: S3Options, tmp_path: Path, where: str) -> None:
    if where == "s3":
        run = make_run(open_store(f"s3://bucket/{tmp_path.name}/asked", s3))
    job = FakeJob(run)
    try:
        good, said = asked(run, "commit")
        assert good and "asked process" in said and "committed step-" in said
        first = Checkpoints(run).commits()[-1]
        assert live_holder(run) is not None  # it goes on
        good, said = asked(run, "stop")
        last = Checkpoints(run).commits()[-1]
        assert good and "the job has ended as asked" in said and last.name in said
        assert last.step > first.step and "not committed" not in said
        assert "to resume: the command that started it" in said
        assert (f"--config {run.uri}/config.yaml" in said) == (where == "local")
        assert live_holder(run) is None and run.child("requests").files() == []
    finally:
        job.kill()


def test_a_run_that_nobody_writes_is_told_at_once(run: Store) -> None:
    good, said = asked(run, "stop", timeout_s=3600)
    assert not good and said.startswith("not running; nothing is committed yet")
    Checkpoints(run).write(Commit(7, Checkpoints(run).begin_attempt({})), {"x": b"1"})
    good, said = asked(run, "commit", timeout_s=3600)
    assert not good and said.startswith("not running; last commit: step-00000007.a1")
    assert run.child("requests").files() == []


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run there"):
        ask(LocalStore(tmp_path), "stop", "ann", 1, print)


def test_a_job_that_does_not_listen_is_given_up_and_not_stopped_later(run: Store) -> None:
    job = FakeJob(run, deaf=True)
    try:
        good, said = asked(run, "stop", timeout_s=0.2)
        assert not good and "not within 0.2 s: the request is withdrawn" in said
        assert run.child("requests").files() == []
    finally:
        job.kill()


def test_a_job_that_ends_without_committing_is_no_success(run: Store) -> None:
    job = FakeJob(run, deaf=True)
    eventually(lambda: run.exists("metrics.jsonl"))
    threading.Timer(0.3, job.kill).start()
    good, said = asked(run, "stop")
    assert not good and "ended by itself, before it took the request" in said
    assert "nothing is committed yet, " in said and "steps after it are not committed" in said
