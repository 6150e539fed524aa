"""Benchmarks of serving: what Ray Serve costs beside plain uvicorn and beside no server at all.

Ratios of one run are asserted; tables show the rest. `make bench`, or run.py for one case.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_ray.registry import Target
from tests.benchmarks.serving import cases
from tests.benchmarks.serving.run import (
    Bare,
    closed,
    compare,
    find,
    opened,
    store_classifier,
    table,
)
from tests.benchmarks.serving.servers import KINDS, Server, running

pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return cases.write_model(Path(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def servers(target: Target) -> Iterator[dict[str, Server]]:
    kinds = [KINDS[name] for name in ("plain", "proxy", "haproxy")]
    with running(kinds, target) as started:
        yield {server.kind.name: server for server in started}


def test_embedding_of_one_image(servers):
    """17 KB of JPEG in, base64 out: closed loops, then open ones at shares of each capacity."""
    everyone = list(servers.values())
    rows = compare(everyone, closed("embed"))
    rows += compare(everyone, opened("embed"), before=rows)
    rows += compare(everyone, closed("raw", [32]))
    print(f"\n{table(rows, 'plain')}")
    rate = {name: find(rows, name, "embed c=32").rate for name in servers}
    assert rate["haproxy"] >= 0.55 * rate["plain"]
    assert rate["haproxy"] >= 2.2 * rate["proxy"]
    assert not any(row.failed for row in rows if "open" not in row.load)


def test_requests_of_many_images(servers, target):
    """Multipart requests of 32 images against decode + encode with the same threads."""
    bare = Bare(target)
    compared = [servers["plain"], servers["haproxy"]]
    rows = compare(compared, closed("form", [1, 8]), each_round=bare)
    rows += bare.rows("form c=8")
    print(f"\n{table(rows, 'bare serial')}")
    assert (
        find(rows, "haproxy", "form c=8").rate >= 0.9 * find(rows, "bare serial", "form c=8").rate
    )


def test_cached_classifier_of_1000_labels(servers):
    """Classification by a classifier that is in memory against an embedding of the same image."""
    compared = [servers["plain"], servers["haproxy"]]
    store_classifier(compared)
    loads = [load for case in ("embed", "stored", "classify") for load in closed(case, [1, 32])]
    rows = compare(compared, loads)
    print(f"\n{table(rows, 'plain')}")
    embed, stored = (find(rows, "haproxy", f"{case} c=32") for case in ("embed", "stored"))
    assert stored.server_cpu_ms() <= 1.1 * embed.server_cpu_ms()
    assert stored.latency["p50"] <= 1.1 * embed.latency["p50"]
