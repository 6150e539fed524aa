"""Jobs on the Ray head that the tests of the runtime use, and the run that nothing happened to."""

from __future__ import annotations

import pytest

from tests.runtime.conftest import head, jobs  # noqa: F401 - fixtures
from tests.runtime.support import Head, Jobs

STEPS = ("--train.steps", "120", "--checkpoint.every_steps", "7")


@pytest.fixture(scope="module")
def undisturbed(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Jobs:  # noqa: F811
    made = Jobs(head, tmp_path_factory.mktemp("undisturbed"))
    made.run("clip", *STEPS)
    return made
