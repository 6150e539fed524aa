"""Commits: complete, verified, never rewritten, whatever died in between. DESIGN.md section 6."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_ray.errors import CheckpointError
from clip_ray.storage import LocalStore, Store, open_store
from clip_ray.train.checkpoint import BEGINNING, COMMIT, FORMAT, Checkpoints, Commit


def save_weights(path: Path) -> None:
    path.write_bytes(b"weights" * 100)


FILES: dict[str, bytes | Callable[[Path], None]] = {
    "model.safetensors": save_weights,
    "state.json": b'{"step": 10}',
}
CONTENT = {"model.safetensors": b"weights" * 100, "state.json": b'{"step": 10}'}


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(tmp_path / "runs" / "r")
    options = request.getfixturevalue("s3")
    return open_store(f"s3://bucket/{tmp_path.name}/r", options)


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return open_store(tmp_path / "r")


class Rejected(list[tuple[str, str]]):
    """Collects what `newest` tells."""

    def __call__(self, commit: Commit, why: str) -> None:
        self.append((commit.name, why))


def never(commit: Commit, why: str) -> None:
    raise AssertionError(f"{commit.name} was rejected: {why}")


def begun(run: Store, attempts: int = 1) -> Checkpoints:
    checkpoints = Checkpoints(run)
    for _ in range(attempts):
        checkpoints.begin_attempt({})
    return checkpoints


def names(run: Store) -> list[str]:
    return run.child("checkpoints").directories()


def test_what_is_committed_is_read_back(run: Store) -> None:
    checkpoints = begun(run)
    assert checkpoints.newest(never) is None and checkpoints.commits() == []
    commit = Commit(10, 1)
    assert commit.name == "step-00000010.a1"
    digest = checkpoints.write(commit, FILES)
    assert checkpoints.newest(never) == (commit, CONTENT)
    assert checkpoints.verify(commit) == CONTENT
    stored = run.child(f"checkpoints/{commit.name}")
    assert sorted(stored.files()) == [COMMIT, *sorted(CONTENT)]
    assert digest == hashlib.sha256(stored.read(COMMIT)).hexdigest()
    assert checkpoints.uri(commit) == f"{run.uri}/checkpoints/step-00000010.a1"


def test_the_newest_of_many_is_chosen(run: Store) -> None:
    checkpoints = begun(run)
    for step in (9, 100, 20):
        checkpoints.write(Commit(step, 1), {"step": str(step).encode()})
    assert [c.step for c in checkpoints.commits()] == [9, 20, 100]
    assert checkpoints.newest(never) == (Commit(100, 1), {"step": b"100"})


def test_commit_is_the_last_file_written(local: Store) -> None:
    """At `before_commit` all files lie there and COMMIT does not."""
    checkpoints = begun(local)
    seen: list[list[str]] = []
    folder = local.child("checkpoints/step-00000010.a1")
    checkpoints.write(Commit(10, 1), FILES, before_commit=lambda: seen.append(folder.files()))
    assert seen == [sorted(CONTENT)]


class CrashError(Exception):
    pass


def crash() -> None:
    raise CrashError


def crashing(path: Path) -> None:
    path.write_bytes(b"hal")
    raise CrashError


@pytest.mark.parametrize("after", range(4))
def test_a_crash_after_any_file_leaves_the_older_commit_the_newest(run: Store, after: int) -> None:
    """The writer dies in file 0, in file 1, before COMMIT, or (the control) not at all."""
    checkpoints = begun(run)
    checkpoints.write(Commit(10, 1), FILES)
    files: dict[str, Any] = {"a": b"1", "b": lambda path: path.write_bytes(b"2"), "c": b"3"}
    if after < 2:
        files = dict(list(files.items())[:after]) | {"broken": crashing}
    if after < 3:
        with pytest.raises(CrashError):
            checkpoints.write(
                Commit(20, 1), files, before_commit=crash if after == 2 else lambda: None
            )
        assert checkpoints.newest(never) == (Commit(10, 1), CONTENT)
        assert checkpoints.commits() == [Commit(10, 1)]
    else:
        checkpoints.write(Commit(20, 1), files)
        assert checkpoints.newest(never) == (Commit(20, 1), {"a": b"1", "b": b"2", "c": b"3"})


def flip(name: str) -> Callable[[Store], None]:
    def damage(folder: Store) -> None:
        data = bytearray(folder.read(name))
        data[len(data) // 2] ^= 1
        folder.write(name, bytes(data))

    return damage


def cut(name: str, keep: int) -> Callable[[Store], None]:
    return lambda folder: folder.write(name, folder.read(name)[:keep])


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (flip("model.safetensors"), "model.safetensors: 700 bytes with sha256 .*COMMIT says 700"),
        (flip("state.json"), "state.json: 12 bytes with sha256"),
        (cut("model.safetensors", 699), "model.safetensors: 699 bytes .*COMMIT says 700"),
        (cut("model.safetensors", 0), "model.safetensors: 0 bytes .*COMMIT says 700"),
        (lambda folder: folder.delete("model.safetensors"), "model.safetensors is missing"),
        (lambda folder: folder.delete("state.json"), "state.json is missing"),
        (cut(COMMIT, 50), "COMMIT is damaged"),
        (cut(COMMIT, 0), "COMMIT is damaged"),
        (lambda folder: folder.write(COMMIT, b"[]"), "COMMIT is damaged"),
        (lambda folder: folder.write(COMMIT, b'{"format": 1}'), "COMMIT is damaged: .*'files'"),
        (lambda folder: folder.write(COMMIT, b'{"format": "x"}'), "COMMIT is damaged"),
    ],
)
def test_damage_falls_back_and_is_told(
    run: Store, damage: Callable[[Store], None], why: str
) -> None:
    checkpoints = begun(run)
    for step in (10, 20):
        checkpoints.write(Commit(step, 1), FILES)
    damage(run.child("checkpoints/step-00000020.a1"))
    rejected = Rejected()
    assert checkpoints.newest(rejected) == (Commit(10, 1), CONTENT)
    ((name, reason),) = rejected
    assert name == "step-00000020.a1"
    with pytest.raises(CheckpointError, match=why):
        raise CheckpointError(reason)


def test_falling_back_goes_one_by_one(local: Store) -> None:
    checkpoints = begun(local)
    for step in (10, 20, 30):
        checkpoints.write(Commit(step, 1), FILES)
    flip("state.json")(local.child("checkpoints/step-00000030.a1"))
    flip("state.json")(local.child("checkpoints/step-00000020.a1"))
    rejected = Rejected()
    found = checkpoints.newest(rejected)
    assert found is not None and found[0] == Commit(10, 1)
    assert [name for name, _ in rejected] == ["step-00000030.a1", "step-00000020.a1"]
    flip("state.json")(local.child("checkpoints/step-00000010.a1"))
    assert checkpoints.newest(Rejected()) is None


def test_any_flipped_byte_of_commit_is_harmless(local: Store) -> None:
    """It is rejected, or (in the token or white space) the content is still the committed one."""
    checkpoints = begun(local)
    checkpoints.write(Commit(10, 1), FILES)
    folder = local.child("checkpoints/step-00000010.a1")
    whole = folder.read(COMMIT)
    rejected = 0
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        Path(folder.uri, COMMIT).write_bytes(damaged)
        try:
            assert checkpoints.verify(Commit(10, 1)) == CONTENT
        except CheckpointError:
            rejected += 1
    assert rejected > len(whole) / 2


def test_a_newer_format_is_refused_and_not_fallen_back_from(run: Store) -> None:
    """To an older version a newer one's commits are not damaged: starting over loses them."""
    checkpoints = begun(run)
    for step in (10, 20):
        checkpoints.write(Commit(step, 1), FILES)
    folder = run.child("checkpoints/step-00000020.a1")
    record = json.loads(folder.read(COMMIT))
    folder.write(COMMIT, json.dumps(record | {"format": FORMAT + 1, "files": "other"}).encode())
    message = f"format {FORMAT + 1}, this version reads up to {FORMAT}; upgrade clip-ray"
    for read in (lambda: checkpoints.verify(Commit(20, 1)), lambda: checkpoints.newest(never)):
        with pytest.raises(CheckpointError, match=message):
            read()
    assert checkpoints.verify(Commit(10, 1)) == CONTENT


def test_a_zombie_commits_nothing(run: Store) -> None:
    """An attempt that was thought dead wakes up in the middle of its commit."""
    checkpoints = begun(run)

    def successor() -> None:
        assert Checkpoints(run).begin_attempt({}) == 2

    with pytest.raises(
        CheckpointError, match="attempt 2 has begun since; attempt 1 writes nothing"
    ):
        checkpoints.write(Commit(10, 1), FILES, before_commit=successor)
    assert checkpoints.commits() == []
    with pytest.raises(CheckpointError, match="attempt 2 has begun"):
        checkpoints.write(Commit(11, 1), FILES)
    checkpoints.write(Commit(10, 2), FILES)
    assert checkpoints.commits() == [Commit(10, 2)]


class Paused(Checkpoints):
    """A writer that is stopped, once, between its look for newer attempts and its COMMIT."""

    def __init__(self, run: Store, meanwhile: Callable[[], None]) -> None:
        super().__init__(run)
        self._meanwhile: Callable[[], None] | None = meanwhile

    def newest_attempt(self) -> int:
        found = super().newest_attempt()
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return found


def goes_on(
    run: Store, keep_last: int = 3
) -> tuple[int, tuple[Commit, dict[str, bytes]] | None, Rejected]:
    """Begin an attempt as rank 0 does; return its number, what it starts from, what it rejected."""
    checkpoints, rejected = Checkpoints(run), Rejected()
    number = checkpoints.begin_attempt({})
    found = checkpoints.start_from_newest(number, rejected)
    checkpoints.prune(keep_last, None, pinned=found[0] if found else None)
    return number, found, rejected


def test_a_late_commit_whose_files_a_successor_swept_does_not_brick_the_run(run: Store) -> None:
    """It looks like a damaged commit, and where it is the only one nothing could begin."""
    assert goes_on(run) == (1, None, [])

    def successor() -> None:
        assert goes_on(run) == (2, None, [])

    Paused(run, successor).write(Commit(20, 1), FILES)
    assert run.child("checkpoints").files() == ["step-00000020.a1/COMMIT"]
    assert Checkpoints(run).commits() == []
    assert goes_on(run) == (3, None, [])
    Checkpoints(run).write(Commit(5, 3), FILES)
    assert Checkpoints(run).newest(never) == (Commit(5, 3), CONTENT)
    Checkpoints(run).prune(3, None)
    assert names(run) == ["step-00000005.a3"]


def test_what_a_zombie_commits_late_is_not_gone_on_from(run: Store) -> None:
    """Attempt 2 went on from step 10, and died: attempt 3 must too, not from attempt 1's 20."""
    goes_on(run)
    Checkpoints(run).write(Commit(10, 1), FILES)

    def successor() -> None:
        number = Checkpoints(run).begin_attempt({})
        assert Checkpoints(run).start_from_newest(number, never) == (Commit(10, 1), CONTENT)

    zombie = Paused(run, successor)
    zombie.write(Commit(20, 1), FILES)
    zombie.prune(keep_last=1, keep_every=None)  # nor does it delete what its successors need
    assert Checkpoints(run).commits() == [Commit(10, 1)]
    assert goes_on(run) == (3, (Commit(10, 1), CONTENT), [])
    Checkpoints(run).write(Commit(15, 3), FILES)
    assert Checkpoints(run).commits() == [Commit(10, 1), Commit(15, 3)]


def test_what_was_given_up_is_better_than_nothing(local: Store) -> None:
    """Attempt 2 fell back past 20, which is whole (a disk read wrong, once); then 10 rots."""
    goes_on(local)
    for step in (10, 20):
        Checkpoints(local).write(Commit(step, 1), FILES)
    folder = local.child("checkpoints/step-00000020.a1")
    whole = folder.read("state.json")
    folder.write("state.json", b"")
    assert goes_on(local)[:2] == (2, (Commit(10, 1), CONTENT))
    folder.write("state.json", whole)
    assert Checkpoints(local).newest(never) == (Commit(10, 1), CONTENT)
    flip("state.json")(local.child("checkpoints/step-00000010.a1"))
    number, found, rejected = goes_on(local)
    assert (number, found) == (3, (Commit(20, 1), CONTENT))
    assert [name for name, _ in rejected] == ["step-00000010.a1"]


def test_where_none_verifies_nothing_begins_anew(local: Store) -> None:
    """However often it is tried: a start from nothing would give the commits up."""
    goes_on(local)
    Checkpoints(local).write(Commit(10, 1), FILES)
    flip("state.json")(local.child("checkpoints/step-00000010.a1"))
    for _ in range(3):
        with pytest.raises(CheckpointError, match="none of the 1 commits verifies .*state.json"):
            goes_on(local)
    flip("state.json")(local.child("checkpoints/step-00000010.a1"))
    assert goes_on(local)[1] == (Commit(10, 1), CONTENT)


def test_a_run_of_a_version_that_recorded_no_starts_goes_on(local: Store) -> None:
    checkpoints = begun(local)
    checkpoints.write(Commit(10, 1), FILES)
    begun(local)
    checkpoints.write(Commit(20, 2), FILES)
    begun(local)
    assert not [name for name in local.child("attempts").files() if "start" in name]
    assert Checkpoints(local).starts() == {}
    assert Checkpoints(local).commits() == [Commit(10, 1), Commit(20, 2)]
    assert goes_on(local) == (4, (Commit(20, 2), CONTENT), [])
    Checkpoints(local).write(Commit(30, 4), FILES)
    assert Checkpoints(local).commits() == [Commit(10, 1), Commit(20, 2), Commit(30, 4)]
    begun(local)  # and by an older version again
    Checkpoints(local).write(Commit(40, 5), FILES)
    assert goes_on(local, keep_last=9)[1] == (Commit(40, 5), CONTENT)
    assert [c.step for c in Checkpoints(local).commits()] == [10, 20, 30, 40]
    assert Checkpoints(local).starts() == {4: Commit(20, 2), 6: Commit(40, 5)}


def test_a_start_is_recorded_once(run: Store) -> None:
    goes_on(run)
    Checkpoints(run).write(Commit(10, 1), FILES)
    with pytest.raises(FileExistsError):
        Checkpoints(run).start_from_newest(1, never)
    assert Checkpoints(run).starts() == {1: BEGINNING}


def test_a_commit_is_never_rewritten(run: Store) -> None:
    checkpoints = begun(run)
    checkpoints.write(Commit(10, 1), FILES)
    with pytest.raises(CheckpointError, match="step-00000010.a1 is committed already"):
        checkpoints.write(Commit(10, 1), FILES | {"state.json": b"other"})
    assert checkpoints.newest(never) == (Commit(10, 1), CONTENT)


def test_the_second_of_two_writers_of_a_commit_loses(local: Store) -> None:
    checkpoints = begun(local)

    def other() -> None:
        Checkpoints(local).write(Commit(10, 1), FILES)

    with pytest.raises(CheckpointError, match="committed already"):
        checkpoints.write(Commit(10, 1), FILES, before_commit=other)


def test_attempts_are_drawn_exclusively(run: Store) -> None:
    count = 8
    drawn: list[int] = []
    start = threading.Barrier(count)

    def draw() -> None:
        checkpoints = Checkpoints(run)
        start.wait(30)
        drawn.append(checkpoints.begin_attempt({"driver": "d"}))

    threads = [threading.Thread(target=draw) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(drawn) == list(range(1, count + 1))
    records = [json.loads(run.read(f"attempts/{number:05d}.json")) for number in sorted(drawn)]
    assert [r["attempt"] for r in records] == sorted(drawn)
    assert {r["driver"] for r in records} == {"d"} and len({r["token"] for r in records}) == count


def test_orphans_are_swept_but_not_the_current_attempts(run: Store) -> None:
    """A directory without COMMIT is another's rubbish, or what this attempt is writing now."""
    checkpoints = begun(run, attempts=3)
    folder = run.child("checkpoints")
    for name in ("step-00000030.a1", "step-00000030.a2", "step-00000030.a3", "notes"):
        folder.write(f"{name}/model.safetensors", b"part")
    checkpoints.write(Commit(20, 3), FILES)
    checkpoints.prune(keep_last=1, keep_every=None)
    assert names(run) == ["notes", "step-00000020.a3", "step-00000030.a3"]
    assert checkpoints.newest(never) == (Commit(20, 3), CONTENT)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "pinned", "kept"),
    [
        (1, None, None, [50]),
        (2, None, None, [40, 50]),
        (9, None, None, [10, 20, 30, 40, 50]),
        (1, 20, None, [20, 40, 50]),
        (1, None, Commit(10, 1), [10, 50]),
        (2, 30, Commit(10, 1), [10, 30, 40, 50]),
        (1, 1000, None, [50]),
    ],
)
def test_what_is_kept(
    local: Store,
    keep_last: int,
    keep_every: int | None,
    pinned: Commit | None,
    kept: list[int],
) -> None:
    checkpoints = begun(local)
    for step in (10, 20, 30, 40, 50):
        checkpoints.write(Commit(step, 1), {"f": b"x"})
    checkpoints.prune(keep_last, keep_every, pinned)
    assert [c.step for c in checkpoints.commits()] == kept
    assert len(names(local)) == len(kept)


def test_pruning_deletes_commit_first(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two deletions, it leaves an orphan and not a damaged commit."""
    checkpoints = begun(local)
    for step in (10, 20):
        checkpoints.write(Commit(step, 1), FILES)
    deleted: list[str] = []
    monkeypatch.setattr(LocalStore, "delete", lambda self, name: deleted.append(name))
    checkpoints.prune(1, None)
    assert deleted == ["step-00000010.a1/COMMIT", "step-00000010.a1"]


def test_after_a_fallback_the_later_attempts_commits_are_the_newer_ones(local: Store) -> None:
    """Attempt 2 fell back from a damaged step 30 to 20 and was stopped at 25.

    By steps alone, pruning would keep the damaged commit and delete the only good one.
    """
    checkpoints = begun(local)
    for step in (20, 30):
        checkpoints.write(Commit(step, 1), FILES)
    flip("model.safetensors")(local.child("checkpoints/step-00000030.a1"))
    assert checkpoints.begin_attempt({}) == 2
    found = checkpoints.newest(Rejected())
    assert found is not None and found[0] == Commit(20, 1)
    checkpoints.write(Commit(25, 2), FILES)
    checkpoints.prune(keep_last=1, keep_every=None)
    assert checkpoints.newest(never) == (Commit(25, 2), CONTENT)


def test_steps_beyond_eight_digits_are_ordered_by_number(local: Store) -> None:
    checkpoints = begun(local)
    for step in (99_999_999, 100_000_000):
        checkpoints.write(Commit(step, 1), {"f": b"x"})
    assert [c.step for c in checkpoints.commits()] == [99_999_999, 100_000_000]


def test_strangers_among_the_checkpoints_are_ignored(local: Store) -> None:
    checkpoints = begun(local)
    folder = local.child("checkpoints")
    for name in ("step-5.a1", "step-00000005", "tmp.step-00000005.a1", "step-00000005.a1.bak"):
        folder.write(f"{name}/{COMMIT}", b"{}")
    folder.write("step-00000005.a1", b"a file")
    assert checkpoints.commits() == []
    checkpoints.prune(1, None)
    assert len(folder.files()) == 5


def written_in_parts(run: Store, parts: int) -> tuple[Checkpoints, Commit]:
    """Write a commit whose parts come in the wrong order, from threads."""
    checkpoints, commit = begun(run), Commit(7, 1)
    others = [
        threading.Timer(
            0.3 * (parts - part),
            checkpoints.write_part,
            (commit, part, {f"model-{part}": b"%d" % part}),
        )
        for part in range(1, parts)
    ]
    for other in others:
        other.start()
    try:
        checkpoints.write(commit, FILES, parts=parts, timeout_s=30)
    finally:
        for other in others:
            other.join(30)
    return checkpoints, commit


def test_a_commit_holds_the_parts_of_all_writers(run: Store) -> None:
    checkpoints, commit = written_in_parts(run, 3)
    expected = {**CONTENT, "model-1": b"1", "model-2": b"2"}
    assert checkpoints.newest(never) == (commit, expected)


def test_a_part_that_is_damaged_is_found(local: Store) -> None:
    checkpoints, commit = written_in_parts(local, 2)
    local.child(f"checkpoints/{commit.name}").write("model-1", b"2")
    with pytest.raises(CheckpointError, match="model-1: 1 bytes with sha256"):
        checkpoints.verify(commit)


def test_without_all_parts_nothing_is_committed(local: Store) -> None:
    checkpoints = begun(local)
    checkpoints.write_part(Commit(7, 1), 1, {"model-1": b"1"})
    with pytest.raises(TimeoutError, match="part 2 was not written in 0.5 s"):
        checkpoints.write(Commit(7, 1), FILES, parts=3, timeout_s=0.5)
    assert checkpoints.commits() == []
    checkpoints.discard(Commit(7, 1))
    assert names(local) == []


def test_a_part_that_cannot_be_written_is_told_to_the_others(local: Store) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = begun(local)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write_part(Commit(7, 1), 1, {"model-1": full})
    with pytest.raises(OSError, match="part 1: OSError: .*No space left"):
        checkpoints.write(Commit(7, 1), FILES, parts=2, timeout_s=30)
    assert checkpoints.commits() == []


def test_what_is_committed_is_not_discarded(local: Store) -> None:
    checkpoints = begun(local)
    checkpoints.write(Commit(7, 1), FILES)
    checkpoints.discard(Commit(7, 1))
    assert checkpoints.newest(never) == (Commit(7, 1), CONTENT)
