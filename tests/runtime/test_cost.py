"""What a run costs, said at its start and at its end."""

from __future__ import annotations

import re

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PRICED = ("--train.steps", "12", "--cluster.price_per_hour", "3600")  # one a second


def test_a_run_says_its_cost_and_an_extended_one_adds_to_it(jobs):
    output = jobs.run("priced", *PRICED)
    assert "3600 an hour, what 12 steps will cost is shown with the ETA" in output
    first = jobs.summary("priced")
    assert first["cost"] == pytest.approx(3600 * first["cluster_hours"])
    # From before the first step to the end of the evaluation, and not longer than this test ran.
    assert first["seconds"] < first["cost"] < 600
    assert f"{first['cost']:.2f} ({first['cluster_hours']:.2f} hours at 3600)" in output

    output = jobs.run("priced", *PRICED, "--run.extend", "12")
    found = re.search(r"3600 an hour, ([\d.]+) so far, ([\d.]+) expected for the 12 steps", output)
    assert found and 0 < float(found[1]) <= first["cost"] and float(found[2]) > 0
    second = jobs.summary("priced")
    assert second["cost"] > float(found[1]) + 1  # what the first had cost, and this one's seconds


def test_without_a_price_there_is_no_cost(jobs):
    output = jobs.run("free", "--train.steps", "4")
    assert jobs.summary("free")["cost"] is None and jobs.summary("free")["cluster_hours"] > 0
    assert "cost" not in output
