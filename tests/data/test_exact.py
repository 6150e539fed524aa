"""Exactly the plan's samples, whoever reads them and however often a run was killed.

Random manifests, weights, caps, sizes, world sizes and kill points (hypothesis), on the real
plan, layout and reader; only the bytes of the shards and the decoder are made up.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_ray.config import DataConfig, SourceConfig
from clip_ray.data import blocks
from clip_ray.data.blocks import Batch, BlockReader, Layout, read_batches
from clip_ray.data.plan import Plan
from clip_ray.data.quarantine import BadSample
from clip_ray.data.samples import Sample
from clip_ray.images import ImageError

SIDE = 4
EXAMPLES = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
Tensors = dict[str, torch.Tensor | np.ndarray]


class MadeTokenizer:
    """The ids of a caption are its bytes."""

    context_length = 16

    def __call__(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [np.frombuffer(caption.encode().ljust(16)[:16], np.uint8) for caption in captions]
        return np.stack(rows).astype(np.int32), np.array([len(c) > 16 for c in captions])


def made_image(data: bytes, max_pixels: int, exif_orientation: bool) -> np.ndarray:
    """A picture that its bytes decide; its sides differ, so that the crop's place matters."""
    if data == b"bad":
        raise ImageError("corrupt")
    rng = np.random.default_rng(list(data))
    return rng.integers(0, 256, (SIDE, SIDE * 4, 3), dtype=np.uint8)


class MadeManifest:
    """What a reader asks of a manifest; shard i is called str(i)."""

    def __init__(self, samples: list[int], source: list[int], held: list[np.ndarray]) -> None:
        self.samples, self.source, self.held = np.array(samples), np.array(source), held
        self.train_counts = self.samples - [len(ordinals) for ordinals in held]

    def shard(self, index: int) -> Any:
        return SimpleNamespace(path=str(index), source=self.source[index])

    def train_ordinals(self, index: int, places: np.ndarray) -> np.ndarray:
        left = np.setdiff1d(np.arange(self.samples[index]), self.held[index])
        return left[places]


@dataclasses.dataclass
class World:
    """A data set, what the run makes of it, and the samples in it that are bad."""

    manifest: MadeManifest
    plan: Plan
    config: DataConfig
    bad: set[tuple[str, int]] = dataclasses.field(default_factory=set)

    def reader(self, world_size: int, chunks: int = 1) -> BlockReader:
        rows = -(-self.plan.global_batch // world_size)
        # Where there are several blocks, they are cut between slots if their number is even.
        share = self.plan.slot // self.plan.window if chunks % 2 == 0 else 1
        layout = Layout(world_size, rows, self.plan.window, min(chunks, rows), share)
        return BlockReader(
            self.plan,
            layout,
            cast(Any, self.manifest),
            self.config,
            cast(Any, MadeTokenizer()),
            SIDE,
            image_ids=True,
        )

    def read(self, shard: Any, source: Any, s3: Any, ordinals: np.ndarray) -> list[Any]:
        """Stands for `read_ordinals`: odd ordinals of bad samples are unreadable, even rotten."""
        found: list[Any] = []
        for i in ordinals.tolist():
            key, bad = f"{shard.path}/{i}", (shard.path, i) in self.bad
            if bad and i % 2:
                found.append(BadSample(key, "shard-damaged"))
            else:
                others = tuple(f"{key} {n}" for n in range(i % 3))
                image = b"bad" if bad else key.encode()
                found.append(Sample(key, image, key, others=others))
        return found


@st.composite
def worlds(draw: st.DrawFn) -> World:
    sources = draw(st.integers(1, 3))
    weighted = sources > 1 and draw(st.booleans())
    held, counts, source_of = [], [], []
    for source in range(sources):
        for _ in range(draw(st.integers(1, 4))):
            samples = draw(st.integers(1, 40))
            out = draw(st.sets(st.integers(0, samples - 1), max_size=samples // 3))
            counts.append(samples)
            held.append(np.array(sorted(out), np.int32))
            source_of.append(source)
    train = np.array(counts) - [len(h) for h in held]
    smallest = min(
        int(train[np.array(source_of) == s].sum()) if weighted else int(train.sum())
        for s in range(sources)
    )
    window = draw(st.integers(1, min(4, smallest)))
    share = draw(st.integers(1, min(4, smallest // window)))
    batch = share * draw(st.integers(1, max(min(6, smallest // share), 1)))
    weights = caps = None
    if weighted:
        weights = tuple(draw(st.lists(st.floats(0.1, 9), min_size=sources, max_size=sources)))
        caps = tuple(
            draw(st.lists(st.none() | st.integers(1, 4), min_size=sources, max_size=sources))
        )
    config = DataConfig(
        sources=tuple(SourceConfig(path=str(s)) for s in range(sources)),
        caption_choice=draw(st.sampled_from(["first", "random"])),
        templates=draw(st.sampled_from([(), ("{c}", "a {c}", "b {c}")])),
    )
    manifest = MadeManifest(counts, source_of, held)
    plan = Plan(
        manifest.train_counts,
        manifest.source,
        weights=weights,
        max_passes=caps,
        seed=draw(st.integers(0, 9)),
        global_batch=batch,
        slot=share * window,
        window=window,
    )
    return World(manifest, plan, config)


def small_world(seed: int = 0, **config: Any) -> World:
    """96 samples in two shards; G = 8, R = K = 2."""
    manifest = MadeManifest([60, 36], [0, 0], [np.zeros(0)] * 2)
    plan = Plan(
        manifest.train_counts,
        manifest.source,
        weights=None,
        seed=seed,
        global_batch=8,
        slot=2,
        window=2,
    )
    return World(manifest, plan, DataConfig(sources=(SourceConfig(path="0"),), **config))


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[World], None]:
    """Let the readers read a made-up world."""
    monkeypatch.setattr(blocks, "decode", made_image)

    def use(world: World) -> None:
        monkeypatch.setattr(blocks, "read_ordinals", world.read)

    return use


def steps_of(world: World, wanted: int) -> int:
    """As many steps as wanted, or as the caps allow."""
    return wanted if world.plan.steps is None else min(wanted, world.plan.steps)


def whole_batches(
    world: World, world_size: int, first: int, last: int, chunks: int = 1
) -> Iterator[Tensors]:
    """Yield the G rows of each step, in order, from what all the workers hold."""
    reader = world.reader(world_size, chunks)
    ranks = [read_batches(reader, rank, first, last) for rank in range(world_size)]
    for parts in zip(*ranks, strict=True):
        yield joined(parts, world.plan.global_batch)


def joined(parts: tuple[Batch, ...], rows: int) -> Tensors:
    assert all(not part.valid[part.shard < 0].any() for part in parts), "padding is void"
    found: Tensors = {}
    for name in ("pixels", "ids", "valid", "shard", "place", "image_id"):
        arrays = [np.asarray(getattr(part, name)) for part in parts]
        found[name] = np.concatenate(arrays)[:rows]
        assert name != "shard" or (np.concatenate(arrays)[rows:] == -1).all()
    return found


def assert_same(some: Tensors, others: Tensors, rows: np.ndarray | slice = slice(None)) -> None:
    for name in some:
        assert np.array_equal(some[name][rows], others[name][rows]), name


def pairs_of(batch: Tensors) -> Counter[tuple[int, int]]:
    return Counter(zip(batch["shard"].tolist(), batch["place"].tolist(), strict=True))


@EXAMPLES
@given(worlds(), st.integers(1, 7), st.integers(1, 3), st.integers(0, 30))
def test_a_step_holds_the_plans_samples_for_any_world_size(
    serve: Callable[[World], None], world: World, world_size: int, chunks: int, first: int
) -> None:
    serve(world)
    last = steps_of(world, first + 3)
    one = list(whole_batches(world, 1, first, last))
    many = list(whole_batches(world, world_size, first, last, chunks))
    for step, some, others in zip(range(first, last), one, many, strict=True):
        assert_same(some, others)
        rows = world.plan.step_rows(step)
        assert pairs_of(some) == Counter(zip(rows.shard.tolist(), rows.place.tolist(), strict=True))


@EXAMPLES
@given(worlds(), st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), max_size=4))
def test_killed_and_resized_again_and_again_is_never_having_stopped(
    serve: Callable[[World], None], world: World, attempts: list[tuple[int, int]]
) -> None:
    """Each attempt runs some steps on its own world size, and loses what came after a commit."""
    serve(world)
    last = steps_of(world, 16)
    never_stopped = list(whole_batches(world, 1, 0, last))
    lineage: list[Tensors] = []
    for number, (world_size, steps) in enumerate([*attempts, (3, last)]):
        committed = len(lineage)
        until = min(committed + 2 * steps, last)
        lineage += whole_batches(world, world_size, committed, until)
        if number < len(attempts):
            del lineage[committed + steps :]  # the kill
    assert len(lineage) == last
    for some, others in zip(never_stopped, lineage, strict=True):
        assert_same(some, others)


@EXAMPLES
@given(worlds(), st.data())
def test_void_rows_move_nothing(
    serve: Callable[[World], None], world: World, data: st.DataObject
) -> None:
    serve(world)
    last = steps_of(world, 12)
    whole = list(whole_batches(world, 2, 0, last))
    every = [(str(s), i) for s, n in enumerate(world.manifest.samples) for i in range(n)]
    serve(dataclasses.replace(world, bad=set(data.draw(st.lists(st.sampled_from(every))))))
    holed = list(whole_batches(world, 3, 0, last))
    for some, others in zip(whole, holed, strict=True):
        assert np.array_equal(some["shard"], others["shard"])
        assert np.array_equal(some["place"], others["place"])
        assert_same(some, others, np.asarray(others["valid"]))
        void = ~np.asarray(others["valid"])
        assert not others["pixels"][void].any() and not others["ids"][void].any()


@EXAMPLES
@given(worlds(), st.lists(st.integers(0, 40), max_size=20))
def test_every_bad_sample_is_named_and_no_other(
    serve: Callable[[World], None], world: World, ordinals: list[int]
) -> None:
    world.bad = {(str(i % len(world.manifest.samples)), n) for i, n in enumerate(ordinals)}
    serve(world)
    last = steps_of(world, 8)
    for rank in range(3):
        for batch in read_batches(world.reader(3), rank, 0, last):
            expected = Counter()
            for shard, place in zip(batch.shard.tolist(), batch.place.tolist(), strict=True):
                if shard >= 0:
                    ordinal = int(world.manifest.train_ordinals(shard, np.array([place]))[0])
                    expected[f"{shard}/{ordinal}"] += (str(shard), ordinal) in world.bad
            assert Counter(row["key"] for row in batch.bad) == +expected
            assert int((~batch.valid).sum()) == len(batch.bad) + int((batch.shard < 0).sum())


@EXAMPLES
@given(worlds())
def test_each_pass_of_each_source_holds_each_sample_once(world: World) -> None:
    """Counted over the whole of a capped run, or four passes' worth of an endless one."""
    plan, counts = world.plan, world.manifest.train_counts
    pooled = len(plan._components) == 1
    source = np.zeros(len(counts), int) if pooled else world.manifest.source
    windows = -(-4 * int(counts.sum()) // (plan.global_batch * plan.window))
    seen: dict[tuple[int, int], Counter[tuple[int, int]]] = {}
    for step in range(steps_of(world, windows * plan.window)):
        rows = plan.step_rows(step)
        assert len(rows.shard) == plan.global_batch
        for shard, place, turn in zip(
            rows.shard.tolist(), rows.place.tolist(), rows.turn.tolist(), strict=True
        ):
            seen.setdefault((int(source[shard]), turn), Counter())[shard, place] += 1
    for (number, turn), found in seen.items():
        assert max(found.values()) == 1, "no sample twice in a pass"
        cap = plan._components[number].max_passes
        assert cap is None or turn < cap
        if (number, turn + 2) in seen:  # two passes are open at a time at most
            mine = np.flatnonzero(source == number).tolist()
            assert set(found) == {(s, p) for s in mine for p in range(counts[s])}


def test_another_seed_gives_other_rows_and_crops(serve: Callable[[World], None]) -> None:
    """The control: the comparisons above are not equal for want of content."""
    serve(small_world())
    some = list(whole_batches(small_world(), 1, 0, 24))
    others = list(whole_batches(small_world(seed=1), 1, 0, 24))
    for one, other in zip(some, others, strict=True):
        assert pairs_of(one) != pairs_of(other)
    crops: dict[tuple[int, int], set[bytes]] = {}
    for batch in (*some, *others):
        for row, pair in enumerate(
            zip(batch["shard"].tolist(), batch["place"].tolist(), strict=True)
        ):
            crops.setdefault(pair, set()).add(np.asarray(batch["pixels"][row]).tobytes())
    assert len(crops) == 96 and sum(len(found) > 1 for found in crops.values()) > 80


def test_each_of_several_captions_is_drawn_about_equally_often(
    serve: Callable[[World], None],
) -> None:
    """Ordinals 2, 5, 8, ... have three captions; 32 of 96 samples, in 60 passes."""
    world = small_world(caption_choice="random")
    serve(world)
    drawn: Counter[str] = Counter()
    for batch in whole_batches(world, 1, 0, 60 * 12):
        for shard, place, ids in zip(batch["shard"], batch["place"], batch["ids"], strict=True):
            if place % 3 == 2:
                text = bytes(np.asarray(ids, np.uint8)).decode().strip()
                drawn[text.removeprefix(f"{shard}/{place}").strip()] += 1
    assert set(drawn) == {"", "0", "1"} and drawn.total() == 60 * 32
    # Five standard deviations of a fair draw: sqrt(1920 * 1/3 * 2/3) = 20.7.
    assert all(abs(count - 640) < 104 for count in drawn.values())


def test_the_first_caption_is_taken_unless_asked(serve: Callable[[World], None]) -> None:
    serve(small_world())
    for batch in whole_batches(small_world(), 1, 0, 12):
        for shard, place, ids in zip(batch["shard"], batch["place"], batch["ids"], strict=True):
            assert bytes(np.asarray(ids, np.uint8)).decode().strip() == f"{shard}/{place}"
