"""1,024 ranks and 100,000 shards without a GPU: what a rank, a step and a shard cost stays flat."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.scale import cases

pytestmark = pytest.mark.bench

RANKS = (8, 64, 256, 1024)
SHARDS = (1_000, 10_000, 100_000)
STEPS = 390_625  # 12.8e9 samples in steps of 32,768
FLAT = 1.5


def flat(name: str, unit: str, found: dict[int, float], small: int, large: int) -> None:
    """Print a row of the table; the large size may cost FLAT times what the small one does."""
    cells = ", ".join(f"{size:,}: {1e6 * seconds:.1f}" for size, seconds in found.items())
    print(f"\n{name} | us {unit} | {cells}")
    ratio = found[large] / found[small]
    assert ratio <= FLAT, f"{name}: {large} costs {ratio:.2f} times what {small} does, {unit}"


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory):
    folders = {count: tmp_path_factory.mktemp(f"m{count}") for count in SHARDS}
    return {count: (folder, cases.make_manifest(count, folder))
            for count, folder in folders.items()}  # fmt: skip


def test_a_manifest_is_loaded_in_the_same_time_a_shard(manifests) -> None:
    found = {count: cases.load_s(folder) / count for count, (folder, _) in manifests.items()}
    flat("manifest: load", "a shard", found, 10_000, 100_000)


def test_a_ranks_part_of_the_plan_costs_the_same_at_any_size(manifests) -> None:
    by_ranks = {
        ranks: cases.rank_window_s(cases.plan_of(manifests[100_000][1], ranks), ranks)
        for ranks in RANKS
    }
    flat("plan: a rank's rows of 8 steps, 100,000 shards", "by ranks", by_ranks, 64, 1024)
    by_shards = {
        count: cases.rank_window_s(cases.plan_of(manifest, 1024), 1024)
        for count, (_, manifest) in manifests.items()
    }
    flat("plan: the same, 1,024 ranks", "by shards", by_shards, 1_000, 100_000)


@pytest.mark.parametrize("ranks", RANKS)
def test_the_ranks_together_read_exactly_the_step(manifests, ranks: int) -> None:
    assert cases.ranks_make_the_step(cases.plan_of(manifests[100_000][1], ranks), ranks, 12_345)


def test_a_commit_waits_no_longer_for_many_parts(tmp_path: Path) -> None:
    found = {}
    for ranks in RANKS:
        seconds, files = cases.commit_s(tmp_path / str(ranks), ranks)
        assert files == ranks
        print(f"\n{ranks} parts: {seconds:.2f} s")
        found[ranks] = seconds / ranks
    assert 1024 * found[1024] < 256 * cases.ANSWER_S, "the parts are asked for one after the other"
    flat("commit: from the last part to COMMIT", "a part", found, 64, 1024)


def test_the_newest_of_many_commits_is_found_as_soon(tmp_path: Path) -> None:
    found = {n: cases.look_s(tmp_path / str(n), n) / n for n in (64, 256, 1024)}
    assert 1024 * found[1024] < 256 * cases.ANSWER_S, "the commits are asked for one by one"
    flat("checkpoints: the newest, 5 ms an answer", "a commit", found, 64, 1024)


def test_signs_of_life_cost_the_same_a_rank(tmp_path: Path) -> None:
    both = {ranks: cases.beat_s(tmp_path / str(ranks), ranks) for ranks in RANKS}
    flat("recorder: a pulse", "a rank", {r: b for r, (b, _) in both.items()}, 64, 1024)
    flat("health: a look at all", "a rank", {r: j for r, (_, j) in both.items()}, 64, 1024)


def test_a_step_is_journalled_and_tracked_at_the_same_cost_at_the_end(tmp_path: Path) -> None:
    first, last = cases.record_s(tmp_path / "run", STEPS)
    flat("recorder: a step", "of the first and last tenth", {1: first, STEPS: last}, 1, STEPS)
    seconds = cases.reopen_s(tmp_path / "run")
    print(f"\njournals of {STEPS:,} steps opened again: {seconds:.3f} s")
    assert seconds < 1
    (first, last), values = cases.track_s(tmp_path / "tracked", STEPS)
    assert values == STEPS * 13
    flat("tracking: a step", "of the first and last tenth", {1: first, STEPS: last}, 1, STEPS)


def test_a_cluster_is_shared_out_at_the_same_cost_a_rank() -> None:
    found = {}
    for ranks in RANKS:
        dealt = cases.deal(ranks)
        assert dealt.workers == ranks and 1 <= dealt.streams <= ranks
        found[ranks] = dealt.seconds / ranks
    flat("sharing out: a node of 8 GPUs and one to decode", "a rank", found, 64, 1024)
