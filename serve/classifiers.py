"""Stored classifiers: named labels and templates of a key, and their matrices for each model.

Replicas on several nodes share one directory and take no locks. A file is replaced whole, the
last PUT wins, and a replica believes what it has read for a few seconds only. What cannot be read
concerns one classifier and never another. Matrices are a cache: whatever is wrong with one, it is
computed again.

Left out: the files' format (serve.definitions), who may write (serve.routes), and classifiers
that come with a request (serve.engine).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
import weakref
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from clip_ray.config.serving import Limits
from clip_ray.errors import ConfigError
from clip_ray.eval.prompts import fill
from clip_ray.storage import Store
from serve.caches import Lru, MatrixCache, SingleFlight
from serve.definitions import (
    DEFINITION,
    Definition,
    Floats,
    Scoring,
    UnreadableError,
    dump,
    folder_of,
    id_of,
    is_stale,
    matrix_name,
    pack,
    parse,
    place_of,
    places_in,
    unpack,
)
from serve.errors import ApiError
from serve.items import check_prompt_lengths

if TYPE_CHECKING:
    from serve.engine import Loaded

Build = Callable[["Loaded", Sequence[str], Sequence[str]], Coroutine[Any, Any, Floats]]
T = TypeVar("T")

# The largest matrix of default limits is 100,000 labels of E = 1024: 410 MB.
MEMORY_BYTES = 512 << 20
_DEFINITION_BYTES = 64 << 20  # definitions in memory, by the size of their files
_QUEUED = 4  # computations that wait for the one under way; each holds a definition of 20 MB
_LOOKS = 5  # of prepare, at definitions that change under it

log = logging.getLogger("clip_ray.serve")


@dataclass(frozen=True)
class Listed:
    """A classifier in a listing: how large it is, or why it cannot be read.

    Attributes:
        id: its id.
        labels, templates: how many there are; the texts of a hundred classifiers may be GB.
        scoring: of the definition.
        created: ISO time of its PUT.
        error: why it cannot be read; nothing else is known then.
    """

    id: str
    labels: int = 0
    templates: int = 0
    scoring: Scoring = "softmax"
    created: str = ""
    error: str | None = None


@dataclass(frozen=True)
class _Known:
    read_at: float
    sha256: bytes  # of the file, so that an unchanged one is not parsed again
    size: int
    definition: Definition


class ChangedError(ApiError):
    """A classifier was deleted or replaced before its matrix was there."""


class ClassifierStore:
    """The stored classifiers, as one replica sees them; use it from one event loop.

    What it answers was in the store at most `max_age_s` before it was asked, however slow the
    store is; an id that it does not know is always looked for.

    One matrix is computed at a time, and few wait for it: a computation outlives its callers, so
    clients that come and go would else pile them up without end.

    Args:
        store: the state directory, shared by all replicas; `classifiers` in it is used.
        build: computes a matrix, (C, E) float32, for a model, labels and templates.
        limits: stored_classifiers and stored_prompts of them.
        max_age_s: seconds for which a definition that was read is believed; above 0.
        memory_bytes: bytes of matrices in memory.
        clock: seconds, never going back.

    Attributes:
        hits: matrices asked for that were in memory.
        misses: matrices asked for that were read, computed, or waited for.
        failures: classifiers that could not be prepared, over all calls.
    """

    def __init__(
        self,
        store: Store,
        build: Build,
        limits: Limits,
        *,
        max_age_s: float = 3.0,
        memory_bytes: int = MEMORY_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store.child("classifiers")
        self._build = build
        self._limits = limits
        self._max_age_s = max_age_s
        self._memory_bytes = memory_bytes
        self._clock = clock
        # Own threads: a store that hangs must not use up those that others wait for.
        self._threads = ThreadPoolExecutor(4, "classifiers")
        self._known: Lru[str, _Known] = Lru(max_bytes=_DEFINITION_BYTES)
        self._reads: SingleFlight[Definition | None] = SingleFlight(cancel_abandoned=False)
        # A computation goes on when its callers time out: 100,000 prompts take longer than any
        # request may, and would otherwise never be done.
        self._matrices = MatrixCache(math.inf, memory_bytes, cancel_abandoned=False)
        self._building = asyncio.Lock()
        self._waiting = 0  # computations that wait for it
        self._work: dict[asyncio.Task[Floats], tuple[str, str]] = {}  # its place and digest
        # By namespace; one is kept as long as a PUT has it.
        self._putting: weakref.WeakValueDictionary[str, asyncio.Lock] = (
            weakref.WeakValueDictionary()
        )
        self._writes = 0  # PUTs and DELETEs of this replica that are through
        self.hits = 0
        self.misses = 0
        self.failures = 0

    def close(self) -> None:
        """End the threads; what is queued is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def put(self, namespace: str, id: str, definition: Definition) -> Definition:
        """Store a definition, whatever was there; return it with its time.

        Its matrix is computed when it is first asked for. The number of classifiers holds at each
        replica by itself: PUTs of new ids that reach several at once may exceed it by one each.

        Raises:
            ApiError: 400 for an id or template that cannot be used, 409 for too many classifiers,
                413 for too many prompts or too long ones, 503 where the store does not answer.
        """
        place = place_of(namespace, id)
        self._check(definition)
        # Between counting and writing nobody of the namespace may come.
        async with self._putting.setdefault(namespace, asyncio.Lock()):
            return await self._put(namespace, place, definition)

    async def _put(self, namespace: str, place: str, definition: Definition) -> Definition:
        names = await self._names(namespace)
        places = places_in(names)
        if place not in places and len(places) >= self._limits.stored_classifiers:
            raise ApiError(
                409,
                "too_many_classifiers",
                f"{len(places)} classifiers are stored for this key, the limit is "
                f"{self._limits.stored_classifiers}; delete one (DELETE /v1/classifiers/ID), or "
                "PUT to the id of one that is no longer needed",
            )
        started = self._clock()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        known = await self._io(self._write, place, replace(definition, created=now), started)
        self._writes += 1
        self._keep(place, known)
        self._end_work(place, definition.digest)
        current = matrix_name(place, definition, "").removesuffix(".npy")
        await self._sweep(
            name
            for name in names
            if name.startswith(f"{place}/")
            and name.endswith(".npy")
            and not name.startswith(current)
        )
        return known.definition

    async def get(self, namespace: str, id: str) -> Definition | None:
        """Return a definition, or None where there is none.

        Raises:
            ApiError: 400 for an impossible id, 503 for a file that cannot be read.
        """
        return await self._definition(place_of(namespace, id))

    async def delete(self, namespace: str, id: str) -> bool:
        """Delete a definition, readable or not, with its matrices; tell whether there was one.

        Raises:
            ApiError: 400 for an impossible id, 503 where the store does not answer.
        """
        place = place_of(namespace, id)
        names = await self._io(self._store.child(place).files)
        await self._io(self._store.delete, f"{place}/{DEFINITION}")
        self._writes += 1
        self._known.pop(place)
        self._matrices.drop(lambda key: key[0] == place)
        self._end_work(place)
        # File by file, and the empty directory stays: removing a tree would take along what
        # another replica PUTs into it at this moment.
        await self._sweep(f"{place}/{name}" for name in names if name != DEFINITION)
        return DEFINITION in names

    async def list(self, namespace: str) -> tuple[Listed, ...]:
        """Return all classifiers of a namespace by id; one that cannot be read has an error.

        Raises:
            ApiError: 503 where the store does not answer.
        """
        places = places_in(await self._names(namespace))
        # One after the other: a definition may take 20 MB while it is read.
        found = [await self._listed(place) for place in places]
        return tuple(sorted((one for one in found if one is not None), key=lambda one: one.id))

    async def _listed(self, place: str) -> Listed | None:
        try:
            definition = await self._definition(place)
        except ApiError as error:
            return Listed(id_of(place), error=error.message)
        if definition is None:
            return None
        return Listed(
            id=id_of(place),
            labels=len(definition.labels),
            templates=len(definition.templates),
            scoring=definition.scoring,
            created=definition.created,
        )

    async def matrix(
        self, loaded: Loaded, namespace: str, id: str
    ) -> tuple[Definition, Floats, bool]:
        """Return a definition, its matrix for a model, and whether that was in memory.

        The matrix is (C, E) float32, and read-only.

        Raises:
            ApiError: 404 where there is none, 409 where it is replaced before its matrix is there,
                429 where too many matrices wait to be computed, 503 for a file that cannot be
                read.
        """
        place = place_of(namespace, id)
        definition = await self._definition(place)
        if definition is None:
            raise _not_found(id)
        matrix, cached = await self._matrix(loaded, place, definition)
        self.hits += cached
        self.misses += not cached
        return definition, matrix, cached

    async def prepare(self, loaded: Loaded, keep: frozenset[str]) -> int:
        """Make every stored classifier's matrix for a model that is about to be swapped in.

        Half of the memory is theirs, those in use first; the others are in the store only.
        Matrices of models that are served no longer are deleted. What fails is logged, and tried
        again when it is asked for. One after the other: hundreds of MB each may be allowed.

        Args:
            loaded: the new model.
            keep: digests of the models that stay in use.

        Returns:
            The number of classifiers that are ready.

        Raises:
            ApiError: 503 where the store does not answer at all.
        """
        models = keep | {loaded.served.digest}
        in_use = {key[0] for key in self._matrices.keys()}
        self._matrices.drop(lambda key: key[2] not in models)
        room = self._memory_bytes // 2
        digests: dict[str, str] = {}  # of each place, as is_stale wants it
        ready: set[str] = set()
        for _ in range(_LOOKS):
            seen = dict(digests)
            names = await self._io(self._store.files)
            places = places_in(names)
            for place in sorted(places, key=lambda place: place not in in_use):
                room -= await self._prepare_one(loaded, place, room, digests, ready)
            if digests == seen:  # nothing came or changed while this was at work
                break
        else:
            log.warning("stored classifiers keep changing; the newest are computed when used")
        there = {place: digests.get(place, "") for place in places}
        await self._sweep(name for name in names if is_stale(name, there, models))
        return len(ready & there.keys())

    async def _prepare_one(
        self, loaded: Loaded, place: str, room: int, digests: dict[str, str], ready: set[str]
    ) -> int:
        """Make one matrix if its definition is new; return the bytes of memory that it takes."""
        digest = ""
        try:
            definition = await self._definition(place, fresh=True)
            if definition is None or definition.digest == digests.get(place):
                return 0
            digest = definition.digest
            size = 4 * len(definition.labels) * loaded.encoder.embed_dim
            await self._matrix(loaded, place, definition, keep=size <= room, patient=True)
        except ChangedError:  # the next look finds what it is now
            ready.discard(place)
            digests[place] = digest
            return 0
        except Exception:  # whatever it was, the others are to be ready
            if digest != digests.get(place):
                self.failures += 1
                log.exception("stored classifier %s/%s is not ready", self._store.uri, place)
            ready.discard(place)
            digests[place] = digest
            return 0
        ready.add(place)
        digests[place] = digest
        return size if size <= room else 0

    def _check(self, definition: Definition) -> None:
        for index, template in enumerate(definition.templates):
            try:
                fill(template, "")
            except ConfigError as error:
                raise ApiError(
                    400, "invalid_template", str(error), param=f"templates[{index}]"
                ) from None
        check_prompt_lengths(definition.labels, definition.templates, self._limits)
        num_prompts = len(definition.labels) * len(definition.templates)
        if num_prompts > self._limits.stored_prompts:
            raise ApiError(
                413,
                "too_many_prompts",
                f"{len(definition.labels)} labels x {len(definition.templates)} templates are "
                f"{num_prompts} prompts; a stored classifier may have "
                f"{self._limits.stored_prompts}: use fewer templates, or several classifiers",
                param="labels",
            )

    async def _definition(self, place: str, fresh: bool = False) -> Definition | None:
        """Return a definition from memory or, where it is too old or `fresh` is set, the store."""
        now = self._clock()
        known = self._known.get(place)
        if known is not None and not fresh and now - known.read_at < self._max_age_s:
            return known.definition
        # Callers share a read that began a moment ago; never one that began before a write of this
        # replica, or so long ago that a slow store would make the answer too old.
        key = (place, fresh, self._writes, now // self._max_age_s)
        return await self._reads.run(key, lambda: self._read_known(place))

    async def _read_known(self, place: str) -> Definition | None:
        started, writes = self._clock(), self._writes
        try:
            found = await self._io(self._read, place, self._known.get(place), started)
        except UnreadableError as error:
            log.error("%s/%s/%s: %s", self._store.uri, place, DEFINITION, error.__cause__ or error)
            raise ApiError(
                503,
                "classifier_unreadable",
                f"classifier {id_of(place)!r} cannot be read: {error}; PUT it again or DELETE it",
                param="classifier",
            ) from None
        if writes == self._writes:  # else it may be from before the write
            if found is None:
                self._known.pop(place)
            else:
                self._keep(place, found)
        return None if found is None else found.definition

    def _keep(self, place: str, known: _Known) -> None:
        self._known.put(place, known, known.size)

    def _read(self, place: str, known: _Known | None, started: float) -> _Known | None:
        try:
            raw = self._store.read(f"{place}/{DEFINITION}")
        except FileNotFoundError:
            return None
        sha256 = hashlib.sha256(raw).digest()
        unchanged = known is not None and known.sha256 == sha256
        definition = known.definition if known and unchanged else parse(raw)
        return _Known(started, sha256, len(raw), definition)

    def _write(self, place: str, definition: Definition, started: float) -> _Known:
        raw = dump(definition)
        self._store.write(f"{place}/{DEFINITION}", raw)
        return _Known(started, hashlib.sha256(raw).digest(), len(raw), definition)

    async def _matrix(
        self,
        loaded: Loaded,
        place: str,
        definition: Definition,
        keep: bool = True,
        patient: bool = False,
    ) -> tuple[Floats, bool]:
        key = (place, definition.digest, loaded.served.digest)
        return await self._matrices.get(
            key, lambda: self._read_or_build(loaded, place, definition, patient), keep
        )

    async def _read_or_build(
        self, loaded: Loaded, place: str, definition: Definition, patient: bool
    ) -> Floats:
        name = matrix_name(place, definition, loaded.served.digest)
        owner = definition.digest + loaded.served.digest
        found = await self._io(self._read_matrix, name, owner)
        if found is not None:
            return found
        matrix = await self._computed(loaded, place, definition, patient)
        assert matrix.shape == (len(definition.labels), loaded.encoder.embed_dim), matrix.shape
        if not await self._io(lambda: bool(np.isfinite(matrix).all())):
            # Written down, a moment's fault of the device would be served for ever.
            raise ApiError(
                500, "not_finite", f"features of classifier {id_of(place)!r} are not finite"
            )
        try:
            # Computing may take minutes: the matrix of what was replaced or deleted meanwhile
            # would be a file that nobody looks for.
            await self._check_current(place, definition)
            await self._io(lambda: self._store.write(name, pack(matrix, owner)))
        except ChangedError:
            raise
        except ApiError as error:
            log.error("%s/%s is in memory only: %s", self._store.uri, name, error)
        return matrix

    async def _computed(
        self, loaded: Loaded, place: str, definition: Definition, patient: bool
    ) -> Floats:
        """Compute a matrix, one at a time; `patient` callers wait in any number.

        Raises:
            ApiError: 429 where too many wait; 404 or 409, soon, where the definition is no longer
                that of its id.
        """
        if not patient and self._waiting >= _QUEUED:
            raise ApiError(
                429,
                "overloaded",
                f"{self._waiting} other classifiers wait to be computed; try again in a while",
                retry_after=5,
            )
        work = asyncio.create_task(self._in_turn(loaded, place, definition))
        self._work[work] = (place, definition.digest)
        try:
            return await work
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # A PUT or DELETE has ended it.
            await self._check_current(place, definition)
            raise _replaced(place) from None
        finally:
            del self._work[work]

    async def _in_turn(self, loaded: Loaded, place: str, definition: Definition) -> Floats:
        self._waiting += 1
        try:
            await self._building.acquire()
        finally:
            self._waiting -= 1
        try:
            try:
                await self._check_current(place, definition)
            except ChangedError:
                raise
            except ApiError as error:
                # What was read a moment ago is believed while the store has an outage.
                log.error("%s/%s may have changed: %s", self._store.uri, place, error)
            return await self._build(loaded, definition.labels, definition.templates)
        finally:
            self._building.release()

    def _end_work(self, place: str, digest: str = "") -> None:
        """End the computations for a place that are not of the definition it has now."""
        for work, (of, made_from) in self._work.items():
            if of == place and made_from != digest:
                work.cancel()

    async def _check_current(self, place: str, definition: Definition) -> None:
        """Look whether a definition is still the one of its id.

        Raises:
            ApiError: 404 and 409 as ChangedError; 503 where the store does not answer.
        """
        current = await self._definition(place, fresh=True)
        if current is None:
            raise _not_found(id_of(place))
        if current.digest != definition.digest:
            raise _replaced(place)

    def _read_matrix(self, name: str, owner: str) -> Floats | None:
        try:
            data = self._store.read(name)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.error("%s/%s is computed again: %s", self._store.uri, name, error)
            return None
        matrix = unpack(data, owner)
        if matrix is None:
            log.error("%s/%s is damaged; it is computed again", self._store.uri, name)
        return matrix

    async def _names(self, namespace: str) -> Sequence[str]:
        """Return the files of a namespace, by their paths in the store."""
        folder = folder_of(namespace)
        return [f"{folder}/{name}" for name in await self._io(self._store.child(folder).files)]

    async def _sweep(self, names: Iterable[str]) -> None:
        """Delete files of no use; one that stays costs space only."""
        for name in names:
            try:
                await self._io(self._store.delete, name)
            except ApiError:
                log.warning("%s/%s stays", self._store.uri, name)

    async def _io(self, work: Callable[..., T], *args: Any) -> T:
        """Run a call of the store in a thread; its failures become one ApiError."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)
        except UnreadableError:
            raise
        except Exception as error:  # OSError, ConfigError, and what S3 clients raise of their own
            log.error("classifiers in %s: %s: %s", self._store.uri, type(error).__name__, error)
            raise ApiError(
                503,
                "classifier_store_unavailable",
                "the store of classifiers does not answer; try again",
                retry_after=1,
            ) from error


def _not_found(id: str) -> ChangedError:
    return ChangedError(
        404,
        "classifier_not_found",
        f"no classifier {id!r} is stored for this key; PUT /v1/classifiers/{id} makes it",
        param="classifier",
    )


def _replaced(place: str) -> ChangedError:
    return ChangedError(
        409,
        "classifier_changed",
        f"classifier {id_of(place)!r} was replaced while its matrix was made; try again",
        param="classifier",
    )
