"""The loop: one curve for any number of ranks and micro-batches, and exact ends and resumes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import simplejpeg
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from clip_ray import model as models
from clip_ray.config import Config
from clip_ray.contrastive import clip_loss
from clip_ray.data.blocks import Batch, read_batches
from clip_ray.data.manifest import build_manifest
from clip_ray.data.plan import samples_digest
from clip_ray.errors import CheckpointError, TrainingError
from clip_ray.optim import build_optimizer, learning_rate
from clip_ray.storage import LocalStore
from clip_ray.train import loop
from clip_ray.train.checkpoint import Checkpoints, Commit, Fill
from clip_ray.train.hooks import PHASES, Outcome, Word
from clip_ray.train.loop import train
from clip_ray.train.rundir import Run, prepare
from clip_ray.train.state import Progress, broadcast, build_state, restore, snapshot
from tests.data.shard_files import write_tar
from tests.distributed import run_ranks

SAMPLES = 64
CAPTIONS = ("a red square", "a blue disc on grass", "two dogs", "snow", "one long street at night")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def picture(seed: int) -> bytes:
    """Return a JPEG of 40 x 36 pixels: a colour with a brighter corner."""
    rng = np.random.default_rng(seed)
    pixels = np.full((36, 40, 3), rng.integers(0, 200, 3), np.uint8)
    pixels[: rng.integers(8, 30), : rng.integers(8, 30)] += 55
    return simplejpeg.encode_jpeg(pixels, quality=90)


def make_run(
    folder: Path,
    bad: tuple[int, ...] = (),
    samples: int = SAMPLES,
    kinds: int | None = None,
    **sections: dict[str, Any],
) -> Run:
    """Return a run over samples in two shards; the images of `bad` are no images.

    Only `kinds` of the samples differ, by default all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        members = []
        for i in range(shard * samples // 2, (shard + 1) * samples // 2):
            kind = i % (kinds or samples)
            image = b"no image" if i in bad else picture(kind)
            caption = f"{CAPTIONS[kind % len(CAPTIONS)]} {kind}".encode()
            members += [(f"{i:03d}.jpg", image), (f"{i:03d}.txt", caption)]
        write_tar(folder / f"{shard}.tar", members)
    tree: dict[str, dict[str, Any]] = {
        "data": {"sources": [{"path": str(folder / "*.tar")}], "holdout": 0.0},
        "tokenizer": {"train_vocab": 560},
        "model": {"name": "ViT-micro-8-32"},
        "train": {"steps": 20, "global_batch": 16},
        "optim": {"lr": 1e-3, "warmup": 4, "clip_norm": 1.0},
        "checkpoint": {"every_steps": 1000},
    }
    for name, changes in sections.items():
        tree[name] = tree.get(name, {}) | changes
    config = Config.model_validate(tree)
    store = LocalStore(folder / "run")
    return prepare(store, config, lambda: build_manifest(config.data), lambda text: None)


def with_train(run: Run, **changes: Any) -> Run:
    train_config = run.config.train.model_copy(update=changes)
    return replace(run, config=run.config.model_copy(update={"train": train_config}))


@dataclass
class Attempt:
    """What one rank's loop did; its own hooks."""

    ask_at: int | None = None
    word: Word = "stop"
    watch: bool = False
    steps: int = 0
    phases: list[tuple[int, str]] = field(default_factory=list)
    before: list[dict[str, bytes]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)
    commits: list[tuple[Progress, dict[str, bytes]]] = field(default_factory=list)
    deferred_at: list[int] = field(default_factory=list)
    due_at: list[int] = field(default_factory=list)
    outcome: Outcome | None = None
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    state: Any = None

    def record(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def quarantine(self, rows: list[dict[str, Any]]) -> None:
        self.bad += rows

    def asked(self, due: bool) -> set[Word]:
        if due:
            self.due_at.append(self.steps)
        if self.watch:
            self.before.append(self.state())
        self.steps += 1
        return {self.word} if self.steps - 1 == self.ask_at else set()

    def entered(self, step: int, phase: str) -> None:
        self.phases.append((step, phase))

    def timed(self, seconds: dict[str, float]) -> None:
        assert set(seconds) == set(PHASES)

    def commit(self, progress: Progress) -> None:
        self.commits.append((progress, self.state()))

    def deferred(self, step: int) -> None:
        self.deferred_at.append(step)

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows]

    @property
    def digests(self) -> list[str]:
        return [row["samples_digest"] for row in self.rows]


@dataclass(frozen=True)
class Faults:
    """What is done to an attempt.

    Attributes:
        ask_at: the step at which one rank is asked for `word`.
        word: what it is asked for.
        ask_rank: that rank.
        poison: steps whose pixels are NaN on the last rank.
        poison_gradient: steps whose gradient is infinite, the loss being finite.
        batches: number of batches after which the data end.
        local_loss: a wrong loss is used, that of the rank's own rows.
        flip_at: the step before which one bit of rank 1's weights changes.
        spoil_at: the step before which a weight becomes NaN, on all ranks.
        watch: the state before each step is kept.
    """

    ask_at: int | None = None
    word: Word = "stop"
    ask_rank: int = 0
    poison: frozenset[int] = frozenset()
    poison_gradient: frozenset[int] = frozenset()
    batches: int | None = None
    local_loss: bool = False
    flip_at: int | None = None
    spoil_at: int | None = None
    watch: bool = False


def contents(fills: dict[str, Fill], folder: Path) -> dict[str, bytes]:
    found = {}
    for name, fill in fills.items():
        fill(folder / name)
        found[name] = (folder / name).read_bytes()
    return found


def local_loss(image: Tensor, text: Tensor, scale: Tensor, *args: Any, **options: Any) -> Tensor:
    """A wrong loss: right in value, but each rank's gradient is that of its own rows."""
    value = clip_loss(image, text, scale, *args, **options)
    logits = scale * image @ text.T
    target = torch.arange(len(logits))
    own = (
        torch.nn.functional.cross_entropy(logits, target)
        + torch.nn.functional.cross_entropy(logits.T, target)
    ) / 2
    return own + (value - own).detach()


def poisoned(batches: Iterator[Batch], first: int, steps: frozenset[int]) -> Iterator[Batch]:
    for number, batch in enumerate(batches, first):
        if number in steps:
            nan = torch.full(batch.pixels.shape, torch.nan)
            batch = replace(batch, pixels=nan)
        yield batch


def flipped(batches: Iterator[Batch], at: int, model: torch.nn.Module) -> Iterator[Batch]:
    """Change one bit of one weight before a batch, as a fault of memory would.

    Not the lowest bit: an update's rounding can bring that back.
    """
    for number, batch in enumerate(batches):
        if number == at:
            with torch.no_grad():
                next(model.parameters()).view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 8)
        yield batch


def spoiled(batches: Iterator[Batch], at: int, model: torch.nn.Module) -> Iterator[Batch]:
    """Make a weight NaN before a batch."""
    for number, batch in enumerate(batches):
        if number == at:
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = torch.nan
        yield batch


def attempt(
    run: Run,
    folder: Path,
    files: dict[str, bytes] | None = None,
    faults: Faults = Faults(),  # noqa: B008 - frozen
) -> Attempt:
    """Run the loop on this rank, from a checkpoint's files where they are given."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    # Ranks that read no checkpoint begin with other weights: rank 0's must reach them.
    bare, optimizer = build_state(run.config, seed=run.config.run.seed + rank)
    progress = Progress(0, run.plan.digest)
    if files is not None:
        progress = Progress.from_bytes(files["state.json"])
        if rank == 0:
            restore(bare, optimizer, files)
    model: torch.nn.Module = bare
    if world_size > 1:
        broadcast(bare, optimizer, files is not None)
        model = DistributedDataParallel(
            bare, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
    mine = Attempt(faults.ask_at if rank == faults.ask_rank else None, faults.word, faults.watch)

    def state() -> dict[str, bytes]:
        place = folder / f"snapshot-{rank}"
        place.mkdir(exist_ok=True)
        return contents(snapshot(bare, optimizer), place)

    mine.state = state
    steps = faults.batches if faults.batches is not None else run.total_steps
    batches = read_batches(run.reader(world_size), rank, progress.step, steps)
    if rank == world_size - 1:
        batches = poisoned(batches, progress.step, faults.poison)
    if faults.flip_at is not None and rank == 1:
        batches = flipped(batches, faults.flip_at - progress.step, bare)
    if faults.spoil_at is not None:
        batches = spoiled(batches, faults.spoil_at - progress.step, bare)
    calls = iter(range(progress.step, run.total_steps))
    if faults.poison_gradient:
        bare.logit_scale.register_hook(
            lambda grad: grad * torch.inf if next(calls) in faults.poison_gradient else grad
        )
    with pytest.MonkeyPatch.context() as patch:
        if faults.local_loss:
            patch.setattr(loop, "clip_loss", local_loss)
        mine.outcome = train(
            model,
            optimizer,
            batches,
            progress,
            config=run.config,
            total_steps=run.total_steps,
            samples_per_pass=run.manifest.total,
            device=torch.device("cpu"),
            attempt=1,
            hooks=mine,
        )
    mine.weights = torch.cat([p.detach().flatten() for p in bare.parameters()])
    mine.state = None
    return mine


def on_ranks(run: Run, folder: Path, world_size: int, **options: Any) -> list[Attempt]:
    """Return each rank's attempt; one rank is this process, without a process group."""
    if world_size == 1:
        return [attempt(run, folder, **options)]
    return run_ranks(_attempt, world_size, run, folder, options)


def _attempt(run: Run, folder: Path, options: dict[str, Any]) -> Attempt:
    return attempt(run, folder, **options)


def check_same_run(found: Attempt, expected: Attempt) -> None:
    """Fail unless both have one curve and one set of weights, up to rounding."""
    assert found.outcome == replace(
        expected.outcome, progress=replace(expected.outcome.progress, loss=found.losses[-1])
    )
    assert found.digests == expected.digests
    losses, right = np.array(found.losses), np.array(expected.losses)
    assert np.abs(losses / right - 1).max() <= 1e-4, "loss curve"
    error = (found.weights - expected.weights).norm() / expected.weights.norm()
    assert error <= 1e-5, f"weights differ by {error:.1e}"


@dataclass(frozen=True)
class Made:
    """A run and its one-process attempt, made once for this file."""

    run: Run
    folder: Path
    alone: Attempt


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    run = make_run(folder)
    return Made(run, folder, attempt(run, folder))


def test_it_learns(made: Made) -> None:
    """After five passes it tells the pairs of a batch apart better than a guess, ln 16 = 2.77."""
    assert made.alone.losses[0] > 2.77
    assert np.mean(made.alone.losses[-4:]) < 2.67
    assert made.alone.outcome == Outcome(
        "finished", Progress(20, made.run.plan.digest, loss=made.alone.losses[-1])
    )


def test_the_rows_of_the_journal(made: Made) -> None:
    assert [row["step"] for row in made.alone.rows] == list(range(1, 21))
    row = made.alone.rows[5]
    assert row["lr"] == learning_rate(5, 20, made.run.config.optim)
    assert row["world_size"] == 1 and row["attempt"] == 1 and row["finite"] is True
    phases = sum(row["data_wait" if p == "data_wait" else f"time_{p}"] for p in loop.PHASES)
    assert 0 < phases <= row["step_s"] * 1.01
    assert row["samples_per_s"] == pytest.approx(16 / row["step_s"])
    assert row["grad_norm"] > 0 and row["logit_scale"] > 1


def test_each_step_sees_the_plans_samples(made: Made) -> None:
    """The plan's own rows, recomputed; each pass of four steps holds each sample once."""
    plan, seen = made.run.plan, set()
    for step, digest in enumerate(made.alone.digests):
        rows = plan.step_rows(step)
        assert digest == f"{samples_digest(rows.shard, rows.place):016x}"
        if step < 4:
            seen |= set(zip(rows.shard.tolist(), rows.place.tolist(), strict=True))
    assert len(seen) == SAMPLES
    assert len(set(made.alone.digests[:4])) == 4


@pytest.mark.parametrize(
    ("world_size", "micro_batch"),
    [
        (2, None),
        (4, None),
        (1, 8),
        (1, 6),  # 16 rows in three micro-batches of 6: two rows are void
        (1, 1),
        (2, 3),  # 8 rows in three micro-batches of 3: one row is void
        (3, None),  # 16 rows on three ranks: two rows are void
    ],
)
def test_one_run_on_any_number_of_ranks_and_micro_batches(
    made: Made, world_size: int, micro_batch: int | None
) -> None:
    run = with_train(made.run, micro_batch=micro_batch)
    ranks = on_ranks(run, made.folder, world_size)
    check_same_run(ranks[0], made.alone)
    assert all(torch.equal(rank.weights, ranks[0].weights) for rank in ranks)
    assert all(rank.outcome == ranks[0].outcome for rank in ranks)
    assert [len(rank.rows) for rank in ranks] == [20] + [0] * (world_size - 1)
    padding = -(-16 // world_size) * world_size - 16
    assert {row["void"] for row in ranks[0].rows} == {padding}
    assert ranks[0].rows[0]["bad"] == 0


def test_micro_batches_are_of_one_size(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are filled up: a compiled model meets one shape, and all ranks the same number."""
    sizes: list[int] = []
    encode = models.CLIP.encode_image

    def recording(self: models.CLIP, pixels: Tensor, keys: Tensor | None) -> Tensor:
        sizes.append(len(pixels))
        return encode(self, pixels, keys)

    monkeypatch.setattr(models.CLIP, "encode_image", recording)
    run = replace(with_train(made.run, micro_batch=6), total_steps=1)
    attempt(run, made.folder)
    assert sizes == [6] * 6  # three micro-batches, each without and with a graph


def broadcast_state(run: Run, files: dict[str, bytes]) -> dict[str, bytes]:
    """Return this rank's state when only rank 0 has read a checkpoint; no DDP is built."""
    model = models.build(run.config.model, seed=dist.get_rank() + 7)
    optimizer = build_optimizer(model, run.config.optim)
    if dist.get_rank() == 0:
        restore(model, optimizer, files)
    broadcast(model, optimizer, restored=True)
    with tempfile.TemporaryDirectory() as folder:
        return contents(snapshot(model, optimizer), Path(folder))


def test_a_restored_state_reaches_all_ranks(made: Made) -> None:
    _, files = made.alone.commits[-1]
    assert run_ranks(broadcast_state, 3, made.run, files) == [files] * 3


def test_the_check_rejects_a_local_loss(made: Made) -> None:
    ranks = on_ranks(made.run, made.folder, 2, faults=Faults(local_loss=True))
    with pytest.raises(AssertionError, match="loss curve"):
        check_same_run(ranks[0], made.alone)


def test_the_check_notices_one_other_sample(made: Made) -> None:
    rows = [dict(row) for row in made.alone.rows]
    rows[7]["samples_digest"] = rows[8]["samples_digest"]
    with pytest.raises(AssertionError):
        check_same_run(replace(made.alone, rows=rows), made.alone)


def test_a_batch_that_the_ranks_do_not_divide(tmp_path: Path) -> None:
    """24 samples on 5 ranks: 5 rows each, one of them void; 6 steps are 2.25 passes."""
    run = make_run(tmp_path, train={"steps": 6, "global_batch": 24})
    alone = attempt(run, tmp_path)
    ranks = on_ranks(run, tmp_path, 5)
    check_same_run(ranks[0], alone)
    assert {row["void"] for row in ranks[0].rows} == {1}
    for step, digest in enumerate(ranks[0].digests):
        rows = run.plan.step_rows(step)
        assert len(rows.shard) == 24
        assert digest == f"{samples_digest(rows.shard, rows.place):016x}"


def test_more_ranks_than_rows(tmp_path: Path) -> None:
    """4 samples on 5 ranks: one rank has nothing but a void row, always."""
    run = make_run(tmp_path, train={"steps": 4, "global_batch": 4})
    check_same_run(on_ranks(run, tmp_path, 5)[0], attempt(run, tmp_path))


# Resuming


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_goes_on_bit_for_bit(made: Made, tmp_path: Path, world_size: int) -> None:
    """Stopped after 7 steps, through the files of a commit, and on with new processes."""
    straight = on_ranks(made.run, made.folder, world_size)
    first = on_ranks(made.run, made.folder, world_size, faults=Faults(ask_at=6))
    assert [rank.outcome.reason for rank in first] == ["stopped"] * world_size
    ((progress, state),) = first[0].commits
    assert progress.step == 7

    checkpoints = Checkpoints(LocalStore(tmp_path / "run"))
    number = checkpoints.begin_attempt({})
    commit = Commit(progress.step, number)
    checkpoints.write(commit, {**state, "state.json": progress.to_bytes()})
    found = checkpoints.newest(lambda commit, why: pytest.fail(why))
    assert found is not None and found[0] == commit

    other_start = replace(
        made.run,
        config=made.run.config.model_copy(
            update={"run": made.run.config.run.model_copy(update={"seed": 5})}
        ),
    )
    rest = on_ranks(other_start, made.folder, world_size, files=found[1])
    assert [row["step"] for row in rest[0].rows] == list(range(8, 21))
    assert first[0].losses + rest[0].losses == straight[0].losses
    assert first[0].digests + rest[0].digests == straight[0].digests
    assert all(torch.equal(rank.weights, straight[0].weights) for rank in rest)
    assert rest[0].outcome == straight[0].outcome


def test_without_the_moments_a_resumed_run_goes_elsewhere(made: Made) -> None:
    """The control: the comparison above notices what a checkpoint leaves out."""
    (first,) = on_ranks(made.run, made.folder, 1, faults=Faults(ask_at=6))
    ((progress, state),) = first.commits
    files = state | {
        "state.json": progress.to_bytes(),
        "optimizer.safetensors": safetensors.torch.save({}),
    }
    (rest,) = on_ranks(made.run, made.folder, 1, files=files)
    assert first.losses + rest.losses != made.alone.losses
    assert not torch.equal(rest.weights, made.alone.weights)


def test_a_run_may_change_its_number_of_ranks(made: Made) -> None:
    first = on_ranks(made.run, made.folder, 2, faults=Faults(ask_at=9))
    ((progress, state),) = first[0].commits
    files = state | {"state.json": progress.to_bytes()}
    rest = on_ranks(made.run, made.folder, 3, files=files)
    joined = replace(rest[0], rows=first[0].rows + rest[0].rows)
    check_same_run(joined, made.alone)


@pytest.mark.parametrize(("every", "steps"), [(7, [7, 14, 20]), (10, [10, 20]), (20, [20])])
def test_commits_are_periodic_and_at_the_end(made: Made, every: int, steps: list[int]) -> None:
    section = made.run.config.checkpoint.model_copy(update={"every_steps": every})
    config = made.run.config.model_copy(update={"checkpoint": section})
    (found,) = on_ranks(replace(made.run, config=config), made.folder, 1)
    assert [progress.step for progress, _ in found.commits] == steps
    assert [progress.loss for progress, _ in found.commits] == [
        found.losses[step - 1] for step in steps
    ]


# Ends


@pytest.mark.parametrize("ask_rank", [0, 2])
@pytest.mark.parametrize(("word", "reason"), [("stop", "stopped"), ("yield", "yielded")])
def test_what_one_rank_is_asked_ends_all(
    made: Made, word: Word, reason: str, ask_rank: int
) -> None:
    faults = Faults(ask_at=4, word=word, ask_rank=ask_rank)
    ranks = on_ranks(made.run, made.folder, 3, faults=faults)
    for rank in ranks:
        assert rank.outcome is not None
        assert (rank.outcome.reason, rank.outcome.progress.step) == (reason, 5)
        assert [progress for progress, _ in rank.commits] == [rank.outcome.progress]
    assert len(ranks[0].rows) == 5


def test_one_rank_that_is_asked_for_a_commit_makes_one(made: Made) -> None:
    asked, usual = (
        on_ranks(made.run, made.folder, 2, faults=Faults(ask_at=at, word="commit", ask_rank=1))
        for at in (4, None)
    )
    for rank, other in zip(asked, usual, strict=True):
        assert rank.outcome is not None and rank.outcome.reason == "finished"
        steps, expected = ([p.step for p, _ in r.commits] for r in (rank, other))
        assert 5 not in expected and steps == sorted([*expected, 5])


def test_a_commit_waits_on_all_ranks_for_the_one_that_still_writes(made: Made) -> None:
    section = made.run.config.checkpoint.model_copy(update={"every_steps": 10})
    run = replace(made.run, config=made.run.config.model_copy(update={"checkpoint": section}))
    faults = Faults(ask_at=9, word="busy", ask_rank=1)
    for rank in on_ranks(run, made.folder, 2, faults=faults):
        assert [progress.step for progress, _ in rank.commits] == [11, 20]
        assert rank.deferred_at == [10] and rank.due_at == [9, 10, 19]
    # The last one is not put off: no step comes after it.
    (alone,) = on_ranks(run, made.folder, 1, faults=Faults(ask_at=19, word="busy"))
    assert [progress.step for progress, _ in alone.commits] == [10, 20]


def test_the_loop_says_which_phase_it_is_in(made: Made) -> None:
    found = attempt(made.run, made.folder)
    assert found.phases == [(step, phase) for step in range(20) for phase in PHASES]


def test_data_that_end_early_are_an_error(made: Made) -> None:
    with pytest.raises(TrainingError, match="the data ended before step 8 of 20"):
        attempt(made.run, made.folder, faults=Faults(batches=8))


BAD = (3, 20, 40)


def test_bad_images_are_void_counted_and_named(tmp_path: Path) -> None:
    """3 of 64: below the limit of 10 %, and the curve is one on any number of ranks."""
    run = make_run(tmp_path, BAD, data={"max_bad_fraction": 0.1}, train={"steps": 8})
    alone = attempt(run, tmp_path)
    assert alone.outcome is not None and alone.outcome.reason == "finished"
    # 8 steps of 16 are two passes: each bad sample was met twice.
    assert alone.outcome.progress.bad == 6 and alone.rows[-1]["bad"] == 6
    assert sum(row["void"] for row in alone.rows) == 6
    assert sorted(row["key"] for row in alone.bad) == sorted([f"{i:03d}" for i in BAD] * 2)
    for row in alone.bad:
        assert row["attempt"] == 1 and row["reason"] and row["shard"].endswith(".tar")
        assert alone.rows[row["step"]]["void"] >= 1
    # Voiding a row moves no other sample.
    for step, digest in enumerate(alone.digests):
        rows = run.plan.step_rows(step)
        assert digest == f"{samples_digest(rows.shard, rows.place):016x}"

    ranks = on_ranks(run, tmp_path, 2)
    check_same_run(ranks[0], alone)
    named = [row for rank in ranks for row in rank.bad]
    assert sorted(row["key"] for row in named) == sorted(row["key"] for row in alone.bad)


def test_bad_images_change_the_curve(made: Made, tmp_path: Path) -> None:
    """The control: a void row is no row of the loss."""
    run = make_run(tmp_path, BAD, data={"max_bad_fraction": 0.1}, train={"steps": 20})
    found = attempt(run, tmp_path)
    first = next(step for step, row in enumerate(found.rows) if row["void"])
    assert found.losses[first] != made.alone.losses[first]


@pytest.mark.parametrize("world_size", [1, 2])
def test_too_many_bad_images_end_the_run(tmp_path: Path, world_size: int) -> None:
    """3 of 64 are 4.7 %, the limit is 4 %: judged once the pass of four steps is seen."""
    run = make_run(tmp_path, BAD, data={"max_bad_fraction": 0.04})
    for rank in on_ranks(run, tmp_path, world_size):
        assert rank.outcome is not None
        assert (rank.outcome.reason, rank.outcome.progress.step) == ("bad-data", 4)
        assert rank.outcome.progress.bad == 3
        assert rank.commits == []


def every_step(run: Run) -> Run:
    section = run.config.checkpoint.model_copy(update={"every_steps": 1})
    return replace(run, config=run.config.model_copy(update={"checkpoint": section}))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_is_not_finite_leaves_weights_and_moments(made: Made, world_size: int) -> None:
    """Poisoned on one rank only; all leave the step out, and its samples are consumed."""
    faults = Faults(poison=frozenset({5}), watch=True)
    ranks = on_ranks(every_step(made.run), made.folder, world_size, faults=faults)
    for rank in ranks:
        assert rank.outcome is not None
        assert (rank.outcome.reason, rank.outcome.progress.step) == ("finished", 20)
        assert rank.outcome.progress.skipped == 1
        assert rank.before[6] == rank.before[5] and rank.before[7] != rank.before[6]
        # A commit waits for a step that is finite.
        assert [p.step for p, _ in rank.commits] == [step for step in range(1, 21) if step != 6]
    found = ranks[0]
    assert [row["finite"] for row in found.rows] == [step != 5 for step in range(20)]
    assert found.losses[5] is None  # JSON has no NaN
    assert found.digests == made.alone.digests
    assert [row["lr"] for row in found.rows] == [row["lr"] for row in made.alone.rows]
    assert found.losses[:5] == pytest.approx(made.alone.losses[:5], rel=1e-5)
    assert all(torch.equal(rank.weights, found.weights) for rank in ranks)
    assert found.weights.isfinite().all()


def test_a_gradient_that_is_not_finite_is_skipped_too(made: Made) -> None:
    faults = Faults(poison_gradient=frozenset({5}), watch=True)
    (found,) = on_ranks(made.run, made.folder, 1, faults=faults)
    assert found.before[6] == found.before[5] and found.before[7] != found.before[6]
    assert math.isfinite(found.losses[5]) and found.rows[5]["grad_norm"] is None
    assert [row["finite"] for row in found.rows] == [step != 5 for step in range(20)]


@pytest.mark.parametrize(
    ("poison", "reason", "step", "skipped"),
    [
        ({2, 3, 4}, "nonfinite", 5, 3),  # train.max_nonfinite is 3
        ({2, 3, 5, 6}, "finished", 20, 4),
        ({0, 1, 2, 3}, "nonfinite", 3, 3),
        ({17, 18, 19}, "nonfinite", 20, 3),  # not "finished", at the last step
    ],
)
def test_steps_in_a_row_that_are_not_finite_end_the_run(
    made: Made, poison: set[int], reason: str, step: int, skipped: int
) -> None:
    (found,) = on_ranks(made.run, made.folder, 1, faults=Faults(poison=frozenset(poison)))
    assert found.outcome is not None
    progress = found.outcome.progress
    assert (found.outcome.reason, progress.step, progress.skipped) == (reason, step, skipped)
    assert len(found.commits) == (reason == "finished")


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("spoil_at", [3, 18, 19])
def test_weights_that_are_not_finite_are_never_committed(
    made: Made, spoil_at: int, world_size: int
) -> None:
    """Neither where a commit falls amid the steps (5), nor where the run's end does (20)."""
    run = replace(
        made.run,
        config=made.run.config.model_copy(
            update={"checkpoint": made.run.config.checkpoint.model_copy(update={"every_steps": 5})}
        ),
    )
    for found in on_ranks(run, made.folder, world_size, faults=Faults(spoil_at=spoil_at)):
        assert found.outcome is not None and found.outcome.reason == "nonfinite"
        assert found.outcome.progress.step == min(spoil_at + 3, 20)
        assert [p.step for p, _ in found.commits] == [s for s in (5, 10, 15) if s <= spoil_at]
        for _, files in found.commits:
            for tensor in safetensors.torch.load(files["model.safetensors"]).values():
                assert tensor.isfinite().all()


def test_a_commit_that_falls_on_a_broken_step_is_taken_after_it(made: Made) -> None:
    """The weights are whole, the step's data were not: the commit comes at the next good step."""
    run = replace(
        made.run,
        config=made.run.config.model_copy(
            update={"checkpoint": made.run.config.checkpoint.model_copy(update={"every_steps": 5})}
        ),
    )
    (found,) = on_ranks(run, made.folder, 1, faults=Faults(poison=frozenset({4, 5, 19})))
    assert [p.step for p, _ in found.commits] == [7, 10, 15, 20]
    assert found.outcome is not None and found.outcome.reason == "finished"


def test_all_ranks_with_broken_features_are_named(made: Made) -> None:
    """The last rank's pixels are NaN, or all ranks' weights are."""
    for faults, named in (
        (Faults(poison=frozenset({2, 3, 4})), "the features of rank 2"),
        (Faults(spoil_at=2), "the features of rank 0, 1, 2"),
        (Faults(poison_gradient=frozenset({2, 3, 4})), "the loss or the gradient"),
    ):
        for found in on_ranks(made.run, made.folder, 3, faults=faults):
            assert found.outcome is not None and found.outcome.detail.startswith(named)


def test_progress_survives_its_file() -> None:
    progress = Progress(7, "d", bad=1, truncated=2, skipped=3, loss=0.1)
    assert Progress.from_bytes(progress.to_bytes()) == progress
    newer = progress.to_bytes().replace(b'"format": 1', b'"format": 2')
    with pytest.raises(CheckpointError, match="newer format"):
        Progress.from_bytes(newer)
