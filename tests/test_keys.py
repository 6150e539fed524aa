from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from clip_ray import keys
from clip_ray.errors import ConfigError
from clip_ray.keys import Key, KeyRing, RateLimiter

ROOT = Path(__file__).resolve().parents[1]
NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
LATER = datetime(2100, 1, 1, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "keys.json")


def edit(file: str, change: Callable[[Any], object]) -> None:
    tree = json.loads(Path(file).read_text())
    change(tree)
    Path(file).write_text(json.dumps(tree))


def test_a_key_is_128_bits_and_only_its_hash_is_kept(file: str) -> None:
    key, made = keys.create(file, "search", ["classifiers", "infer"], 50, LATER)
    assert re.fullmatch("cr-[0-9a-f]{32}", key)
    text = Path(file).read_text()
    assert key not in text and key[3:] not in text and key not in repr(made)
    assert json.loads(text) == {
        "format": 1,
        "keys": [
            {
                "id": made.id,
                "name": "search",
                "sha256": hashlib.sha256(key.encode()).hexdigest(),
                "scopes": ["infer", "classifiers"],
                "rate": 50.0,
                "expires": "2100-01-01T00:00:00Z",
                "created": made.created.isoformat().replace("+00:00", "Z"),
            }
        ],
    }
    assert made == Key(made.id, "search", frozenset(keys.SCOPES), 50.0, LATER, made.created)
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    assert KeyRing(file).find(key) == made and keys.listed(file) == [made]


def test_keys_differ_and_defaults_are_the_least(file: str) -> None:
    made = [keys.create(file, f"k{i}") for i in range(5)]
    assert len({key for key, _ in made}) == len({entry.id for _, entry in made}) == 5
    assert keys.listed(file) == [entry for _, entry in made]
    assert made[0][1].scopes == {"infer"}
    assert (made[0][1].rate, made[0][1].expires) == (None, None)
    ring = KeyRing(file)
    assert [ring.find(key) for key, _ in made] == [entry for _, entry in made]


def test_revoking_by_id_and_by_name(file: str) -> None:
    entries = [keys.create(file, name)[1] for name in ("a", "b", "c")]
    assert keys.revoke(file, "b") == entries[1]
    assert keys.revoke(file, entries[0].id) == entries[0]
    assert keys.listed(file) == [entries[2]]
    with pytest.raises(ConfigError, match="key 'b': not in .*keys.json; .*list"):
        keys.revoke(file, "b")
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    # The name is free again, and what the old key had stays out of reach of the new one.
    assert keys.create(file, "b")[1].id != entries[1].id


def test_names_are_unique(file: str) -> None:
    _, made = keys.create(file, "a")
    for taken in ("a", made.id):
        with pytest.raises(ConfigError, match=f"key '{taken}' exists in .*revoke"):
            keys.create(file, taken)
    assert len(keys.listed(file)) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "a b"}, "key name 'a b': expected"),
        ({"name": ""}, "key name '': expected"),
        ({"name": "../x"}, "key name '../x': expected"),
        ({"name": "a\n"}, r"key name 'a\\n': expected"),
        ({"name": "a" * 65}, "expected a letter or digit, then up to 63"),
        ({"scopes": ["infer", "admin"]}, "'x': unknown scope 'admin'; scopes are infer, class"),
        ({"scopes": []}, "'x': no scope given; scopes are infer, classifiers"),
        ({"rate": 0}, "rate 0: expected requests per second above 0; leave it out"),
        ({"rate": -1.5}, "rate -1.5: expected"),
        ({"rate": float("nan")}, "rate nan: expected"),
        ({"rate": float("inf")}, "rate inf: expected"),
        ({"expires": datetime(2020, 1, 1, tzinfo=UTC)}, "expires 2020-01-01.*: in the past"),
        ({"expires": datetime(2100, 1, 1)}, "expires 2100-01-01.*without time zone"),
    ],
)
def test_what_cannot_be_meant_is_refused(file: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        keys.create(file, **{"name": "x", **given})
    assert not os.path.exists(file)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("30d", NOW + timedelta(days=30)),
        ("12h", NOW + timedelta(hours=12)),
        ("90m", NOW + timedelta(minutes=90)),
        ("2030-01-31", datetime(2030, 1, 31, tzinfo=UTC)),
        ("2030-01-31T12:00", datetime(2030, 1, 31, 12, tzinfo=UTC)),
        ("2030-01-31T12:00:00+02:00", datetime(2030, 1, 31, 10, tzinfo=UTC)),
        ("2030-01-31T12:00:00Z", datetime(2030, 1, 31, 12, tzinfo=UTC)),
    ],
)
def test_expiries(text: str, moment: datetime) -> None:
    assert keys.parse_expiry(text, NOW) == moment


@pytest.mark.parametrize("text", ["", "30", "d", "-3d", "1.5d", "3w", "99999999999d", "soon"])
def test_bad_expiries(text: str) -> None:
    with pytest.raises(ConfigError, match=f"expires {text!r}: expected a span like 30d"):
        keys.parse_expiry(text, NOW)


def replaced(**fields: Any) -> Callable[[Any], object]:
    return lambda tree: tree["keys"][0].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced(scopes=["infer", "root"]), "keys.0.scopes.1 'root': unknown scope 'root'; sco"),
        (replaced(scopes=[]), r"keys.0.scopes: .*at least 1"),
        (replaced(rate="fast"), "keys.0.rate 'fast': .*number"),
        (replaced(rate=float("inf")), "keys.0.rate inf: .*finite"),
        (replaced(rate=0), "keys.0.rate 0: .*greater than 0"),
        (replaced(expires="tomorrow"), "keys.0.expires 'tomorrow': "),
        (replaced(expires="2030-01-01T00:00:00"), "keys.0.expires '2030.*timezone"),
        (replaced(name="a/b"), "keys.0.name 'a/b': "),
        (replaced(id=".."), "keys.0.id '..': "),
        (replaced(note="mine"), "keys.0.note 'mine': "),
        (lambda tree: tree["keys"].append(tree["keys"][0]), "two keys have the same id; remove"),
        (lambda tree: tree["keys"][0].pop("created"), "keys.0.created: .*required"),
        (lambda tree: tree.update(keys="none"), "keys 'none': "),
        (lambda tree: tree.update(format=2), "format 2, this CLIP-Ray reads 1; upgrade it"),
        (lambda tree: tree.update(format=0), "format 0: "),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(file: str, change, message: str) -> None:
    keys.create(file, "a")
    edit(file, change)
    before = Path(file).read_bytes()
    actions = [
        lambda: keys.listed(file),
        lambda: keys.create(file, "b"),
        lambda: keys.revoke(file, "a"),
        lambda: KeyRing(file),
    ]
    for action in actions:
        with pytest.raises(ConfigError, match=f"keys.json: {message}"):
            action()
    assert Path(file).read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"cr-0123", b"7"])
def test_what_is_no_keys_file_is_refused(file: str, content: bytes) -> None:
    Path(file).write_bytes(content)
    for action in (keys.listed, KeyRing, lambda file: keys.create(file, "a")):
        with pytest.raises(ConfigError, match="keys.json: .*jobs/keys.py create"):
            action(file)
    assert Path(file).read_bytes() == content


def test_a_key_in_the_place_of_its_hash_is_not_repeated(file: str) -> None:
    key, _ = keys.create(file, "a")
    edit(file, replaced(sha256=key))
    with pytest.raises(ConfigError, match="keys.0.sha256: ") as raised:
        keys.listed(file)
    assert key not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    file = str(tmp_path / "none" / "keys.json")
    for action in (keys.listed, KeyRing, lambda file: keys.revoke(file, "a")):
        with pytest.raises(ConfigError, match="keys.json: cannot read .*No such file.*create"):
            action(file)
    assert not os.path.exists(tmp_path / "none")
    keys.create(file, "a")  # and this makes it
    assert len(keys.listed(file)) == 1


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot change the keys .*mounted secret is read-only"):
        keys.create(str(tmp_path / "file" / "keys.json"), "a")


def test_a_write_that_fails_leaves_the_old_file(file: str, monkeypatch) -> None:
    keys.create(file, "a")
    before = Path(file).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        keys.create(file, "b")
    assert Path(file).read_bytes() == before
    assert sorted(os.listdir(Path(file).parent)) == ["keys.json", "keys.json.lock"]


def create_at_once(file: str, count: int) -> list[str]:
    """Create keys in threads that all begin together; return the names in the file."""
    start = threading.Barrier(count)

    def one(number: int) -> None:
        start.wait()
        keys.create(file, f"k{number}")

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(key.name for key in keys.listed(file))


def test_keys_created_at_once_are_all_kept(file: str) -> None:
    assert create_at_once(file, 12) == sorted(f"k{i}" for i in range(12))


def test_without_the_lock_some_would_be_lost(file: str, monkeypatch) -> None:
    read = Path.read_bytes
    keys.create(file, "first")
    both = threading.Barrier(2)

    def slow(path: Path) -> bytes:
        data = read(path)
        both.wait()  # with the lock, nobody would come to meet the first
        return data

    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", slow)
        threads = [threading.Thread(target=keys.create, args=(file, name)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(keys.listed(file)) == 2


def test_a_writer_that_hangs_is_not_waited_for_without_end(file: str, monkeypatch) -> None:
    keys.create(file, "a")
    monkeypatch.setattr(keys, "LOCK_S", 0.1)
    with open(f"{file}.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for action in (lambda: keys.create(file, "b"), lambda: keys.revoke(file, "a")):
            with pytest.raises(ConfigError, match="keys.json: another process .*keys.json.lock"):
                action()
    keys.create(file, "b")
    assert [key.name for key in keys.listed(file)] == ["a", "b"]


def test_a_link_to_the_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "keys.json"
    link.symlink_to(tmp_path / "there" / "real.json")
    keys.create(str(link), "a")
    assert link.is_symlink() and len(keys.listed(str(tmp_path / "there" / "real.json"))) == 1


def test_the_table_shows_everything_but_the_key(file: str) -> None:
    made = Key("0123456789ab", "search", frozenset(keys.SCOPES), 0.5, LATER, NOW)
    old = Key("ba9876543210", "o", frozenset({"infer"}), None, NOW, NOW)
    assert keys.table([made, old], NOW).splitlines() == [
        "id            name    scopes             rate   created            expires            "
        "state",
        "0123456789ab  search  infer,classifiers  0.5/s  2026-05-01 12:00Z  2100-01-01 00:00Z  "
        "active",
        "ba9876543210  o       infer              -      2026-05-01 12:00Z  2026-05-01 12:00Z  "
        "expired",
    ]
    assert keys.table([], NOW).startswith("id  name")


def test_the_command(tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, str(ROOT / "jobs" / "keys.py"), *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    code, key, note = run(
        *("create", "--file", "k.json", "--name", "search", "--scopes", "infer,classifiers"),
        *("--rate", "2.5", "--expires", "30d"),
    )
    assert code == 0 and "not shown again" in note and key.strip() not in note
    found = KeyRing(str(tmp_path / "k.json")).find(key.strip())
    assert found is not None and (found.rate, found.scopes) == (2.5, set(keys.SCOPES))
    assert timedelta(days=29.9) < found.expires - datetime.now(UTC) <= timedelta(days=30)
    code, output, _ = run("list", "--file", "k.json")
    assert code == 0 and key.strip() not in output
    assert found.id in output and "search" in output and "2.5/s" in output and "active" in output
    assert run("create", "--file", "k.json", "--name", "b", "--scopes", "all")[::2] == (
        2,
        "error: key 'b': unknown scope 'all'; scopes are infer, classifiers\n",
    )
    assert run("revoke", "--file", "k.json", "--key", "search")[1] == (
        f"key search ({found.id}) is revoked\n"
    )
    assert keys.listed(str(tmp_path / "k.json")) == []


# The ring of a replica.


def test_unknown_and_odd_keys_are_not_found(file: str) -> None:
    key, _ = keys.create(file, "a")
    ring = KeyRing(file)
    digest = json.loads(Path(file).read_text())["keys"][0]["sha256"]
    odd = ["", "cr-", key[:-1], key + "0", key.upper(), f" {key}", key[3:], digest]
    odd += ["\udcff", "\0", "\u00fc", "x" * 1_000_000, key[:-1] + "\udcff"]
    assert [ring.find(presented) for presented in odd] == [None] * len(odd)
    assert ring.find(key) is not None


def test_every_entry_is_compared_whichever_matches(file: str, monkeypatch) -> None:
    made = [keys.create(file, f"k{i}")[0] for i in range(4)]
    ring = KeyRing(file)
    compared = []
    original = keys.hmac.compare_digest

    def counted(a: str, b: str) -> bool:
        compared.append(a)
        return original(a, b)

    monkeypatch.setattr(keys.hmac, "compare_digest", counted)
    for presented in [made[0], made[3], "cr-unknown"]:
        compared.clear()
        ring.find(presented)
        assert len(compared) == 4


def test_a_revoked_key_stops_after_the_reread_and_not_before(file: str) -> None:
    clock = Clock()
    key, made = keys.create(file, "a")
    ring = KeyRing(file, reread_s=5, clock=clock)
    keys.revoke(file, "a")
    new, new_made = keys.create(file, "b")
    clock.seconds += 4.9
    assert ring.find(key) == made and ring.find(new) is None
    clock.seconds += 0.1
    assert ring.find(key) is None and ring.find(new) == new_made


def test_the_default_is_within_ten_seconds(file: str, monkeypatch) -> None:
    clock = Clock()
    key, _ = keys.create(file, "a")
    ring = KeyRing(file, clock=clock)
    keys.revoke(file, "a")
    looks = []
    load = ring._load
    monkeypatch.setattr(ring, "_load", lambda: looks.append(clock.seconds) or load())
    # Requests all the while: none puts the next look off, and few of them look.
    for _ in range(79):
        clock.seconds += 0.125
        ring.find("cr-unknown")
    assert ring.find(key) is None
    assert looks == [105]


def test_an_unchanged_file_is_not_parsed_again(file: str, monkeypatch) -> None:
    clock = Clock()
    key, _ = keys.create(file, "a")
    ring = KeyRing(file, clock=clock)
    monkeypatch.setattr(keys, "_parse", None)  # would fail
    clock.seconds += 60
    assert ring.find(key) is not None


def test_an_expired_key_is_refused_without_any_change(file: str) -> None:
    now = [datetime.now(UTC)]
    key, made = keys.create(file, "a", expires=now[0] + timedelta(hours=1))
    ring = KeyRing(file, now=lambda: now[0])
    assert ring.find(key) == made
    now[0] = made.expires - timedelta(seconds=1)
    assert ring.find(key) == made
    now[0] = made.expires
    assert ring.find(key) is None


@pytest.mark.parametrize("how", ["missing", "broken", "no file"])
def test_a_broken_file_keeps_the_last_good_keys_and_is_logged_once(
    file: str, caplog, how: str
) -> None:
    clock = Clock()
    key, made = keys.create(file, "a")
    good = Path(file).read_bytes()
    ring = KeyRing(file, clock=clock)

    def break_it() -> None:
        if how == "broken":
            Path(file).write_bytes(b'{"format": 1, "keys": [')
        else:
            os.unlink(file)
            if how == "no file":
                os.mkdir(file)

    def mend_it(content: bytes) -> None:
        if how == "no file":
            os.rmdir(file)
        Path(file).write_bytes(content)

    with caplog.at_level(logging.WARNING):
        for round_ in (1, 2):
            break_it()
            for _ in range(3):
                clock.seconds += 5
                assert ring.find(key) == made
            assert len(caplog.records) == round_
            mend_it(good)
            clock.seconds += 5
            assert ring.find(key) == made
    assert "keys stay as they were" in caplog.text and key not in caplog.text
    keys.revoke(file, "a")
    clock.seconds += 5
    assert ring.find(key) is None


def test_an_edit_in_place_is_seen(file: str) -> None:
    """Same inode, same size: the time alone tells it."""
    clock = Clock()
    key, made = keys.create(file, "a")
    ring = KeyRing(file, clock=clock)
    text = Path(file).read_text()
    inode = os.stat(file).st_ino
    Path(file).write_text(text.replace('"name": "a"', '"name": "b"'))
    assert os.stat(file).st_ino == inode
    clock.seconds += 5
    found = ring.find(key)
    assert found is not None and (found.name, found.id) == ("b", made.id)


def test_a_mounted_secret_is_swapped_by_its_directory(tmp_path: Path) -> None:
    """As Kubernetes does it: file -> ..data/file, and ..data -> a directory of a moment."""
    clock = Clock()
    source = str(tmp_path / "source.json")
    first, _ = keys.create(source, "a")
    mount = tmp_path / "mount"
    times = (1_700_000_000_000_000_000, 1_700_000_000_000_000_000)

    def publish(moment: str) -> None:
        folder = mount / moment
        folder.mkdir(parents=True)
        (folder / "keys.json").write_bytes(Path(source).read_bytes())
        os.utime(folder / "keys.json", ns=times)  # the inode alone tells
        (mount / "..new").symlink_to(moment)
        os.rename(mount / "..new", mount / "..data")

    publish("..2026_01")
    (mount / "keys.json").symlink_to("..data/keys.json")
    ring = KeyRing(str(mount / "keys.json"), clock=clock)
    assert ring.find(first) is not None
    keys.revoke(source, "a")
    second, _ = keys.create(source, "b")
    publish("..2026_02")
    clock.seconds += 5
    assert ring.find(first) is None and ring.find(second) is not None


# The rate limiter of a replica.


def a_key(rate: float | None, id: str = "a") -> Key:
    return Key(id, "name", frozenset({"infer"}), rate, None)


def test_a_burst_then_the_rate() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    assert [limiter.take(a_key(4)) for _ in range(5)] == [0, 0, 0, 0, 0.25]
    assert limiter.take(a_key(4)) == 0.25  # a refusal takes nothing
    clock.seconds += 0.125
    assert limiter.take(a_key(4)) == pytest.approx(0.125)
    clock.seconds += 0.125
    assert [limiter.take(a_key(4)) for _ in range(2)] == [0, 0.25]
    clock.seconds += 3600  # rest is not saved up beyond the burst
    assert [limiter.take(a_key(4)) for _ in range(5)] == [0, 0, 0, 0, 0.25]


def test_less_than_one_a_second() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    assert [limiter.take(a_key(0.1)) for _ in range(2)] == [0, 10]
    clock.seconds += 10
    assert limiter.take(a_key(0.1)) == 0


@pytest.mark.parametrize("rate", [0.07, 0.3, 1, 3, 7.7, 50, 1e4])
def test_who_waits_as_told_is_served(rate: float) -> None:
    clock = Clock()
    clock.seconds = 1e6 + 1 / 3
    limiter = RateLimiter(clock)
    begin, served = clock.seconds, 0
    for _ in range(500):
        wait = limiter.take(a_key(rate))
        if wait:
            clock.seconds += wait
            assert limiter.take(a_key(rate)) == 0
        served += 1
    assert served <= max(1, rate) + rate * (clock.seconds - begin) + 1e-3


def test_keys_have_their_own_share_and_may_have_no_limit() -> None:
    limiter = RateLimiter(Clock())
    assert [limiter.take(a_key(1, id)) for id in "abab"] == [0, 0, 1, 1]
    assert {limiter.take(a_key(None)) for _ in range(1000)} == {0}


def test_a_new_rate_holds_at_once() -> None:
    limiter = RateLimiter(Clock())
    assert limiter.take(a_key(100)) == 0
    assert [limiter.take(a_key(2)) for _ in range(3)] == [0, 0, 0.5]
