"""The plan's promises: exact passes, steps that do not depend on history, mixing."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_ray.data.plan import Plan, default_sizes, permute, samples_digest
from clip_ray.errors import ConfigError


def make(counts, *, batch=8, slot=4, window=2, seed=0, weights=None, sources=None):
    return Plan(
        np.array(counts),
        np.zeros(len(counts), int) if sources is None else np.array(sources),
        weights=weights,
        seed=seed,
        global_batch=batch,
        slot=slot,
        window=window,
    )


def passes(plan, steps):
    """Collect the samples of each pass over the first `steps` steps."""
    seen = {}
    for step in range(steps):
        rows = plan.step_rows(step)
        assert len(rows.shard) == plan.global_batch
        for shard, place, turn in zip(rows.shard, rows.place, rows.turn, strict=True):
            seen.setdefault(int(turn), Counter())[int(shard), int(place)] += 1
    return seen


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    share=st.integers(1, 4),
    window=st.integers(1, 4),
    slots=st.integers(1, 6),
    seed=st.integers(0, 5),
)
def test_each_complete_pass_holds_each_sample_once(counts, share, window, slots, seed):
    slot = share * window
    batch = share * slots
    if sum(counts) < max(batch, slot):
        return
    plan = make(counts, batch=batch, slot=slot, window=window, seed=seed)
    total = sum(counts)
    windows = -(-3 * total // (window * batch)) + 1
    seen = passes(plan, windows * window)
    everything = Counter({(s, p): 1 for s, n in enumerate(counts) for p in range(n)})
    for turn in range(2):  # complete for certain: three passes' worth of samples were dealt
        assert seen[turn] == everything


def test_a_step_is_the_same_whatever_was_asked_before():
    plan, again = make([30, 21, 9]), make([30, 21, 9])
    for step in range(20):
        plan.step_rows(step)
    late, fresh = plan.step_rows(13), again.step_rows(13)
    assert (late.shard == fresh.shard).all() and (late.place == fresh.place).all()


def test_seed_changes_the_order_and_the_digest():
    a, b = make([64], seed=0), make([64], seed=1)
    assert a.digest != b.digest
    assert not (a.step_rows(0).place == b.step_rows(0).place).all()


def test_two_passes_differ_in_order():
    plan = make([64], batch=8, slot=4, window=2)
    first = np.concatenate([plan.step_rows(s).place for s in range(8)])
    second = np.concatenate([plan.step_rows(s).place for s in range(8, 16)])
    assert sorted(first) == sorted(second) == list(range(64))
    assert not (first == second).all()


def test_no_sample_twice_in_a_slot_when_few_are_loose():
    plan = make([10], batch=8, slot=8, window=2)  # 2 loose samples, slots of 8
    for number in range(40):
        rows = plan.window_rows(number)
        for slot in range(plan.slots_per_window):
            assert len(set(rows.place[slot])) == 8


def test_weights_hold_over_a_cycle():
    plan = make([400, 400], batch=8, slot=8, window=8, weights=(3.0, 1.0), sources=[0, 1])
    shards = np.concatenate([plan.window_rows(v).shard.ravel() for v in range(128)])
    assert (shards == 0).sum() == 3 * (shards == 1).sum()


def test_each_weighted_source_keeps_its_own_passes():
    plan = make([24, 8], batch=8, slot=4, window=2, weights=(1.0, 1.0), sources=[0, 1])
    seen = passes(plan, 64)
    small = [sum(v for (shard, _), v in seen[t].items() if shard == 1) for t in range(10)]
    assert small == [8] * 10


def test_neighbours_of_a_slot_spread_over_the_windows_steps():
    plan = make([4096], batch=64, slot=8, window=8)
    places = plan.step_rows(3).place
    assert len(set(places // 8)) == 64  # one sample of each slot


def test_permutation_is_one_to_one_and_needs_no_table():
    for size in (1, 2, 3, 17, 1000):
        image = permute(np.arange(size), size, np.uint64(7))
        assert sorted(image) == list(range(size))
    huge = permute(np.array([0, 10**12 - 1]), 10**12, np.uint64(7))
    assert ((0 <= huge) & (huge < 10**12)).all() and huge[0] != huge[1]


def test_digest_of_samples_ignores_order_and_notices_a_swap():
    shard, place = np.array([0, 1, 2]), np.array([5, 6, 7])
    assert samples_digest(shard, place) == samples_digest(shard[::-1], place[::-1])
    assert samples_digest(shard, place) != samples_digest(shard, place[::-1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(batch=100), "train.global_batch 100 is larger"),
        (dict(slot=5, window=2), "does not divide data.slot 5"),
        (dict(batch=3, slot=4, window=2), "data.slot 4 does not divide"),
        (dict(batch=8, slot=64, window=8), "data.slot 64 is larger"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        make([30, 20], **arguments)


def test_small_sets_take_small_slots():
    assert default_sizes(700, 128) == (4, 4)
    assert default_sizes(10**9, 32768) == (64, 8)
