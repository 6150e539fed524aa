"""What a job says where the training ended for good."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip_ray.errors import DataError, TrainingError
from clip_ray.runtime.train import _raise_failure
from clip_ray.runtime.worker import Result
from clip_ray.train.hooks import Outcome
from clip_ray.train.journal import Journal
from clip_ray.train.state import Progress
from tests.train.test_loop import make_run


def test_too_many_bad_images_are_said_with_reasons_and_examples(tmp_path: Path) -> None:
    run = make_run(tmp_path, data={"max_bad_fraction": 0.04})
    rows = [("003", "truncated"), ("020", "truncated"), ("040", "not_an_image")]
    Journal(run.store, "quarantine").append(
        {"attempt": 1, "step": 2, "shard": "0.tar", "key": key, "reason": why} for key, why in rows
    )
    ended = Result(Outcome("bad-data", Progress(4, run.plan.digest, bad=3)))
    with pytest.raises(DataError) as raised:
        _raise_failure(ended, run)
    assert str(raised.value) == (
        "3 of 64 samples are undecodable, more than data.max_bad_fraction 0.04 allows: "
        "2 x truncated: 003 in 0.tar; 020 in 0.tar\n1 x not_an_image: 040 in 0.tar; all of them "
        f"are in {run.store.uri}/quarantine.jsonl. Raise the limit, or mend the data and train "
        "under another run.name"
    )


def test_what_is_not_finite_names_the_step_and_its_shards(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    ended = Result(Outcome("nonfinite", Progress(7, run.plan.digest), "the features of rank 1"))
    with pytest.raises(
        TrainingError, match="not finite up to step 7, .*: the features of rank 1"
    ) as raised:
        _raise_failure(ended, run)
    assert f"--run {run.store.uri} --step 7; shards {tmp_path}/" in str(raised.value)


def test_an_error_that_a_retry_cannot_mend_keeps_its_kind(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(DataError, match="a shard is not what it was"):
        _raise_failure(Result(error=("DataError", "a shard is not what it was")), run)
    _raise_failure(Result(Outcome("finished", Progress(20, run.plan.digest))), run)
