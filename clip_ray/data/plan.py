"""The plan: which samples each optimizer step sees, as a pure function.

The plan depends on the manifest's shard counts, the weights, the seed and three sizes: G samples
a step, R samples a slot, K steps a window. It does not depend on how many workers there are or
on what happened before, so "resume at step t" is arithmetic, never reading.

How a step comes about:

1. A *component* is the pool of all shards, or one source where sources carry weights. Each pass
   over a component cuts its samples into slots of exactly R: runs of R neighbours in one shard,
   plus the shards' remainders, which are chained through all passes and cut into slots of R.
2. The slots of a pass come in keyed order (a Feistel permutation: no table, any size).
3. Components are interleaved slot by slot in a fixed cycle, in proportion to their weights. A
   source with `max_passes` is *spent* after so many passes (whole slots of them: fewer than R of
   its samples are seen once less); from there on a cycle of the others follows.
4. A *window* is K·G/R consecutive slots. Each slot gives R/K of its samples, in keyed order, to
   each of the window's K steps, so that neighbours in a shard do not meet in one batch.

Nothing here opens a file. Shards are integers, and a sample is (shard, place): the place counts
the shard's training samples from 0.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clip_ray.errors import ConfigError

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

FORMAT = 1
CYCLE = 1024  # resolution of the weights: shares are rounded to 1/1024
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 4  # Luby and Rackoff 1988: four rounds give a strong pseudo-random permutation


def mix(words: Words) -> Words:
    """Scramble 64-bit words one to one (splitmix64's finalizer, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        words = (words + _GOLDEN).astype(np.uint64)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))


def key_of(*parts: int) -> np.uint64:
    """Fold integers into one 64-bit key; their order matters."""
    key = np.array([0], dtype=np.uint64)
    for part in parts:
        key = mix(key ^ np.array([part & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    return np.uint64(key[0])


def permute(items: Ints, size: Ints | int, key: Words | np.uint64) -> Ints:
    """Map each item in `[0, size)` to its image under the permutation that `key` names.

    A balanced Feistel network over the smallest even number of bits that holds `size`;
    images outside are walked on until they fall inside (Black and Rogaway 2002, section 3).

    Args:
        items: (n,) integers in [0, size).
        size: number of items, at least 1; one for all or one per item.
        key: one key for all or one per item.
    """
    items = np.asarray(items, dtype=np.int64)
    sizes = np.broadcast_to(np.asarray(size, dtype=np.int64), items.shape)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), items.shape)
    half = np.array([(max(int(s) - 1, 1).bit_length() + 1) // 2 for s in np.unique(sizes)])
    halves = half[np.searchsorted(np.unique(sizes), sizes)].astype(np.uint64)
    result = items.astype(np.uint64)
    todo = np.arange(len(items))
    while len(todo):
        result[todo] = _feistel(result[todo], halves[todo], keys[todo])
        todo = todo[result[todo] >= sizes[todo].astype(np.uint64)]
    return result.astype(np.int64)


def _feistel(words: Words, half_bits: Words, keys: Words) -> Words:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = words >> half_bits, words & mask
    for number in range(_ROUNDS):
        scrambled = mix(mix(keys + np.uint64(number)) ^ right)
        left, right = right, left ^ (scrambled & mask)
    return (left << half_bits) | right


@dataclass(frozen=True)
class Rows:
    """The samples of a step or of a window, one entry a sample.

    Attributes:
        shard: index in the manifest.
        place: index among the shard's training samples.
        turn: number of the pass that the sample belongs to.
    """

    shard: Ints
    place: Ints
    turn: Ints


class _Component:
    """The sequence of slots over one pool of shards; endless without `max_passes`."""

    def __init__(
        self, shards: Ints, counts: Ints, slot: int, key: np.uint64, max_passes: int | None
    ) -> None:
        self.shards, self.slot, self.key, self.max_passes = shards, slot, key, max_passes
        self.size = int(counts.sum())
        full = counts // slot
        if 0 < self.size - int(full.sum()) * slot < slot and full.any():
            # Fewer loose samples than a slot holds would put one sample into a slot twice:
            # the largest shard gives one of its slots to the loose ones.
            full[int(np.argmax(full))] -= 1
        self.full_ends = np.cumsum(full)
        self.full_starts = self.full_ends - full
        self.loose_ends = np.cumsum(counts - full * slot)
        self.loose_starts = self.loose_ends - (counts - full * slot)
        self.full = full
        self.n_full = int(self.full_ends[-1])
        self.n_loose = int(self.loose_ends[-1])

    @property
    def capacity(self) -> int | None:
        """Number of slots; None = endless."""
        if self.max_passes is None:
            return None
        return self.max_passes * self.n_full + self.max_passes * self.n_loose // self.slot

    def _slots_before(self, turn: Ints) -> Ints:
        # Slots of loose samples belong to the pass in which they begin.
        slots = turn * self.n_full + -(-(turn * self.n_loose) // self.slot)
        # One that would go on beyond the last pass is none.
        return slots if self.capacity is None else np.minimum(slots, self.capacity)

    def slots(self, number: Ints) -> Rows:
        """Return the samples of slots `number` (n,), as arrays of shape (n, R)."""
        turn = number * self.slot // self.size
        turn = np.where(self._slots_before(turn + 1) <= number, turn + 1, turn)
        turn = np.where(self._slots_before(turn) > number, turn - 1, turn)
        first, after = self._slots_before(turn), self._slots_before(turn + 1)
        keys = mix(self.key ^ mix(turn.astype(np.uint64)))
        member = permute(number - first, after - first, keys)

        n, offsets = len(number), np.arange(self.slot, dtype=np.int64)
        shard = np.empty((n, self.slot), dtype=np.int64)
        place, turns = np.empty_like(shard), np.empty_like(shard)
        is_full = member < self.n_full
        if is_full.any():
            slot_id = member[is_full]
            row = np.searchsorted(self.full_ends, slot_id, side="right")
            begin = (slot_id - self.full_starts[row]) * self.slot
            shard[is_full] = self.shards[row][:, None]
            place[is_full] = begin[:, None] + offsets
            turns[is_full] = turn[is_full][:, None]
        if not is_full.all():
            chunk = member[~is_full] - self.n_full - (-(turn * self.n_loose) // self.slot)[~is_full]
            loose = chunk[:, None] * self.slot + offsets
            turns[~is_full], loose = loose // self.n_loose, loose % self.n_loose
            row = np.searchsorted(self.loose_ends, loose, side="right")
            shard[~is_full] = self.shards[row]
            place[~is_full] = loose - self.loose_starts[row] + self.full[row] * self.slot
        return Rows(shard, place, turns)


@dataclass(frozen=True)
class _Mix:
    """A cycle of components, from one global slot to where the next source is spent.

    Attributes:
        start: number of its first slot.
        cycle: component of each slot of a cycle.
        before: (cycle, components) tickets of each component before each slot of a cycle.
        tickets: (components,) slots of a cycle that each component gets.
        used: (components,) slots of each component before `start`.
    """

    start: int
    cycle: Ints
    before: Ints
    tickets: Ints
    used: Ints

    def dealt(self, slots: int) -> Ints:
        """Return how many slots each component has given after `slots` slots of this mix."""
        cycles, phase = divmod(slots, len(self.cycle))
        return self.used + cycles * self.tickets + self.before[phase]

    def slots_until(self, component: int, number: int) -> int:
        """Return the slots of this mix before the one that is a component's slot `number`."""
        cycles, rest = divmod(number - int(self.used[component]), int(self.tickets[component]))
        phase = int(np.flatnonzero(self.cycle == component)[rest])
        return cycles * len(self.cycle) + phase


def _mixes(
    weights: tuple[float, ...], capacities: list[int | None]
) -> tuple[list[_Mix], int | None]:
    """Return the mixes in their order, and the number of slots until all sources are spent."""
    used, start = np.zeros(len(weights), np.int64), 0
    mixes = []
    alive = list(range(len(weights)))
    while alive:
        cycle = np.array(alive)[_interleave(tuple(weights[index] for index in alive))]
        given = np.eye(len(weights), dtype=np.int64)[cycle]
        mix = _Mix(start, cycle, np.cumsum(given, axis=0) - given, given.sum(axis=0), used)
        mixes.append(mix)
        capped = [(index, size) for index in alive if (size := capacities[index]) is not None]
        if not capped:
            return mixes, None
        length = min(mix.slots_until(index, size) for index, size in capped)
        used, start = mix.dealt(length), start + length
        spent = {index for index, size in capped if used[index] == size}
        alive = [index for index in alive if index not in spent]
    return mixes, start


class Plan:
    """Which samples each step sees; see the module's docstring.

    Args:
        counts: (n_shards,) training samples of each shard.
        sources: (n_shards,) index of each shard's source.
        weights: one positive number a source, or none to pool all shards.
        max_passes: with weights, the passes after which each source is spent; None = never.
        seed: the run's seed.
        global_batch: G, samples of a step.
        slot: R, samples of a slot; a multiple of `window`.
        window: K, steps of a window; R divides K·G.
        manifest_digest: enters the plan's own digest.

    Attributes:
        steps: steps until all sources are spent, whole windows of them; None = endless.

    Raises:
        ConfigError: the sizes do not fit each other or the data.
    """

    def __init__(
        self,
        counts: Ints,
        sources: Ints,
        *,
        weights: tuple[float, ...] | None,
        seed: int,
        global_batch: int,
        slot: int,
        window: int,
        manifest_digest: str = "",
        max_passes: tuple[int | None, ...] | None = None,
    ) -> None:
        counts, sources = np.asarray(counts, np.int64), np.asarray(sources, np.int64)
        _check_sizes(counts, sources, weights, global_batch, slot, window)
        self.seed, self.global_batch, self.slot, self.window = seed, global_batch, slot, window
        self.slots_per_window = window * global_batch // slot
        pools = [np.arange(len(counts))]
        if weights is not None:
            pools = [np.flatnonzero(sources == s) for s in range(len(weights))]
        caps = max_passes or (None,) * len(pools)
        self._components = [
            _Component(pool, counts[pool], slot, key_of(seed, 1, number), cap)
            for number, (pool, cap) in enumerate(zip(pools, caps, strict=True))
        ]
        self._mixes, slots = _mixes(
            weights or (1.0,), [component.capacity for component in self._components]
        )
        self.steps = None if slots is None else slots // self.slots_per_window * window
        self._slot_key = key_of(seed, 2)
        self.samples_per_pass = int(counts.sum())
        identity = {
            "format": FORMAT,
            "manifest": manifest_digest,
            "weights": weights,
            "seed": seed,
            "global_batch": global_batch,
            "slot": slot,
            "window": window,
        }
        if any(cap is not None for cap in caps):
            identity["max_passes"] = caps
        self.digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def window_rows(self, number: int, first_slot: int = 0, last_slot: int | None = None) -> Rows:
        """Return the samples of window `number`, as arrays of shape (slots, R).

        Columns `[k·R/K, (k+1)·R/K)` belong to the window's step k; only the slots
        `[first_slot, last_slot)` of the window are computed.
        """
        assert self.steps is None or number * self.window < self.steps, "all sources are spent"
        last_slot = self.slots_per_window if last_slot is None else last_slot
        slots = number * self.slots_per_window + np.arange(first_slot, last_slot, dtype=np.int64)
        component, own = self._owners(slots)
        shape = (len(slots), self.slot)
        shard, place, turn = (np.empty(shape, np.int64) for _ in range(3))
        for index, pool in enumerate(self._components):
            mine = component == index
            if mine.any():
                rows = pool.slots(own[mine])
                shard[mine], place[mine], turn[mine] = rows.shard, rows.place, rows.turn
        noise = mix(
            self._slot_key
            ^ mix((slots[:, None] * self.slot + np.arange(self.slot)).astype(np.uint64))
        )
        order = np.argsort(noise, axis=1, kind="stable")
        return Rows(*(np.take_along_axis(a, order, axis=1) for a in (shard, place, turn)))

    def _owners(self, slots: Ints) -> tuple[Ints, Ints]:
        """Return each slot's component, and its number among that component's slots."""
        component, own = np.empty_like(slots), np.empty_like(slots)
        mix_of = np.searchsorted([mix.start for mix in self._mixes], slots, side="right") - 1
        for number in np.unique(mix_of).tolist():
            mix, mine = self._mixes[number], mix_of == number
            cycles, phase = np.divmod(slots[mine] - mix.start, len(mix.cycle))
            component[mine] = who = mix.cycle[phase]
            own[mine] = mix.used[who] + cycles * mix.tickets[who] + mix.before[phase, who]
        return component, own

    def step_rows(self, step: int) -> Rows:
        """Return the G samples of a step (counted from 0), in the step's own order."""
        number, k = divmod(step, self.window)
        share = self.slot // self.window
        rows = self.window_rows(number)
        columns = slice(k * share, (k + 1) * share)
        return Rows(*(a[:, columns].reshape(-1) for a in (rows.shard, rows.place, rows.turn)))

    def passes_at(self, step: int) -> float:
        """Return how many passes over all samples `step` steps amount to."""
        return step * self.global_batch / self.samples_per_pass


def sample_hash(shard: Ints, place: Ints) -> Words:
    """Return a 64-bit hash of each sample's identity; a step's digest is their sum mod 2**64."""
    return mix(mix(np.asarray(shard).astype(np.uint64)) ^ np.asarray(place).astype(np.uint64))


def samples_digest(shard: Ints, place: Ints) -> int:
    """Return the order-free 64-bit digest of a set of samples."""
    with np.errstate(over="ignore"):
        return int(sample_hash(shard, place).sum(dtype=np.uint64))


def default_sizes(samples: int, global_batch: int) -> tuple[int, int]:
    """Return (R, K) for a data set: 64 and 8, or 4 and 4 where that would mix too few slots.

    A window should be a small part of a pass, or its slots come from a corner of the data; a
    small set is read from fast local storage anyway, where short reads cost nothing.
    """
    if samples >= 16 * 8 * global_batch and 8 * global_batch % 64 == 0:
        return 64, 8
    return 4, 4


def _interleave(weights: tuple[float, ...]) -> Ints:
    """Return a cycle of component indices, spread evenly, in proportion to the weights."""
    if len(weights) == 1:
        return np.zeros(1, dtype=np.int64)
    share = np.array(weights, dtype=np.float64) / sum(weights) * CYCLE
    tickets = np.maximum(np.floor(share).astype(np.int64), 1)
    for index in np.argsort(np.floor(share) - share, kind="stable"):
        if tickets.sum() >= CYCLE:
            break
        tickets[index] += 1
    component = np.repeat(np.arange(len(weights)), tickets)
    place = np.concatenate([(np.arange(n) + 0.5) / n for n in tickets])
    return component[np.argsort(place, kind="stable")].astype(np.int64)


def _check_sizes(
    counts: Ints,
    sources: Ints,
    weights: tuple[float, ...] | None,
    global_batch: int,
    slot: int,
    window: int,
) -> None:
    if slot % window:
        raise ConfigError(f"data.window {window} does not divide data.slot {slot}")
    if window * global_batch % slot:
        raise ConfigError(
            f"data.slot {slot} does not divide data.window x train.global_batch = "
            f"{window} x {global_batch}; choose a slot that does, e.g. {window}"
        )
    groups = [counts] if weights is None else [counts[sources == s] for s in range(len(weights))]
    smallest = min(int(group.sum()) for group in groups)
    for name, value in (("train.global_batch", global_batch), ("data.slot", slot)):
        if value > smallest:
            raise ConfigError(
                f"{name} {value} is larger than the smallest source ({smallest} training "
                "samples): a step would hold one sample twice; lower it or add data"
            )
