"""One replica on a tiny model, shared by the tests that only ask it things."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from clip_ray.inference import Encoder
from clip_ray.registry import ServedModel
from tests.serve.models import export
from tests.serve.support import Site, offline, running


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A random tiny model, clip/7."""
    return export(tmp_path_factory.mktemp("served") / "model", 1, "7")


@pytest.fixture(scope="session")
def encoder(served: ServedModel) -> Encoder:
    """The same weights, offline."""
    return offline(served)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, served: ServedModel) -> Iterator[Site]:
    """A replica with default limits and auth off."""
    with running(Site(tmp_path_factory.mktemp("site"), served)) as site:
        yield site
