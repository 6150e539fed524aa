"""Indexing shards with Ray tasks, one a shard.

Not with Ray Data, which the data path uses: here a result is wanted the moment a shard is done,
in any order, because an index that is killed goes on from what it has recorded; a task that is
lost is one shard again; a user's error comes as itself; and that nothing was finished for ten
minutes is seen. Ray Data hands results out by blocks, so that all this would take a block a shard
all the same, and an executor between.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import ray
from tqdm import tqdm

from clip_ray.config import DataConfig
from clip_ray.data.earlier import BESIDE, Earlier, folder_of, read_earlier
from clip_ray.data.manifest import Manifest, build_manifest
from clip_ray.data.manifest_file import save_manifest
from clip_ray.errors import ClipRayError, ClusterError, ConfigError
from clip_ray.storage import Store, open_store

STALL_S = 600.0
IN_FLIGHT_PER_CPU = 4
SILENT_BELOW = 8  # shards that are indexed before a bar could be read
_SHOWN = 5  # shards named in one line


def index_data(
    data: DataConfig,
    store: Store,
    say: Callable[[str], None],
    check: Callable[[], None] = lambda: None,
) -> Manifest:
    """Return the manifest of the configured sources; shows a bar and says what was found.

    Args:
        data: the sources.
        store: the run's directory: an index that was interrupted goes on from what it left there.
        say: prints a line.
        check: called after each shard; what it raises ends the indexing.

    Raises:
        DataError: see `data.manifest.build_manifest`.
        ClusterError: no shard was finished for ten minutes.
    """
    earlier = read_earlier(store, data, say)
    with _Bar() as bar:

        def show(done: int, total: int) -> None:
            check()
            bar.show(done, total)

        manifest = build_manifest(data, _over_the_cluster, show, earlier)
    say(_summary(manifest, earlier))
    for group in manifest.same_keys()[:_SHOWN]:
        names = ", ".join(manifest.paths.text(row) for row in group[:_SHOWN])
        more = f" and {len(group) - _SHOWN} more" if len(group) > _SHOWN else ""
        say(
            f"warning: {names}{more} have the same sample keys: data.exclude, select and holdout "
            "cannot tell their samples apart"
        )
    return manifest


def _summary(manifest: Manifest, earlier: Earlier) -> str:
    held, by_sidecar = int(manifest.holdout.sum()), int((manifest.marks == 0).sum())
    parts = [
        f"indexed {len(manifest)} shards: {manifest.total} training samples, {held} held out",
    ]
    if manifest.skipped:
        parts.append(f"skipped: {', '.join(f'{n} {why}' for why, n in manifest.skipped.items())}")
    if any(manifest.invalid_utf8):
        parts.append(f"{sum(manifest.invalid_utf8)} captions not UTF-8")
    if by_sidecar:
        parts.append(f"{by_sidecar} tars by their sidecars, each streamed once by who reads it")
    if earlier.kept:
        parts.append(f"{earlier.kept} shards kept from an earlier index, {earlier.scanned} scanned")
    return "; ".join(parts)


def write_beside(data: DataConfig, manifest: Manifest) -> str:
    """Write a manifest into the directory of the first source; return where it is.

    Raises:
        ConfigError: the directory cannot be written to.
    """
    store = open_store(folder_of(data.sources[0].path), data.s3)
    try:
        save_manifest(manifest, store, BESIDE)
    except OSError as error:
        raise ConfigError(
            f"{store.uri} cannot be written to ({error}); leave --beside out: the run's directory "
            "has the manifest"
        ) from error
    return f"{store.uri}/{BESIDE}"


class _Bar:
    """A progress bar over all shards, those of an earlier index included."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, done: int, total: int) -> None:
        """Show that `done` of `total` shards are indexed."""
        if self._bar is None:
            silent = total - done < SILENT_BELOW
            self._bar = tqdm(total=total, initial=done, desc="indexing shards", disable=silent)
        self._bar.update(done - self._bar.n)


@functools.lru_cache(maxsize=2)
def _function(reference: ray.ObjectRef) -> Callable[[Any], Any]:
    """Fetch the function once per process: it holds the lists of keys, which may be long."""
    function: Callable[[Any], Any] = ray.get(reference)
    return function


@ray.remote(num_cpus=1)
def _run(boxed: list[ray.ObjectRef], job: Any) -> Any:
    return _function(boxed[0])(job)


def _over_the_cluster(function: Callable[[Any], Any], jobs: list[Any]) -> Iterable[Any]:
    limit = IN_FLIGHT_PER_CPU * max(int(ray.cluster_resources().get("CPU", 1)), 1)
    reference = ray.put(function)
    todo = jobs[::-1]
    running: list[ray.ObjectRef] = []
    while todo or running:
        while todo and len(running) < limit:
            # In a list: Ray would unpack a bare reference for each task.
            running.append(_run.remote([reference], todo.pop()))
        ready, running = ray.wait(running, timeout=STALL_S)
        if not ready:
            raise ClusterError(
                f"no shard was indexed within {STALL_S:g} s; is the cluster full, or the "
                "storage down?"
            )
        try:
            yield from ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            # A user's error (no credentials, no such bucket) needs no remote traceback.
            raise error.cause if isinstance(error.cause, ClipRayError) else error from None
