"""What a run may switch on: each gives one curve on any number of ranks and micro-batches too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clip_ray import model as models
from clip_ray.config import Config
from clip_ray.data.blocks import read_batches
from clip_ray.train import inputs, loop
from clip_ray.train.rundir import Run
from clip_ray.train.state import build_state, gathered_digests
from tests.distributed import run_ranks
from tests.train.test_loop import (
    Faults,
    attempt,
    check_same_run,
    make_run,
    on_ranks,
    with_train,
)

SIGLIP = {
    "train": {"loss": "siglip"},
    "model": {"init_logit_bias": -10, "init_logit_scale": 2.3026},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "siglip": SIGLIP,
    "patch_dropout": {"train": {"patch_dropout": 0.5}},
    "grad_checkpointing": {"train": {"grad_checkpointing": True}},
    "mask_duplicates": {"train": {"mask_duplicates": True}},
    "locked image tower": {"init": {"freeze": ["image"]}},
    "locked text tower": {"init": {"freeze": ["text"]}},
    "bf16": {"train": {"precision": "bf16"}},
    "all at once": {
        **SIGLIP,
        "train": {"loss": "siglip", "grad_checkpointing": True, "mask_duplicates": True,
                  "patch_dropout": 0.25},
        "init": {"freeze": ["text"]},
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def option_run(folder: Path, name: str | None) -> Run:
    """Return a run of 8 steps with an option, over 64 samples of which 40 are different."""
    changes = OPTIONS[name] if name else {}
    train = {"steps": 8} | changes.get("train", {})
    return make_run(folder, kinds=40, **changes | {"train": train})


@pytest.mark.parametrize("name", OPTIONS)
def test_one_run_on_any_number_of_ranks_and_micro_batches(name: str, tmp_path: Path) -> None:
    run = option_run(tmp_path, name)
    alone = attempt(run, tmp_path)
    usual = attempt(option_run(tmp_path / "usual", None), tmp_path)
    if name == "grad_checkpointing":
        assert alone.losses == usual.losses and torch.equal(alone.weights, usual.weights)
    else:
        assert not np.allclose(alone.losses[-4:], usual.losses[-4:], rtol=1e-4, atol=0)
    for world_size, micro_batch in ((1, 5), (2, None), (3, 4)):
        ranks = on_ranks(with_train(run, micro_batch=micro_batch), tmp_path, world_size)
        if name == "bf16":  # a product of another shape rounds at 2**-8 of its values
            np.testing.assert_allclose(ranks[0].losses, alone.losses, rtol=2**-7)
        else:
            check_same_run(ranks[0], alone)
        assert all(torch.equal(rank.weights, ranks[0].weights) for rank in ranks)


def weights_of(model: torch.nn.Module, tower: str) -> torch.Tensor:
    """Return a tower's weights, told apart by name, not by what `freeze` says."""
    own = ("logit_scale", "logit_bias")
    parts = [
        p.detach().flatten()
        for name, p in model.named_parameters()
        if name not in own and name.startswith("visual.") == (tower == "image")
    ]
    return torch.cat(parts)


@pytest.mark.parametrize(("locked", "free"), [("image", "text"), ("text", "image")])
def test_a_locked_tower_keeps_its_weights(locked: str, free: str, tmp_path: Path) -> None:
    run = option_run(tmp_path, f"locked {locked} tower")
    found = attempt(run, tmp_path)
    before, _ = build_state(run.config)
    after, optimizer = build_state(run.config)
    torch.nn.utils.vector_to_parameters(found.weights, after.parameters())
    assert torch.equal(weights_of(after, locked), weights_of(before, locked))
    assert not torch.equal(weights_of(after, free), weights_of(before, free))
    assert after.logit_scale != before.logit_scale
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in after.parameters() if p.requires_grad}


def test_a_run_with_a_locked_tower_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Its commits hold no moments of the weights that do not move."""
    run = option_run(tmp_path, "locked image tower")
    whole = attempt(run, tmp_path)
    first = attempt(run, tmp_path, faults=Faults(ask_at=4))
    progress, files = first.commits[-1]
    rest = attempt(run, tmp_path, files={**files, "state.json": progress.to_bytes()})
    assert first.losses + rest.losses == whole.losses
    assert torch.equal(rest.weights, whole.weights)


def test_which_patches_are_left_out_is_a_function_of_seed_and_position() -> None:
    keys = torch.arange(4000)
    kept = models.vision.kept_patches(keys, 16, 0.5)
    assert kept.shape == (4000, 8) and (kept.diff(dim=1) > 0).all()
    assert torch.equal(kept[17:18], models.vision.kept_patches(keys[17:18], 16, 0.5))
    # Each patch in half of the rows, and each pair of patches in 8/16 * 7/15 of them.
    there = torch.zeros(4000, 16).scatter_(1, kept, 1.0)
    assert (there.mean(dim=0) - 0.5).abs().max() < 0.04
    together = (there.T @ there / 4000)[~torch.eye(16, dtype=torch.bool)]
    assert (together - 0.5 * 7 / 15).abs().max() < 0.04
    assert models.vision.kept_patches(keys, 16, 0.99).shape == (4000, 1)


def test_patch_dropout_moves_with_the_seed_and_stays_in_training(tmp_path: Path) -> None:
    config = option_run(tmp_path, "patch_dropout").config
    model, _ = build_state(config)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    keys = torch.tensor([1, 2, 3])
    a, b = (model.encode_image(pixels, k) for k in (keys, keys + 10))
    assert torch.equal(a, model.encode_image(pixels, keys)) and not torch.equal(a, b)
    with pytest.raises(AssertionError, match="keys"):
        model.encode_image(pixels)
    model.eval()
    plain = models.build(config.model, seed=config.run.seed).eval()
    assert torch.equal(model.encode_image(pixels), plain.encode_image(pixels))


def test_checkpointed_blocks_are_computed_again(tmp_path: Path) -> None:
    """And only where there is a backward pass."""
    model, _ = build_state(option_run(tmp_path, "grad_checkpointing").config)
    calls: list[str] = []
    for transformer in (model.visual.transformer, model.transformer):
        for block in transformer.resblocks:
            block.mlp.register_forward_pre_hook(lambda *_: calls.append("block"))
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    ids = torch.randint(1, 500, (3, 16))
    image, text = model(pixels, ids)
    assert len(calls) == 2  # one block a tower
    (image.sum() + text.sum()).backward()
    assert len(calls) == 4
    with torch.no_grad():
        model(pixels, ids)
    assert len(calls) == 6


def test_duplicates_are_told_by_image_file_and_by_caption(tmp_path: Path) -> None:
    run = option_run(tmp_path, "mask_duplicates")
    seen: dict[tuple[int, int], set[int]] = {}
    for step, batch in enumerate(read_batches(run.reader(1), 0, 0, 8)):
        identities = inputs._identities(batch)
        for row, pair in enumerate(identities.tolist()):
            which = int(batch.shard[row]) * 32 + int(batch.place[row])
            seen.setdefault(tuple(pair), set()).add(which % 40)
        assert identities.shape == (16, 2) and step < 8
    # One identity a kind of sample, both as images and as captions.
    assert all(len(kinds) == 1 for kinds in seen.values()) and len(seen) == 40
    for side in (0, 1):
        assert len({pair[side] for pair in seen}) == 40


def test_duplicates_are_hashed_only_where_they_are_masked(tmp_path: Path) -> None:
    run = option_run(tmp_path, None)
    (batch,) = read_batches(run.reader(1), 0, 0, 1)
    assert batch.image_id is None


def failing(run: Run, folder: Path, flip_at: int) -> tuple[str, list[int]]:
    """Return this rank's error, and the steps of its commits, after a bit of rank 1 flips."""
    commits: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        record = loop._refuse_divergence

        def noted(model: torch.nn.Module, step: int) -> None:
            record(model, step)
            commits.append(step)

        patch.setattr(loop, "_refuse_divergence", noted)
        try:
            attempt(run, folder, faults=Faults(flip_at=flip_at))
        except loop.TrainingError as error:
            return str(error), commits
    return "", commits


def test_a_rank_with_other_weights_is_named_and_nothing_is_committed(tmp_path: Path) -> None:
    """A flipped bit; the commit before it stands, on all ranks alike."""
    run = make_run(tmp_path, train={"steps": 9}, checkpoint={"every_steps": 3})
    for message, commits in run_ranks(failing, 3, run, tmp_path, 4):
        assert message.startswith("step 6: the ranks' weights differ (those of rank 1 are not the")
        assert commits == [3]
    for message, commits in run_ranks(failing, 3, run, tmp_path, 100):
        assert not message and commits == [3, 6, 9]
    for message, _ in run_ranks(failing, 2, run, tmp_path, 4):
        assert "which of the 2 ranks is wrong cannot be told" in message


def test_buffers_count_as_weights() -> None:
    """DDP does not send them: forward_sync_buffers is off."""
    model = models.build("ViT-micro-8-32", seed=0)
    before = gathered_digests(model)
    model.pixel_mean += 1e-6
    assert gathered_digests(model) != before
    model.pixel_mean -= 1e-6
    with torch.no_grad():
        a, b = model.visual.ln_pre.weight, model.visual.ln_post.weight
        a[0] = 2.0
        changed = gathered_digests(model)
        a[0], b[0] = 1.0, 2.0
    assert gathered_digests(model) != changed


def test_96_rows_on_5_ranks(tmp_path: Path) -> None:
    """20 rows a rank, four of them void on the last one; in micro-batches of 8, 24 a rank."""
    run = make_run(tmp_path, samples=192, train={"steps": 4, "global_batch": 96})
    alone = attempt(run, tmp_path)
    for micro_batch in (None, 8):
        ranks = on_ranks(with_train(run, micro_batch=micro_batch), tmp_path, 5)
        check_same_run(ranks[0], alone)
        assert [row["void"] for row in ranks[0].rows] == [4] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"loss": "siglip"}}, "siglip needs a bias"),
        ({"model": {"init_logit_bias": -10}}, "train.loss clip has no bias"),
        ({"train": {"patch_dropout": 0.5}, "init": {"freeze": ["image"]}}, "would drop patches"),
        ({"train": {"patch_dropout": 1.0}}, "less than 1"),
        ({"init": {"weights": "models:/clip@champion"}}, "is a name in MLflow"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    tree = {"train": {"steps": 1} | changes.get("train", {})}
    with pytest.raises(ValueError, match=message):
        Config.model_validate(changes | tree)


def test_compiled_towers_and_tiles_give_the_same_curve(tmp_path: Path) -> None:
    """train.compile reaches the loss too; the worker compiles the towers likewise."""
    run = option_run(tmp_path, "patch_dropout")
    fused: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        plain = loop.clip_loss

        def noted(*given: Any, **options: Any) -> torch.Tensor:
            fused.append(options["fused"])
            return plain(*given, **options)

        patch.setattr(loop, "clip_loss", noted)
        check_same_run(attempt(with_train(run, compile=True), tmp_path), attempt(run, tmp_path))
    assert fused == [True] * 8 + [False] * 8
