"""A Ray head of its own for each file, jobs on it, and the run that nothing happened to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_ray.config import S3Options
from tests.runtime.support import Head, Jobs, ray_head

STEPS = ("--train.steps", "120", "--checkpoint.every_steps", "7")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, s3: S3Options) -> Iterator[Head]:
    # `s3` first: the head's processes inherit the credentials that it sets.
    with ray_head(tmp_path_factory.mktemp("ray"), cpus=6) as running:
        yield running


@pytest.fixture
def jobs(head: Head, tmp_path: Path) -> Iterator[Jobs]:
    made = Jobs(head, tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    jobs = Jobs(head, tmp_path_factory.mktemp("undisturbed"))
    jobs.run("clip", *STEPS)
    return jobs
