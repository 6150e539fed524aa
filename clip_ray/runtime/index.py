"""Indexing shards with Ray tasks, one a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import ray
from tqdm import tqdm

from clip_ray.config import DataConfig
from clip_ray.data.manifest import Manifest, build_manifest
from clip_ray.errors import ClipRayError, ClusterError

STALL_S = 600.0
IN_FLIGHT_PER_CPU = 4
SILENT_BELOW = 8  # shards that are indexed before a bar could be read


def index_data(data: DataConfig, say: Callable[[str], None]) -> Manifest:
    """Return the manifest of the configured sources; shows a bar and says what was found.

    Raises:
        DataError: see `data.manifest.build_manifest`.
        ClusterError: no shard was finished for ten minutes.
    """
    manifest = build_manifest(data, _over_the_cluster)
    skipped = ", ".join(f"{n} {reason}" for reason, n in manifest.skipped.items())
    held = len(manifest.holdout_items()[0])
    say(
        f"indexed {len(manifest)} shards: {manifest.total} training samples, {held} held out"
        + (f"; skipped: {skipped}" if skipped else "")
        + (
            f"; {sum(manifest.invalid_utf8)} captions not UTF-8"
            if any(manifest.invalid_utf8)
            else ""
        )
    )
    return manifest


@ray.remote(num_cpus=1)
def _run(function: Callable[[Any], Any], job: Any) -> Any:
    return function(job)


def _over_the_cluster(function: Callable[[Any], Any], jobs: list[Any]) -> Iterable[Any]:
    limit = IN_FLIGHT_PER_CPU * max(int(ray.cluster_resources().get("CPU", 1)), 1)
    todo = list(jobs)
    running: list[ray.ObjectRef] = []
    with tqdm(total=len(jobs), desc="indexing shards", disable=len(jobs) < SILENT_BELOW) as bar:
        while todo or running:
            while todo and len(running) < limit:
                running.append(_run.remote(function, todo.pop()))
            ready, running = ray.wait(running, timeout=STALL_S)
            if not ready:
                raise ClusterError(
                    f"no shard was indexed within {STALL_S:g} s; is the cluster full, or the "
                    "storage down?"
                )
            bar.update(len(ready))
            try:
                yield from ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                # A user's error (no credentials, no such bucket) needs no remote traceback.
                raise error.cause if isinstance(error.cause, ClipRayError) else error from None
