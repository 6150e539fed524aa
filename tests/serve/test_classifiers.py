from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from clip_ray.config.serving import Limits
from clip_ray.storage import LocalStore, open_store
from serve.classifiers import ClassifierStore
from serve.definitions import DEFINITION, Definition, folder_of, is_stale, pack, unpack
from serve.errors import ApiError

DIM = 4
OLD, NEW, OLDER = "0" * 64, "1" * 64, "2" * 64
PETS = Definition(("cat", "dog"), ("a {}.", "the {c}"), "softmax")
CARS = Definition(("car", "bus", "tram"), ("{}",), "sigmoid")


def model(digest=NEW):
    return SimpleNamespace(
        served=SimpleNamespace(digest=digest), encoder=SimpleNamespace(embed_dim=DIM)
    )


def expected(definition, digest=NEW):
    """What Builder computes: a row that depends on label, templates and model."""
    seeds = [f"{digest} {label} {definition.templates}" for label in definition.labels]
    rows = [list(hashlib.sha256(seed.encode()).digest()[:DIM]) for seed in seeds]
    return np.array(rows, np.float32)


class Builder:
    """Computes matrices, when `go` is set; counts."""

    def __init__(self):
        self.calls, self.go, self.broken = [], None, set()

    async def __call__(self, loaded, labels, templates):
        self.calls.append((loaded.served.digest, tuple(labels)))
        if self.go is not None:
            await self.go.wait()
        if labels[0] in self.broken:
            raise RuntimeError(f"cannot encode {labels[0]}")
        return expected(
            Definition(tuple(labels), tuple(templates), "softmax"), loaded.served.digest
        )


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Site:
    """A state directory and the replicas on it, under one clock."""

    def __init__(self, store):
        self.store, self.clock, self.replicas = store, Clock(), []

    def replica(self, **options):
        build = Builder()
        limits = options.pop("limits", Limits())
        made = ClassifierStore(self.store, build, limits, clock=self.clock, **options)
        self.replicas.append(made)
        return made, build

    @property
    def matrices(self):
        return [name for name in self.store.files() if name.endswith(".npy")]

    def path(self, namespace, id):
        return Path(self.store.uri) / "classifiers" / folder_of(namespace) / folder_of(id)


@pytest.fixture
def site(tmp_path):
    made = Site(open_store(tmp_path / "state"))
    yield made
    for replica in made.replicas:
        replica.close()


async def settle(builder, count=1):
    """Wait until `count` computations have begun."""
    async with asyncio.timeout(5):
        while len(builder.calls) < count:
            await asyncio.sleep(0.001)


async def refused(call):
    """Return status and code of the error that a call raises."""
    with pytest.raises(ApiError) as caught:
        await call
    return caught.value.status, caught.value.code


def test_what_is_put_is_read_with_its_time_and_digest(site):
    async def run():
        a, _ = site.replica()
        put = await a.put("key", "pets", PETS)
        assert await a.get("key", "pets") == put
        assert (put.labels, put.templates, put.scoring) == (PETS.labels, PETS.templates, "softmax")
        assert put.created.endswith("+00:00") and put.digest == PETS.digest
        assert await a.get("key", "cars") is None and await a.get("other", "pets") is None
        definition, matrix, _ = await a.matrix(model(), "key", "pets")
        assert definition == put
        np.testing.assert_array_equal(matrix, expected(PETS))

    asyncio.run(run())


def test_every_replica_sees_a_put_and_a_delete_within_5_seconds(site):
    async def run():
        (a, _), (b, build) = site.replica(), site.replica()
        assert await b.get("key", "pets") is None
        await a.put("key", "pets", PETS)
        assert (await b.get("key", "pets")).labels == PETS.labels  # what was unknown is looked for
        await b.matrix(model(), "key", "pets")

        await a.put("key", "pets", CARS)
        assert (await a.get("key", "pets")).labels == CARS.labels  # at once where it was PUT
        site.clock.now += 2.9
        assert (await b.get("key", "pets")).labels == PETS.labels  # believed: no read a request
        site.clock.now += 0.2
        definition, matrix, _ = await b.matrix(model(), "key", "pets")
        assert (definition.labels, definition.scoring) == (CARS.labels, "sigmoid")
        np.testing.assert_array_equal(matrix, expected(CARS))

        assert await a.delete("key", "pets") and await a.get("key", "pets") is None
        site.clock.now += 3.1
        assert await b.get("key", "pets") is None
        assert await refused(b.matrix(model(), "key", "pets")) == (404, "classifier_not_found")
        assert not await b.delete("key", "pets")

        await a.put("key", "pets", PETS)  # again, under the same id
        assert (await b.get("key", "pets")).labels == PETS.labels
        np.testing.assert_array_equal((await b.matrix(model(), "key", "pets"))[1], expected(PETS))
        assert [labels for _, labels in build.calls] == [PETS.labels, CARS.labels, PETS.labels]

    asyncio.run(run())


class SlowReads:
    """A store whose reads of a definition take the content, and then wait for `go`."""

    def __init__(self, store, go):
        self.inner, self.go, self.reads = store, go, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def child(self, name):
        made = SlowReads(self.inner.child(name), self.go)
        return made

    def read(self, name, start=0, stop=None):
        data = self.inner.read(name, start, stop)
        self.reads += 1
        self.go.wait(5)
        return data


def test_a_slow_read_never_hides_a_write_of_the_same_replica(site):
    async def run():
        go = threading.Event()
        plain, _ = site.replica()
        await plain.put("key", "pets", PETS)
        site.store = SlowReads(site.store, go)
        slow, _ = site.replica()
        early = [asyncio.create_task(slow.get("key", "pets")) for _ in range(3)]
        while not slow._store.reads:
            await asyncio.sleep(0.001)
        assert slow._store.reads == 1  # shared
        await slow.put("key", "pets", CARS)
        assert (await slow.get("key", "pets")).labels == CARS.labels
        assert await slow.delete("key", "pets")
        late = asyncio.create_task(slow.get("key", "pets"))
        await asyncio.sleep(0.01)
        go.set()
        assert await late is None
        assert {one.labels for one in await asyncio.gather(*early)} == {PETS.labels}
        assert await slow.get("key", "pets") is None  # the early read was not remembered

    asyncio.run(run())


def test_a_new_process_reads_matrices_that_another_computed(site):
    async def run():
        a, _ = site.replica()
        await a.put("key", "pets", PETS)
        await a.matrix(model(), "key", "pets")
        b, build = site.replica()
        definition, matrix, _ = await b.matrix(model(), "key", "pets")
        assert definition.labels == PETS.labels and build.calls == []
        np.testing.assert_array_equal(matrix, expected(PETS))
        assert (b.hits, b.misses) == (0, 1)
        assert (await b.matrix(model(), "key", "pets"))[1] is matrix and b.hits == 1
        # For numpy it is a file like any other.
        (name,) = site.matrices
        np.testing.assert_array_equal(np.load(Path(site.store.uri) / name), expected(PETS))

    asyncio.run(run())


def test_another_scoring_needs_no_other_matrix(site):
    async def run():
        a, build = site.replica()
        await a.put("key", "pets", PETS)
        await a.matrix(model(), "key", "pets")
        await a.put("key", "pets", Definition(PETS.labels, PETS.templates, "sigmoid"))
        definition, _, _ = await a.matrix(model(), "key", "pets")
        assert definition.scoring == "sigmoid" and len(build.calls) == 1
        assert len(site.matrices) == 1  # for those who come later, too

    asyncio.run(run())


def test_s3_holds_classifiers_like_a_directory(s3, tmp_path):
    site = Site(open_store(f"s3://bucket/{tmp_path.name}/state", s3))

    async def run():
        (a, _), (b, build) = site.replica(), site.replica()
        await a.put("key=/é", "Pets.v1", PETS)
        await a.put("key=/é", "pets.v1", CARS)
        await a.matrix(model(), "key=/é", "Pets.v1")
        np.testing.assert_array_equal(
            (await b.matrix(model(), "key=/é", "Pets.v1"))[1], expected(PETS)
        )
        assert build.calls == []
        assert [one.id for one in await b.list("key=/é")] == ["Pets.v1", "pets.v1"]
        assert await b.list("another") == ()
        assert await b.prepare(model(OLD), frozenset({OLD})) == 2
        assert len(site.matrices) == 2 and all(OLD in name for name in site.matrices)
        assert await a.delete("key=/é", "Pets.v1")
        assert [one.id for one in await b.list("key=/é")] == ["pets.v1"]
        assert len(site.store.files()) == 2
        for replica in site.replicas:
            replica.close()

    asyncio.run(run())


def test_callers_of_one_matrix_share_its_computation(site):
    async def run():
        a, build = site.replica()
        build.go = asyncio.Event()
        await a.put("key", "pets", PETS)
        calls = [asyncio.create_task(a.matrix(model(), "key", "pets")) for _ in range(4)]
        calls.append(asyncio.create_task(a.matrix(model(OLD), "key", "pets")))
        await settle(build)
        calls[0].cancel()
        build.go.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert sorted(digest for digest, _ in build.calls) == [OLD, NEW]
        assert results[1][1] is results[2][1] is results[3][1]
        np.testing.assert_array_equal(results[4][1], expected(PETS, OLD))

    asyncio.run(run())


def test_a_computation_longer_than_a_request_gets_done(site):
    async def run():
        a, build = site.replica()
        build.go = asyncio.Event()
        await a.put("key", "pets", PETS)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(a.matrix(model(), "key", "pets"), 0.05)
        assert len(build.calls) == 1
        build.go.set()
        await a.matrix(model(), "key", "pets")
        assert len(build.calls) == 1 and len(site.matrices) == 1

    asyncio.run(run())


def test_an_error_of_the_model_is_not_kept(site):
    async def run():
        a, build = site.replica()
        build.broken = {"cat"}
        await a.put("key", "pets", PETS)
        with pytest.raises(RuntimeError, match="cannot encode cat"):
            await a.matrix(model(), "key", "pets")
        build.broken = set()
        await a.matrix(model(), "key", "pets")

    asyncio.run(run())


def test_a_matrix_that_is_not_finite_is_never_written(site):
    async def run():
        a, _ = site.replica()

        async def faulty(loaded, labels, templates):
            return np.full((len(labels), DIM), np.nan, np.float32)

        await a.put("key", "pets", PETS)
        a._build = faulty
        assert await refused(a.matrix(model(), "key", "pets")) == (500, "not_finite")
        assert site.matrices == []

    asyncio.run(run())


def test_what_is_deleted_while_its_matrix_is_computed_leaves_no_file(site):
    async def run():
        (a, build), (b, _) = site.replica(), site.replica()
        build.go = asyncio.Event()
        await a.put("key", "pets", PETS)
        call = asyncio.create_task(a.matrix(model(), "key", "pets"))
        await settle(build)
        await b.delete("key", "pets")
        build.go.set()
        assert await refused(call) == (404, "classifier_not_found")
        assert site.store.files() == [] and a._matrices.bytes == 0

    asyncio.run(run())


def labelled(number):
    return Definition((f"label {number}",), ("{}",), "softmax")


async def leave(call):
    """Ask, and leave before the answer."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call, 0.02)


def test_one_matrix_is_computed_at_a_time_and_few_wait(site):
    async def run():
        a, build = site.replica()
        build.go = asyncio.Event()
        for number in range(7):
            await a.put("key", f"id{number}", labelled(number))
        for number in range(5):
            await leave(a.matrix(model(), "key", f"id{number}"))
        assert len(build.calls) == 1
        async with asyncio.timeout(5):
            assert await refused(a.matrix(model(), "key", "id5")) == (429, "overloaded")
        preparing = asyncio.create_task(a.prepare(model(), frozenset()))  # waits nevertheless
        await asyncio.sleep(0.02)
        build.go.set()
        assert await preparing == 7 and a.failures == 0
        assert len(build.calls) == 7 and len(site.matrices) == 7  # those left behind, too

    asyncio.run(run())


def test_clients_that_put_ask_and_leave_pile_nothing_up(site):
    async def run():
        a, build = site.replica()
        build.go = asyncio.Event()
        for number in range(30):
            await a.put("key", "same", labelled(number))
            await leave(a.matrix(model(), "key", "same"))
            assert len(a._work) == 1 and a._waiting == 0  # that of the newest
        assert await a.delete("key", "same")
        await asyncio.sleep(0.02)
        assert a._work == {} and not a._building.locked()
        build.go.set()
        await a.put("key", "same", labelled(0))
        await a.matrix(model(), "key", "same")

    asyncio.run(run())


def test_who_waits_for_what_is_replaced_is_told_soon(site):
    async def run():
        a, build = site.replica()
        build.go = asyncio.Event()
        for id in ("busy", "replaced", "deleted", "scored"):
            await a.put("key", id, PETS)
        calls = [asyncio.create_task(a.matrix(model(), "key", "busy"))]
        await settle(build)
        for id in ("replaced", "deleted", "scored"):
            calls.append(asyncio.create_task(a.matrix(model(), "key", id)))
        while a._waiting < 3:
            await asyncio.sleep(0.001)
        await a.put("key", "replaced", CARS)
        await a.put("key", "scored", Definition(PETS.labels, PETS.templates, "sigmoid"))
        await a.delete("key", "deleted")
        async with asyncio.timeout(1):  # though what is computed goes on
            assert await refused(calls[1]) == (409, "classifier_changed")
            assert await refused(calls[2]) == (404, "classifier_not_found")
        build.go.set()
        await asyncio.gather(calls[0], calls[3])

    asyncio.run(run())


def test_what_another_replica_replaced_is_not_computed(site):
    async def run():
        (a, build), (b, _) = site.replica(), site.replica()
        build.go = asyncio.Event()
        await a.put("key", "busy", CARS)
        await a.put("key", "pets", PETS)
        busy = asyncio.create_task(a.matrix(model(), "key", "busy"))
        await settle(build)
        waits = asyncio.create_task(a.matrix(model(), "key", "pets"))
        while not a._waiting:
            await asyncio.sleep(0.001)
        await b.put("key", "pets", CARS)
        build.go.set()
        assert await refused(waits) == (409, "classifier_changed")
        await busy
        assert len(build.calls) == 1

    asyncio.run(run())


DAMAGE = {
    "cut": lambda data: data[:-40],
    "empty": lambda data: b"",
    "bit": lambda data: data[:150] + bytes([data[150] ^ 1]) + data[151:],
    "pickle": lambda data: b"\x80\x04K\x01.",
    "no seal": lambda data: data[:-32],
    "shape": lambda data: pack(np.ones((1, DIM), np.float32), ""),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_matrix_is_computed_again(site, kind):
    async def run():
        a, _ = site.replica()
        await a.put("key", "pets", PETS)
        await a.matrix(model(), "key", "pets")
        path = Path(site.store.uri) / site.matrices[0]
        good = path.read_bytes()
        path.write_bytes(DAMAGE[kind](good))
        b, build = site.replica()
        np.testing.assert_array_equal((await b.matrix(model(), "key", "pets"))[1], expected(PETS))
        assert len(build.calls) == 1 and path.read_bytes() == good

    asyncio.run(run())


def test_a_matrix_under_anothers_name_is_refused():
    matrix = np.eye(3, dtype=np.float32)
    data = pack(matrix, "mine")
    np.testing.assert_array_equal(unpack(data, "mine"), matrix)
    assert unpack(data, "yours") is None


BAD = {
    b"": "damaged",
    b"{": "damaged",
    b"\xff\xfe": "damaged",
    b"[" * 100_000: "damaged",
    b"null": "damaged",
    b'{"format": 2, "tree": {}}': "format 2 is of a newer version, this one reads 1",
    b'{"format": 1}': "damaged",
}


@pytest.mark.parametrize("content", BAD)
def test_a_file_that_cannot_be_read_concerns_its_id_alone(site, content):
    async def run():
        a, _ = site.replica()
        for id in ("cars", "pets", "zoo"):
            await a.put("key", id, CARS if id == "cars" else PETS)
        (site.path("key", "pets") / DEFINITION).write_bytes(content)
        b, _ = site.replica()
        for call in (b.get("key", "pets"), b.matrix(model(), "key", "pets")):
            with pytest.raises(
                ApiError, match="'pets' cannot be read: .*PUT it again or"
            ) as caught:
                await call
            assert (caught.value.status, caught.value.code) == (503, "classifier_unreadable")
            assert BAD[content] in caught.value.message
        listed = await b.list("key")
        assert [one.id for one in listed] == ["cars", "pets", "zoo"]
        assert [one.error is None for one in listed] == [True, False, True]
        assert listed[1].labels == 0 and BAD[content] in listed[1].error
        assert await b.prepare(model(), frozenset()) == 2 and b.failures == 1
        await b.matrix(model(), "key", "cars")
        assert (await b.put("key", "pets", CARS)).labels == CARS.labels
        assert (await b.get("key", "pets")).labels == CARS.labels
        (site.path("key", "zoo") / DEFINITION).write_bytes(content)
        assert await b.delete("key", "zoo")

    asyncio.run(run())


def test_labels_that_are_not_the_digests_are_told(site):
    async def run():
        a, _ = site.replica()
        await a.put("key", "pets", PETS)
        path = site.path("key", "pets") / DEFINITION
        fields = json.loads(path.read_text())
        path.write_text(json.dumps({**fields, "labels": ["cat", "dig"]}))
        b, _ = site.replica()
        assert await refused(b.get("key", "pets")) == (503, "classifier_unreadable")

    asyncio.run(run())


def test_a_store_that_does_not_answer_is_503(site, tmp_path):
    async def run():
        a, _ = site.replica()
        await a.put("key", "pets", PETS)
        os.rename(tmp_path / "state", tmp_path / "gone")
        (tmp_path / "state").write_text("not a directory")
        assert (await a.get("key", "pets")).labels == PETS.labels
        site.clock.now += 4
        unavailable = (503, "classifier_store_unavailable")
        assert await refused(a.get("key", "pets")) == unavailable
        assert await refused(a.put("key", "cars", CARS)) == unavailable
        (tmp_path / "state").unlink()
        os.rename(tmp_path / "gone", tmp_path / "state")
        assert (await a.get("key", "pets")).labels == PETS.labels

    asyncio.run(run())


HOSTILE = [
    "",
    ".",
    "..",
    "../../etc",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a\0b",
    "A",
    "a",
    "=41",
    "=" * 300,
    "x" * 300,
    "x" * 301,
    "é" * 60,
    "\ud800",
    "*?[a]",
    "classifiers",
    DEFINITION,
    "%2e%2e",
    "a.tmp",
]


def test_namespaces_of_any_spelling_stay_apart_and_inside(site, tmp_path):
    async def run():
        a, _ = site.replica()
        for number, namespace in enumerate(HOSTILE):
            await a.put(namespace, "id", Definition((f"label {number}",), ("{}",), "softmax"))
        b, _ = site.replica()
        for number, namespace in enumerate(HOSTILE):
            (listed,) = await b.list(namespace)
            assert (listed.id, listed.labels) == ("id", 1)
            assert (await b.get(namespace, "id")).labels == (f"label {number}",)
        assert len({folder_of(namespace).lower() for namespace in HOSTILE}) == len(HOSTILE)
        assert await b.prepare(model(), frozenset()) == len(HOSTILE)
        assert await b.delete("..", "id") and await b.list("..") == ()
        assert len(await b.list(".")) == 1

    asyncio.run(run())
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parts[:2] for path in files} == {("state", "classifiers")}
    assert {len(path.parts) for path in files} == {5}


@pytest.mark.parametrize("id", ["", ".", "..", "a/b", "../x", "-a", "a\n", "é", "a" * 65, "a\0"])
def test_an_impossible_id_is_refused(site, id):
    async def run():
        a, _ = site.replica()
        for call in (
            a.put("key", id, PETS),
            a.get("key", id),
            a.delete("key", id),
            a.matrix(model(), "key", id),
        ):
            assert await refused(call) == (400, "invalid_classifier_id")
        assert site.store.files() == []

    asyncio.run(run())


def test_ids_keep_their_spelling(site):
    ids = ["A", "Z" * 64, "a", "a-b_c", "v1.0", "x.tmp"]

    async def run():
        a, _ = site.replica()
        for id in ids:
            await a.put("key", id, PETS)
        assert [one.id for one in await a.list("key")] == sorted(ids)

    asyncio.run(run())


def test_limits(site):
    async def run():
        a, _ = site.replica(limits=Limits(stored_classifiers=2, stored_prompts=4))
        await a.put("key", "one", PETS)
        await a.put("key", "two", PETS)
        with pytest.raises(ApiError, match="2 classifiers .* limit is 2; delete one") as caught:
            await a.put("key", "three", PETS)
        assert (caught.value.status, caught.value.code) == (409, "too_many_classifiers")
        await a.put("key", "two", CARS)  # replacing one is no further one
        await a.put("another", "three", PETS)
        await a.delete("key", "one")
        await a.put("key", "three", PETS)
        many = Definition(("a", "b", "c"), ("{}", "a {}"), "softmax")
        assert await refused(a.put("key", "two", many)) == (413, "too_many_prompts")
        with pytest.raises(ApiError) as caught:
            await a.put("key", "two", Definition(("a",), ("{}", "photo"), "softmax"))
        assert (caught.value.status, caught.value.param) == (400, "templates[1]")
        long = Definition(("a" * 999,), ("{}" * 500,), "softmax")
        assert await refused(a.put("key", "two", long)) == (413, "text_too_long")

    asyncio.run(run())


def test_puts_at_once_keep_the_number_of_classifiers(site):
    async def run():
        a, _ = site.replica(limits=Limits(stored_classifiers=2))
        puts = [a.put("key", f"id{number}", PETS) for number in range(6)]
        results = await asyncio.gather(*puts, return_exceptions=True)
        assert sum(isinstance(one, ApiError) and one.status == 409 for one in results) == 4
        assert len(await a.list("key")) == 2 and len(a._putting) == 0

    asyncio.run(run())


class CountedReads:
    """A store that notes how many reads are under way at once."""

    def __init__(self, inner, most):
        self.inner, self.most, self.now = inner, most, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def child(self, name):
        return CountedReads(self.inner.child(name), self.most)

    def read(self, name, start=0, stop=None):
        self.now += 1
        self.most.append(self.now)
        time.sleep(0.005)
        self.now -= 1
        return self.inner.read(name, start, stop)


def test_a_listing_holds_one_definition_at_a_time(site):
    async def run():
        a, _ = site.replica()
        for number in range(6):
            await a.put("key", f"id{number}", CARS)
        most = []
        site.store = CountedReads(site.store, most)
        b, _ = site.replica()
        listed = await b.list("key")
        assert len(most) == 6 and max(most) == 1
        assert [(one.labels, one.templates, one.scoring) for one in listed] == [
            (3, 1, "sigmoid")
        ] * 6
        assert all(one.created.endswith("+00:00") and one.error is None for one in listed)

    asyncio.run(run())


def test_a_put_sweeps_the_matrices_of_what_it_replaces(site):
    async def run():
        a, _ = site.replica()
        for id in ("pets", "pets2"):
            await a.put("key", id, PETS)
            await a.matrix(model(), "key", id)
        await a.put("key", "pets", CARS)
        assert [name.split("/")[2] for name in site.matrices] == ["pets2"]

    asyncio.run(run())


def test_prepare_makes_all_matrices_of_a_model_before_it_serves(site):
    async def run():
        (a, _), (b, build) = site.replica(), site.replica()
        await a.put("one", "pets", PETS)
        await a.put("one", "cars", CARS)
        await a.put("two", "pets", PETS)
        await a.matrix(model(), "one", "cars")  # one of them is there
        assert await b.prepare(model(), frozenset({OLD})) == 3
        assert [labels for _, labels in build.calls] == [PETS.labels] * 2
        assert len(site.matrices) == 3
        for namespace, id in (("one", "pets"), ("one", "cars"), ("two", "pets")):
            await b.matrix(model(), namespace, id)
        assert (b.hits, b.misses, b.failures, len(build.calls)) == (3, 0, 0, 2)
        assert await b.prepare(model(), frozenset({OLD})) == 3 and len(build.calls) == 2

    asyncio.run(run())


def test_prepare_does_not_believe_what_it_has_in_memory(site):
    async def run():
        (a, _), (b, build) = site.replica(), site.replica()
        await b.put("key", "pets", PETS)
        await a.put("key", "pets", CARS)
        assert await b.prepare(model(), frozenset()) == 1
        assert build.calls == [(NEW, CARS.labels)]

    asyncio.run(run())


def test_prepare_of_nothing(site):
    async def run():
        a, _ = site.replica()
        assert await a.prepare(model(), frozenset()) == 0

    asyncio.run(run())


def test_one_failure_leaves_the_others_to_be_prepared(site, caplog):
    async def run():
        a, build = site.replica()
        await a.put("key", "cars", CARS)
        await a.put("key", "pets", PETS)
        build.broken = {"car"}
        assert await a.prepare(model(), frozenset()) == 1
        assert a.failures == 1
        build.broken = set()
        await a.matrix(model(), "key", "cars")

    asyncio.run(run())
    failed = [record for record in caplog.records if record.exc_info]
    assert len(failed) == 1 and "key/cars is not ready" in failed[0].getMessage()


def test_a_put_during_prepare_is_not_missed(site):
    async def run():
        (a, build), (b, _) = site.replica(), site.replica()
        for id in "dmz":
            await a.put("key", id, PETS)
        await b.matrix(model(), "key", "d")  # only read by the other
        build.go = asyncio.Event()
        preparing = asyncio.create_task(a.prepare(model(), frozenset()))
        await settle(build)
        await b.put("key", "a", CARS)  # new, on another replica
        await b.put("key", "m", CARS)  # replaces the one that is being computed
        await b.delete("key", "z")
        await b.delete("key", "d")  # after it was made ready
        build.go.set()
        assert await preparing == 2
        done = len(build.calls)
        for id in "am":
            np.testing.assert_array_equal((await a.matrix(model(), "key", id))[1], expected(CARS))
        assert len(build.calls) == done and a.misses == 0
        assert len(site.matrices) == 2

    asyncio.run(run())


def test_prepare_ends_though_somebody_puts_all_the_time(site, caplog):
    async def run():
        (a, build), (b, _) = site.replica(), site.replica()
        await a.put("key", "pets", PETS)
        inner = a._build

        async def putting(loaded, labels, templates):
            await b.put("key", f"id{len(build.calls)}", Definition(("x",), ("{}",), "softmax"))
            return await inner(loaded, labels, templates)

        a._build = putting
        async with asyncio.timeout(5):
            assert await a.prepare(model(), frozenset()) > 1

    asyncio.run(run())
    assert "keep changing" in caplog.text


def test_matrices_of_models_that_are_gone_are_swept(site):
    async def run():
        a, build = site.replica()
        await a.put("key", "pets", PETS)
        for digest in (OLDER, OLD):
            await a.matrix(model(digest), "key", "pets")
        pets = site.path("key", "pets")
        (pets / f"{'a' * 12}-{OLD}.npy").write_bytes(b"of a definition before")
        orphan = site.path("key", "deleted") / f"{'a' * 12}-{OLD}.npy"
        orphan.parent.mkdir()
        orphan.write_bytes(b"of a definition that is deleted")
        foreign = [pets / "notes.npy", site.path("key", "x") / "deeper" / orphan.name]
        for path in foreign:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"not ours")
        damaged = site.path("key", "damaged")
        damaged.mkdir()
        (damaged / DEFINITION).write_bytes(b"{")
        (damaged / f"{'a' * 12}-{OLD}.npy").write_bytes(b"may be wanted again")
        assert await a.prepare(model(NEW), frozenset({OLD})) == 1
        assert not orphan.exists() and all(path.exists() for path in foreign)
        assert [path.name for path in damaged.glob("*.npy")] == [f"{'a' * 12}-{OLD}.npy"]
        sha12 = PETS.digest[:12]
        assert sorted(path.name for path in pets.glob("*-*.npy")) == [
            f"{sha12}-{OLD}.npy",
            f"{sha12}-{NEW}.npy",
        ]
        assert [digest for digest, _ in build.calls] == [OLDER, OLD, NEW]
        assert {key[2] for key in a._matrices.keys()} == {OLD, NEW}  # in memory, too

    asyncio.run(run())


def test_what_is_stale():
    place, name = "key/pets", f"key/pets/{'a' * 12}-{OLD}.npy"
    current = {place: "a" * 64}
    assert not is_stale(name, current, {OLD})
    assert not is_stale(name, {place: ""}, {OLD})
    assert is_stale(name, {place: "b" * 64}, {OLD})
    assert is_stale(name, {}, {OLD})
    assert is_stale(name, current, {NEW})
    assert not is_stale(f"key/pets/{DEFINITION}", {}, set())


def test_prepare_fills_half_of_the_memory_with_those_in_use_first(site):
    async def run():
        size = 4 * DIM * len(PETS.labels)
        a, build = site.replica(memory_bytes=4 * size)
        for id in "abcd":
            await a.put("key", id, PETS)
        await a.matrix(model(OLD), "key", "c")
        assert await a.prepare(model(), frozenset({OLD})) == 4
        assert sorted(key[0] for key in a._matrices.keys() if key[2] == NEW) == ["key/a", "key/c"]
        assert len([name for name in site.matrices if NEW in name]) == 4  # all are in the store
        calls = len(build.calls)
        await a.matrix(model(OLD), "key", "c")  # the model that serves keeps what it uses
        for id in "abcd":
            await a.matrix(model(), "key", id)
        assert (a.hits, a.misses, len(build.calls)) == (3, 3, calls)
        assert a._matrices.bytes <= 4 * size

    asyncio.run(run())


def test_an_interrupted_write_is_never_seen(site, monkeypatch):
    async def run():
        (a, _), (b, _) = site.replica(), site.replica()
        await a.put("key", "pets", PETS)

        def killed(source, target):
            raise OSError("killed here")

        with monkeypatch.context() as patch:
            patch.setattr("clip_ray.storage.os.replace", killed)
            assert await refused(a.put("key", "pets", CARS)) == (
                503,
                "classifier_store_unavailable",
            )
        assert (await b.get("key", "pets")).labels == PETS.labels
        assert isinstance(site.store, LocalStore) and len(site.store.files()) == 1

    asyncio.run(run())
